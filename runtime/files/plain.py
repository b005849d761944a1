"""Files of a folder that anybody may have written: opened without waiting, JSON read within limits.

A pipe or a device in the place of a file is refused instead of waited for, and JSON is bounded in size, in values and
in depth before it is taken in. What is returned has only numbers that are finite and of a usual length, each key once
in an object, and texts that can be written again. Everything wrong is an `EngineError` of one line that names the file.
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
_DIGITS = 40  # of a number; what is larger is none of ours
_DEPTH = 50  # objects and lists in each other
_VALUES = 1_000_000  # in a file: about 100 bytes of memory each
# The machine's state, and nothing that is wrong with the file.
_NOT_THE_FILE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO)


def open_plain(path: Path, remedy: str) -> io.FileIO:
    """A plain file (or a link to one), opened for reading.

    Raises:
        EngineError: it is something else, or cannot be opened.
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
    """What a JSON file says.

    Args:
        path: the file.
        remedy: the end of every message.
        most_bytes: a larger file is refused unread.

    Raises:
        EngineError: no plain file, larger than that, not valid JSON, or beyond the limits of this module.
        OSError: as of `open_plain`.
    """
    with open_plain(path, remedy) as file:
        parts, left = [], most_bytes + 1
        while left and (part := file.read(left)):  # a read may return less; a file may grow while it is read
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
    """Refuse a depth at which what calls itself for each level would fail, and texts that cannot be written again."""
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
                value.encode()  # half of a surrogate pair has no encoding
        level, depth = below, depth + 1
