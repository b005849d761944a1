"""Reads untrusted files: opens them without blocking, and parses JSON within limits.

A pipe or device in the place of a file is refused. JSON has limits of bytes, values, depth and digits of a number;
numbers must be finite, keys of an object unique, and texts encodable. Every violation is an `EngineError` of one line
that names the file.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlytom.numbers import shown
from runtime.errors import EngineError

MIB = 1 << 20
_DIGITS = 40  # the most of a whole number
_DEPTH = 50  # the deepest nesting of objects and lists
_VALUES = 1_000_000  # the most in a file, at about 100 bytes of memory each
# Errors of the machine, not of the file.
_NOT_THE_FILE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO)


def open_plain(path: Path, remedy: str) -> io.FileIO:
    """Open a plain file (or a link to one) for reading.

    Raises:
        EngineError: it is no plain file, or cannot be opened.
        OSError: the disk fails, or the machine has no memory or no descriptors left.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NOT_THE_FILE:
            raise
        raise EngineError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise EngineError(f"{path} is no plain file: {remedy}")
    return io.FileIO(descriptor, "rb")


def read_json(path: Path, remedy: str, most_bytes: int = MIB) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        remedy: ends every error message.
        most_bytes: a larger file is refused unread.

    Raises:
        EngineError: no plain file, too large, not valid JSON, or beyond the limits of this module.
        OSError: as of `open_plain`.
    """
    with open_plain(path, remedy) as file:
        parts, left = [], most_bytes + 1
        while left and (part := file.read(left)):  # a read may return less than asked, and the file may grow
            parts.append(part)
            left -= len(part)
    if not left:
        raise EngineError(f"{path} has more than {most_bytes / MIB:g} MiB, which none of ours has: {remedy}")
    content = b"".join(parts)
    if sum(map(content.count, (b",", b"[", b"{"))) > _VALUES:
        raise EngineError(f"{path} has more than {_VALUES} values, which none of ours has: {remedy}")
    try:
        values = json.loads(
            content.decode(),
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_real,
            parse_constant=_constant,
        )
        _check(values)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path} is not valid JSON ({error}): {remedy}") from error
    return values


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {shown(name)} is there twice")
        values[name] = value
    return values


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is no finite number")
    return number


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check(values: Any) -> None:
    """Raise ValueError for nesting that recursive code would fail on, and for texts that cannot be encoded."""
    level, depth = [values], 0
    while level:
        if depth > _DEPTH:
            raise ValueError(f"more than {_DEPTH} lists and objects in each other")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                value.encode()  # fails for a lone surrogate
        level, depth = below, depth + 1
