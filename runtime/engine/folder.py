"""Which of the engine folders that a builder wrote is meant where none is named."""

from __future__ import annotations

from pathlib import Path

from runtime.engine.manifest import Manifest
from runtime.errors import EngineError

ENGINES = Path("engines")  # where the builder puts them, if it is not told where


def newest_engine(root: Path) -> Path:
    """The engine folder under `root` that was built last, of those whose manifest can be read."""
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
