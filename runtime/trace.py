"""Who is told what a long piece of work finds on its way: a command's screen, or a caller in Python."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class Trace(Protocol):
    """Takes lines and tables for people, and what is under way."""

    def line(self, text: str = "") -> None:
        """One line."""
        ...

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
        """A table."""
        ...

    def working(self, text: str) -> AbstractContextManager[None]:
        """The block takes a while: on a terminal it is shown that it runs, elsewhere nothing is."""
        ...

    def step(self, text: str, done: int = 0, steps: int = 0) -> None:
        """Within `working`: what it is at, and how many of how many steps are done, if that is known."""
        ...
