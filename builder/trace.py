"""A build's progress as lines, for callers from Python."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TextIO, cast

from runtime.cli import Screen
from runtime.trace import Trace


class _Lines(io.TextIOBase):
    """A stream that calls `say` with each complete line."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say, self._begun = say, ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self._say(line)
        return len(text)


def told(say: Callable[[str], object]) -> Trace:
    """A trace that calls `say` with each line, tables as aligned text."""
    return Screen(stream=cast(TextIO, _Lines(say)))
