"""Where finished engines live: one folder each, all or nothing.

A build works in a hidden staging folder under a lock, and its folder takes its final name in one step, with everything
in it verified. So a folder that carries an engine's name is complete, two builds of one thing do not do the work twice,
and an interrupted one leaves nothing behind. What a killed one leaves, the next build in the same place clears, of
whatever engine it is (`runtime.files.staged`).
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
    """The manifest of a finished engine, if `folder` holds one built for `key` and (if asked for) verified.

    `text`: verified with the gate's last step, which not every verification runs. A folder that is there but damaged
    counts as missing: it will be built again.
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
    """A fresh folder to build in, beside `folder`, under its lock; removed on the way out unless `publish` took it.

    What killed builds left in that place, of any engine, is cleared first.

    Args:
        folder: the final folder.
        waiting: called once if another process is building the same thing, before waiting for it.
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
    """Give the staging folder its final name, in place of whatever had it."""
    staged.publish(place, folder)
