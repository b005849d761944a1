"""The open loop: each request is sent at its time, whatever became of those before it.

A generator that is itself too slow measures itself, so each request says how late it was sent, and how long it was
held back on purpose where only so many may be under way. Time is the event loop's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from runtime.measure.serving.client import ServedAnswer

R = TypeVar("R")


@dataclass(frozen=True)
class SentRequest(Generic[R]):
    """A request and its answer; seconds.

    Attributes:
        due: after the start of the run.
        late: from then on until the generator came to it.
        held: from then on until there was room for it; 0 where any number may be under way.
        answer: of `ServedAnswer`, whose times begin when it was sent.
    """

    request: R
    due: float
    late: float
    held: float
    answer: ServedAnswer

    @property
    def ended(self) -> float:
        """Seconds after the start of the run."""
        return self.due + self.late + self.held + self.answer.seconds


async def open_loop(
    requests: Iterable[R],
    due: Sequence[float],
    ask: Callable[[R], Awaitable[ServedAnswer]],
    most: int | None = None,
) -> list[SentRequest[R]]:
    """Send each request at its time (ascending seconds from now), at most so many at once; all of them, answered.

    A request is taken from `requests` before its time, so that to make one makes none late.
    """
    loop = asyncio.get_running_loop()
    room: Any = nullcontext() if most is None else asyncio.Semaphore(most)
    start = loop.time()

    async def one(request: R, at: float) -> SentRequest[R]:
        begun = loop.time() - start
        async with room:
            held = loop.time() - start - begun
            answer = await ask(request)
        return SentRequest(request, at, max(0.0, begun - at), held, answer)

    async with asyncio.TaskGroup() as group:
        tasks = []
        for request, at in zip(requests, due, strict=True):
            await asyncio.sleep(max(0.0, start + at - loop.time()))
            tasks.append(group.create_task(one(request, at)))
            await asyncio.sleep(0)  # it is sent before the next one is made
    return [task.result() for task in tasks]
