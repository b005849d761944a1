"""The cache of finished engines: one folder each, complete or absent.

A build works in a hidden staging folder under a lock, and renames it once it is complete. So a folder with an engine's
name is complete, concurrent builds of one engine do the work once, and an interrupted build leaves nothing behind. The
leftovers of killed builds, of any engine, are cleared by the next build in the same place (`runtime.files.staged`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from earlytom.errors import UserError
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from runtime.files import staged


def find(folder: Path, key: str, *, verified: bool, text: bool = False) -> Manifest | None:
    """The manifest of a finished engine, if `folder` holds one with this key that is, if asked for, verified.

    `text`: verified with the gate's last step, which is optional. A damaged folder counts as missing: it is built
    again.
    """
    if not folder.is_dir():
        return None
    try:
        manifest = Manifest.read(folder)
    except EngineError:
        return None
    gate = manifest.verification
    passed = gate is not None and gate["passed"] and (not text or _ran_text(gate.get("steps")))
    return manifest if manifest.key == key and (passed or not verified) else None


def _ran_text(steps: Any) -> bool:
    return isinstance(steps, Mapping) and "text" in steps


@contextmanager
def staging(folder: Path, waiting: Callable[[], None]) -> Iterator[Path]:
    """A new staging folder beside `folder`, under its lock; removed on exit unless published.

    Leftovers of killed builds in that place, of any engine, are cleared first.

    Args:
        folder: the final folder.
        waiting: called once, before waiting for another process that builds the same engine.
    """
    with ExitStack() as held:
        try:
            place = held.enter_context(staged.locked(folder, "building", waiting))
            place.mkdir()
        except OSError as error:
            raise UserError(
                f"cannot write to {folder.parent}: {error.strerror or error}; choose another folder with --out"
            ) from error
        yield place


def publish(place: Path, folder: Path) -> None:
    """Rename the staging folder to its final name, replacing what is there."""
    staged.publish(place, folder)
