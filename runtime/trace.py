"""Who is told what a long piece of work finds on its way: a command's screen, or a caller in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Trace(Protocol):
    """Takes lines and tables for people."""

    def line(self, text: str = "") -> None:
        """One line."""
        ...

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
        """A table."""
        ...
