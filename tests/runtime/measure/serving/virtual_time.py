"""An event loop whose time passes only while everything in it sleeps, and then at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    jump: Any = None

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self.jump(timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Begins at 1000 seconds."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        selector = _Jumping()
        selector.jump = self.work
        super().__init__(selector)

    def time(self) -> float:
        return self.seconds

    def work(self, seconds: float) -> None:
        """Let time pass while nothing else can happen."""
        self.seconds += seconds


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def busy(seconds: float) -> None:
    """Hold the running loop up."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.work(seconds)
