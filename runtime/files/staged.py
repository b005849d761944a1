"""Makes folders beside their place under a lock, then moves them there.

While a folder NAME is made, there are beside it `.WORD-NAME` (the new content), `.old-NAME` (the replaced content) and
`.NAME.lock`. Only the holder of a name's lock touches these; the system releases the lock however its holder ends. So
what can be locked is abandoned: the next process that locks any name clears what killed processes left of all names,
and restores content that was moved away but not replaced.

A process that waits for a lock whose file is removed starts over with a new one (`filelock` checks that). Links are
removed, never followed; what cannot be removed stays.
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

_AT_ONCE = 0.5  # seconds; a lock held longer is held to make a folder, not to clear one


@contextmanager
def locked(folder: Path, word: str, waiting: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Lock `folder`, and yield a path, not existing yet, to make its content at; it is removed at the end.

    Args:
        folder: the final folder; missing parents are made.
        word: WORD of the module.
        waiting: called once before waiting for another process that makes the same folder.

    Raises:
        OSError: the parent folder cannot be written.
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
    """Move the made folder `place` to `folder`, replacing what is there. The lock must be held."""
    old = _beside(folder, "old")
    remove(old)
    try:
        if os.path.lexists(folder):
            os.replace(folder, old)
        os.replace(place, folder)
    except BaseException:  # Ctrl-C between the two moves must not lose the old folder
        if os.path.lexists(old) and not os.path.lexists(folder):
            os.replace(old, folder)
        raise
    finally:
        remove(old)


def remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link (not its target); what cannot be removed stays."""
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
    if (file := _lock_of(folder)).is_symlink():  # not one of our locks
        file.unlink(missing_ok=True)
    try:
        lock.acquire(timeout=_AT_ONCE)
    except Timeout:
        waiting()
        lock.acquire()


def _release(lock: FileLock) -> None:
    """Remove the lock's file while it is locked: a process that has it open sees that it is gone, and starts over."""
    with suppress(OSError):  # the folder is gone or read-only by now
        os.unlink(lock.lock_file)
    lock.release()


def _clear_others(folder: Path, word: str) -> None:
    """Clear what killed processes left of other names beside `folder`; locked names and foreign files stay."""
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
        except (Timeout, OSError):  # locked; or a link, or another user's
            continue
        try:
            _settle(other, word)
        finally:
            _release(lock)
    partial.clear(folder.parent)


def _is_lock(entry: os.DirEntry[str]) -> bool:
    """Whether it is an empty plain file, as all our locks are; one with content is not ours."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:  # gone meanwhile
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _settle(folder: Path, word: str) -> None:
    """Clear what a killed process left of `folder`, and restore what it was about to replace; the lock must be held."""
    remove(_beside(folder, word))
    old = _beside(folder, "old")
    if os.path.lexists(folder):
        remove(old)
    elif os.path.lexists(old):
        with suppress(OSError):
            os.replace(old, folder)
