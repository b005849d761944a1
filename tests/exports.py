"""Exports of a test run: each once, and each in half of the time.

Equal settings give equal graphs, byte for byte, and those of `quick` are the plain ones
(`test_two_exports_are_byte_identical`): the first build of a run exports them, whichever worker does it, and later ones
copy its files.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher
from torch._export import utils
from torch.fx import _lazy_graph_module, config
from torch.onnx._internal.exporter._registration import ONNXRegistry

from builder.export.vision import ExportedGraph
from builder.settings.config import BuildConfig
from tests.shared import Shared, name_of

# Parts of a build's key that no graph depends on.
OF_OTHER_STAGES = (
    *("answers", "calibration", "target", "backend", "backend_version"),
    *("hardware_compatible", "workspace_gib", "compression", "triton"),
)


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

        parts = {name: part for name, part in config.key_parts().items() if name not in OF_OTHER_STAGES}
        folder = shared(name_of("export", [json.dumps(parts, sort_keys=True)]), make)
        record = json.loads(folder.with_suffix(".export").read_text())
        for file in folder.iterdir():
            shutil.copy(file, place / file.name)
        copies = tuple(ExportedGraph(place / files[0], tuple(files)) for files in record["files"])
        return copies[0] if record["one"] else copies

    return copied


def quick(export: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.onnx.export` without what it does again every time and no file has: the parsed source of its translations,
    the names of all operators, a search for what may be rewritten at nodes of another kind, Python code of every graph
    on the way, and where in the source each node came from."""
    registry = classmethod(functools.cache(ONNXRegistry.from_torchlib.__func__))
    operators, match = functools.cache(utils._materialize_cpp_cia_ops), SimplePatternMatcher.match

    def match_kind(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        kind = self.pattern.output_nodes[0].op
        return match(self, model, graph, node, **options) if kind.matches(node.op_type) else MatchResult().fail()

    @functools.wraps(export)
    def exported(*args: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ONNXRegistry, "from_torchlib", registry)
            patch.setattr(utils, "_materialize_cpp_cia_ops", operators)
            patch.setattr(SimplePatternMatcher, "match", match_kind)
            patch.setattr(_lazy_graph_module, "_use_lazy_graph_module_flag", True)
            patch.setattr(config, "do_not_emit_stack_traces", True)
            return export(*args, **options)

    return exported
