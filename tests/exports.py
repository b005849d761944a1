"""Equal settings give equal graphs, byte for byte (`test_two_exports_are_byte_identical`): the first build of a test
run exports them, whichever worker does it, and later ones copy its files."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builder.export.vision import ExportedGraph
from builder.settings.config import BuildConfig
from tests.shared import Shared, name_of


def once(shared: Shared, export: Callable[..., Any]) -> Callable[..., Any]:
    """`export`, one of `builder.stages`, that does the work of equal settings once."""

    @functools.wraps(export)
    def copied(config: BuildConfig, place: Path, int8: Any = None) -> Any:
        if int8 is not None:
            return export(config, place, int8)

        def make(folder: Path) -> None:
            made = export(config, folder)
            graphs = (made,) if isinstance(made, ExportedGraph) else made
            record = {"one": made is graphs[0], "files": [graph.files for graph in graphs]}
            folder.with_suffix(".export").write_text(json.dumps(record))

        parts = {name: part for name, part in config.key_parts().items() if name not in ("answers", "calibration")}
        folder = shared(name_of("export", [json.dumps(parts, sort_keys=True)]), make)
        record = json.loads(folder.with_suffix(".export").read_text())
        for file in folder.iterdir():
            shutil.copy(file, place / file.name)
        copies = tuple(ExportedGraph(place / files[0], tuple(files)) for files in record["files"])
        return copies[0] if record["one"] else copies

    return copied
