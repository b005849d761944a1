"""The open loop: each request is sent at its arrival time, whether or not earlier ones were answered.

As a slow generator would measure itself, each request records how late it was sent, and how long the limit of
concurrent requests held it. Time is the event loop's.
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
        due: its arrival time after the start of the run.
        late: from `due` until the generator took it.
        held: from then until the limit of concurrent requests let it be sent.
        answer: with times since it was sent.
    """

    request: R
    due: float
    late: float
    held: float
    answer: ServedAnswer

    @property
    def ended(self) -> float:
        """When its response ended, seconds after the start of the run."""
        return self.due + self.late + self.held + self.answer.seconds


async def open_loop(
    requests: Iterable[R],
    due: Sequence[float],
    ask: Callable[[R], Awaitable[ServedAnswer]],
    most: int | None = None,
) -> list[SentRequest[R]]:
    """Send each request at its time in `due` (ascending seconds from now), at most `most` concurrently; returns all.

    A request is taken from `requests` before its time, so that making it does not delay it.
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
