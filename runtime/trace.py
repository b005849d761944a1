"""The interface for progress and results of long work: a command's screen, or a caller in Python."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class Trace(Protocol):
    """Receives lines and tables for people, and progress."""

    def line(self, text: str = "") -> None:
        """One line."""
        ...

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
        """A table."""
        ...

    def working(self, text: str) -> AbstractContextManager[None]:
        """On a terminal, show `text` while the block runs."""
        ...

    def step(self, text: str, done: int = 0, steps: int = 0) -> None:
        """Within `working`: the current step, and that `done` of `steps` are done; `steps` 0: unknown."""
        ...
