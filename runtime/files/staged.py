"""Folders that are made beside their place under a lock and moved there whole, as one step.

Of a folder NAME there are beside it, for a while: `.WORD-NAME` in which it is made, `.old-NAME`, what it replaces, and
`.NAME.lock`. Whoever holds the lock of a name alone touches what belongs to that name, the lock's file too, and the
system lets go of a lock however its holder ends. So what can be locked is nobody's any more: whoever locks a name next
clears what killed processes left there, of every name, and puts back what was moved away and not yet replaced.

A process that waits for a lock whose file was removed meanwhile starts over with a new one (`filelock` looks for that).
Links are removed, never followed; what may not be removed stays.
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

from runtime.files import partial

_AT_ONCE = 0.5  # seconds after which a lock is held for more than to clear something


@contextmanager
def locked(folder: Path, word: str, waiting: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """The path to make `folder` at; inside, nobody else makes it. It is not there yet, and is removed on the way out.

    Args:
        folder: the final folder; what it lies in is made if it is not there.
        word: of the folder in which it is made.
        waiting: called once if another process makes the same folder, before waiting for it.

    Raises:
        OSError: the place cannot be written.
    """
    place = _beside(folder, word)
    lock = FileLock(_lock_of(folder))
    try:
        _acquire(lock, folder, waiting)
        _settle(folder, word)
        _clear_others(folder, word)
        yield place
    finally:
        if lock.is_locked:
            remove(place)
            _release(lock)


def publish(place: Path, folder: Path) -> None:
    """Give the folder that was made its final name, in place of whatever had it. The lock must be held."""
    old = _beside(folder, "old")
    remove(old)
    try:
        if os.path.lexists(folder):
            os.replace(folder, old)
        os.replace(place, folder)
    except BaseException:  # a Ctrl-C between the two must not cost what was there
        if os.path.lexists(old) and not os.path.lexists(folder):
            os.replace(old, folder)
        raise
    finally:
        remove(old)


def remove(path: Path) -> None:
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


def _beside(folder: Path, word: str) -> Path:
    return folder.with_name(f".{word}-{folder.name}")


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _acquire(lock: FileLock, folder: Path, waiting: Callable[[], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (file := _lock_of(folder)).is_symlink():  # never ours
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


def _clear_others(folder: Path, word: str) -> None:
    """Clear what dead processes left of other names beside `folder`; what a live one holds, or is not ours, stays."""
    ours = re.compile(rf"\.(?:{word}|old)-(?P<folder>.+)|\.(?P<locked>.+)\.lock")
    names = set()
    with suppress(OSError):
        for entry in os.scandir(folder.parent):
            match = ours.fullmatch(entry.name)
            if match is not None and (match["folder"] or _is_lock(entry)):
                names.add(match["folder"] or match["locked"])
    for name in sorted(names - {folder.name}):
        other = folder.with_name(name)
        lock = FileLock(_lock_of(other))
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):  # somebody is at work there; a link, another user's
            continue
        try:
            _settle(other, word)
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


def _settle(folder: Path, word: str) -> None:
    """Clear what a killed process left of `folder`, and put back what it was about to replace; under its lock."""
    remove(_beside(folder, word))
    old = _beside(folder, "old")
    if os.path.lexists(folder):
        remove(old)
    elif os.path.lexists(old):
        with suppress(OSError):
            os.replace(old, folder)
