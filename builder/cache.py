"""Where finished engines live: one folder each, all or nothing.

A build works in a hidden staging folder under a lock, and its folder takes its final name in one step, with everything
in it verified. So a folder that carries an engine's name is complete, two builds of one thing do not do the work twice,
and an interrupted one leaves nothing behind (a killed one leaves its staging folder, which the next build of the same
thing clears).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from earlytom.errors import UserError
from runtime.errors import EngineError
from runtime.manifest import Manifest


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
    passed = gate is not None and gate["passed"] and (not text or "text" in gate.get("steps", ()))
    return manifest if manifest.key == key and (passed or not verified) else None


@contextmanager
def staging(folder: Path, waiting: Callable[[], None]) -> Iterator[Path]:
    """A fresh folder to build in, beside `folder`, under its lock; removed on the way out unless `publish` took it.

    Args:
        folder: the final folder.
        waiting: called once if another process is building the same thing, before waiting for it.

    Raises:
        UserError: the folder's parent cannot be written.
    """
    place = folder.with_name(f".building-{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            waiting()
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent}: {error.strerror or error}; choose another folder with --out"
        ) from error
    try:
        shutil.rmtree(place, ignore_errors=True)  # of a build that was killed
        place.mkdir()
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def publish(place: Path, folder: Path) -> None:
    """Give the staging folder its final name, in place of whatever had it."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(place, folder)
    except BaseException:  # a Ctrl-C between the two must not cost the engine that was there
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
