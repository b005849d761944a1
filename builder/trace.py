"""What a build tells while it runs: lines and tables, to a command's screen or to whoever calls it from Python."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO, cast

from runtime.cli import Screen


class Trace(Protocol):
    """Who is told."""

    def line(self, text: str = "") -> None:
        """One line."""
        ...

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table."""
        ...


class _Lines(io.TextIOBase):
    """A stream that hands on whole lines."""

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
