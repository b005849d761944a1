"""Where finished engines live: one folder each, all or nothing.

A build works in a hidden staging folder under a lock, and its folder takes its final name in one step, with everything
in it verified. So a folder that carries an engine's name is complete, two builds of one thing do not do the work twice,
and an interrupted one leaves nothing behind.

A killed one leaves its staging folder, its lock's file and perhaps the engine that it was about to replace. The next
build in the same place, of whatever engine, clears that or puts it back. Whoever holds the lock of a name alone touches
what belongs to that name, the lock's file too, and the system lets go of a lock however its holder ends: what can be
locked is nobody's any more. A process that waits for a lock whose file was removed meanwhile starts over with a new
one (`filelock` looks for that).
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from earlytom.errors import UserError
from runtime import partial
from runtime.errors import EngineError
from runtime.manifest import Manifest

_LEFTOVER = re.compile(r"\.(?:building-|old-)(?P<folder>.+)|\.(?P<locked>.+)\.lock")
_AT_ONCE = 0.5  # seconds in which a lock is free that is only held to clear something


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

    What killed builds left in that place, of any engine, is cleared first.

    Args:
        folder: the final folder.
        waiting: called once if another process is building the same thing, before waiting for it.

    Raises:
        UserError: the folder's parent cannot be written.
    """
    place = _staging_of(folder)
    lock = FileLock(_lock_of(folder))
    try:
        try:
            _acquire(lock, folder, waiting)
            _settle(folder)
            place.mkdir()
        except OSError as error:
            raise UserError(
                f"cannot write to {folder.parent}: {error.strerror or error}; choose another folder with --out"
            ) from error
        _clear_others(folder)
        yield place
    finally:
        if lock.is_locked:
            _remove(place)
            _release(lock)


def publish(place: Path, folder: Path) -> None:
    """Give the staging folder its final name, in place of whatever had it."""
    old = _old_of(folder)
    _remove(old)
    try:
        if os.path.lexists(folder):
            os.replace(folder, old)
        os.replace(place, folder)
    except BaseException:  # a Ctrl-C between the two must not cost the engine that was there
        if os.path.lexists(old) and not os.path.lexists(folder):
            os.replace(old, folder)
        raise
    finally:
        _remove(old)


def _staging_of(folder: Path) -> Path:
    return folder.with_name(f".building-{folder.name}")


def _old_of(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _acquire(lock: FileLock, folder: Path, waiting: Callable[[], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (file := _lock_of(folder)).is_symlink():  # never ours, and not to be written through
        file.unlink(missing_ok=True)
    try:
        lock.acquire(timeout=_AT_ONCE)
    except Timeout:
        waiting()
        lock.acquire()


def _release(lock: FileLock) -> None:
    """Remove the file while it is still locked: who has it open already finds no name on it, and starts over."""
    with suppress(OSError):  # the folder is gone or read-only by now
        os.unlink(lock.lock_file)
    lock.release()


def _clear_others(folder: Path) -> None:
    """Clear what dead builds of other engines left beside `folder`; what a live one holds, or is not ours, stays."""
    names = set()
    with suppress(OSError):
        for entry in os.scandir(folder.parent):
            match = _LEFTOVER.fullmatch(entry.name)
            if match is not None and (match["folder"] or _is_lock(entry)):
                names.add(match["folder"] or match["locked"])
    for name in sorted(names - {folder.name}):
        other = folder.with_name(name)
        lock = FileLock(_lock_of(other))
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):  # somebody builds there; a link, another user's
            continue
        try:
            _settle(other)
        finally:
            _release(lock)
    partial.clear(folder.parent)


def _is_lock(entry: os.DirEntry[str]) -> bool:
    """A plain file without content, as every lock's is; one with content is somebody else's."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:  # gone meanwhile
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _settle(folder: Path) -> None:
    """Clear what a killed build of `folder` left, and put back an engine that it was about to replace.

    Its lock must be held.
    """
    _remove(_staging_of(folder))
    old = _old_of(folder)
    if os.path.lexists(folder):
        _remove(old)
    elif os.path.lexists(old):
        with suppress(OSError):
            os.replace(old, folder)


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file or a link (not what it points to); what cannot be, stays."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.is_dir():
        _make_writable(path)
        shutil.rmtree(path, ignore_errors=True)


def _make_writable(folder: Path) -> None:
    with suppress(OSError):
        os.chmod(folder, stat.S_IRWXU)
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                _make_writable(Path(entry))
