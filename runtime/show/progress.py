"""A line on a terminal while something runs: what, a clock, and where steps are known a bar with the time left.

It is gone when that is done. What is printed meanwhile stands above it.
"""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

_PER_SECOND = 4  # how often it is drawn


class LiveLine:
    """The line; a context manager in which it is there."""

    def __init__(self, stream: TextIO, text: str) -> None:
        columns: tuple[ProgressColumn, ...] = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            _KnownSteps(bar_width=24),
            TimeElapsedColumn(),
            _TimeLeft(),
        )
        console = Console(file=stream)
        self._progress = Progress(*columns, console=console, transient=True, refresh_per_second=_PER_SECOND)
        self._text = text
        self._task = self._progress.add_task(text, total=None)

    def step(self, text: str, done: int, steps: int) -> None:
        """It is at `text`, and has done so many of so many steps (of 0: nobody knows)."""
        shown = f"{self._text.partition(': ')[0]}: {text}" if text else self._text
        total = float(steps) if steps > 0 else None
        self._progress.update(self._task, description=shown, completed=done, total=total)

    def write(self, text: str) -> None:
        """Print above it."""
        self._progress.console.print(Text(text), end="", soft_wrap=True)

    def __enter__(self) -> LiveLine:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()


class _KnownSteps(BarColumn):
    """A bar where steps are known."""

    def render(self, task: Task) -> Any:
        return Text("") if task.total is None else super().render(task)


class _TimeLeft(ProgressColumn):
    """The time that is left, as far as the steps so far tell it."""

    def render(self, task: Task) -> Text:
        left = None if task.total is None else task.time_remaining
        return Text("" if left is None else f"{left:.0f} s left")
