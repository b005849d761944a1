"""Finds the newest engine folder, the default where none is named."""

from __future__ import annotations

from pathlib import Path

from runtime.engine.manifest import Manifest
from runtime.errors import EngineError

ENGINES = Path("engines")  # the builder's default output folder


def newest_engine(root: Path) -> Path:
    """The engine folder under `root` with the latest build time, of those with a valid manifest."""
    folders = [path.parent for path in root.glob("*/manifest.json") if not path.parent.name.startswith(".")]
    if not folders:
        raise EngineError(
            f"no engine under {root}/: build one with python -m builder.build --ratio 0.3 --fp16, or name its folder "
            "with --engine"
        )
    created: dict[Path, str] = {}
    unreadable: list[EngineError] = []
    for folder in sorted(folders):
        try:
            created[folder] = Manifest.read(folder, verify_files=False).created
        except EngineError as error:
            unreadable.append(error)
    if not created:
        raise unreadable[0]
    return max(created, key=created.__getitem__)
