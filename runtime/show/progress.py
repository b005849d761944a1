"""A live line on a terminal while something runs: its text, elapsed time, and for known steps a bar and the time left.

The line disappears at the end; text printed meanwhile appears above it.
"""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

_PER_SECOND = 4  # redraws


class LiveLine:
    """The live line; a context manager that shows it."""

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
        """Show the step `text`, and that `done` of `steps` are done; `steps` 0: unknown."""
        shown = f"{self._text.partition(': ')[0]}: {text}" if text else self._text
        total = float(steps) if steps > 0 else None
        self._progress.update(self._task, description=shown, completed=done, total=total)

    def write(self, text: str) -> None:
        """Print above the line."""
        self._progress.console.print(Text(text), end="", soft_wrap=True)

    def __enter__(self) -> LiveLine:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()


class _KnownSteps(BarColumn):
    """A bar, shown if the number of steps is known."""

    def render(self, task: Task) -> Any:
        return Text("") if task.total is None else super().render(task)


class _TimeLeft(ProgressColumn):
    """The estimated time left."""

    def render(self, task: Task) -> Text:
        left = None if task.total is None else task.time_remaining
        return Text("" if left is None else f"{left:.0f} s left")
