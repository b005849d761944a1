"""Atomic writes: a file is written beside its target, then moved there; leftovers of killed processes are removed.

    with partial(target) as path:
        write(path)

The writer locks the partial file, and the system releases the lock however the writer ends. So a partial file that can
be locked is abandoned, whatever process, container or machine wrote it, and `clear` or the next writer of its target
removes it. Names are `.NAME.TOKEN.partial`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = re.compile(r"\.(?P<target>.+)\.[^.]+\.partial")


@contextmanager
def partial(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, moved there at the end, or removed after an exception.

    Write into the existing file; do not replace it, as the lock is on it.

    Raises:
        OSError: it cannot be made or moved; names `target`.
    """
    with temporary(target) as path:
        yield path
        try:
            os.replace(path, target)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from error


@contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """As `partial`, but the file is removed at the end.

    Raises:
        OSError: it cannot be made, or `target` exists and is no plain file; names `target`.
    """
    clear(target.parent, target.name)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not target.is_file():  # the move would replace it, even /dev/null for root
            raise OSError(errno.EINVAL, "Is a device or a pipe")
        path, descriptor = _make(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    try:
        yield path
    finally:
        with suppress(OSError):  # moved already, or the folder is gone or read-only by now
            path.unlink()
        os.close(descriptor)


def clear(folder: Path, name: str | None = None) -> None:
    """Remove abandoned partial files in `folder`, with `name` only those of that file.

    Others than plain files, and files that cannot be opened or removed, stay.
    """
    with suppress(OSError):
        for found in os.listdir(folder):
            match = _NAME.fullmatch(found)
            if match is not None and name in (None, match["target"]):
                _remove_dead(folder / found)


def _make(target: Path) -> tuple[Path, int]:
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return path, descriptor
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            raise
        os.close(descriptor)  # another process removed it before it was locked


def _remove_dead(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        finally:
            os.close(descriptor)
