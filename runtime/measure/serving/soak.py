"""Many requests to a server: checks that each gets its own answer, and records the growth of the server's memory.

Several clients in a closed loop, half of their requests streamed. The server's processes (`processes`) are sampled
after answers, once a warm-up has filled caches and allocators.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from runtime.measure.clock import percentiles
from runtime.measure.serving import processes
from runtime.measure.serving.client import ServedAnswer, ServerClient
from runtime.measure.serving.processes import ProcessSample
from runtime.measure.serving.questions import ToSend, Workload

SAMPLES = 200  # about, during the run
MOST_WARMUP = 500
FIELDS = ("rss", "descriptors", "threads", "children_rss", "children_descriptors")


@dataclasses.dataclass
class Tally:
    """Counts of requests so far.

    Attributes:
        asked: sent; answered: good answers; wrong: good answers that belong to another request.
        errors: other answers, by status.
        seconds: of each good answer.
    """

    asked: int = 0
    answered: int = 0
    wrong: int = 0
    errors: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def count(self, answer: ServedAnswer, right: bool) -> None:
        if not answer.good:
            self.errors[answer.status] += 1
            return
        self.answered += 1
        self.wrong += not right
        self.seconds.append(answer.seconds)


async def soak(
    client: ServerClient,
    workload: Workload,
    *,
    requests: int,
    clients: int,
    repeated: float,
    seed: int,
    pid: int | None,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Ask `requests` times, after a warm-up of a tenth as many, at most `MOST_WARMUP`; returns the record.

    `pid`: of the server; None: its processes are not sampled.
    """
    warmup = min(MOST_WARMUP, max(1, requests // 10))
    await _ask(client, workload.draw(warmup, repeated, seed + 1, alternate=True), clients, workload, Tally())
    samples: list[ProcessSample] = []

    def look(tally: Tally) -> None:
        done = len(tally.seconds) + tally.errors.total()
        if pid is not None and done % max(1, requests // SAMPLES) == 0:
            samples.append(processes.sample(pid, done))
        if done and done % max(1, requests // 10) == 0:
            say(f"  {done} of {requests}: {tally.wrong} wrong, {tally.errors.total()} refused or lost")

    tally, started = Tally(), asyncio.get_running_loop().time()
    look(tally)
    await _ask(client, workload.draw(requests, repeated, seed, alternate=True), clients, workload, tally, look)
    seconds = asyncio.get_running_loop().time() - started
    return {
        "soak": requests,
        "clients": clients,
        "warmup": warmup,
        "seconds": seconds,
        "answers_per_second": tally.answered / seconds,
        "asked": tally.asked,
        "answered": tally.answered,
        "wrong": tally.wrong,
        "errors": dict(sorted(tally.errors.items())),
        "e2e": percentiles(tally.seconds) if tally.seconds else None,
        "held": {name: held(samples, name) for name in FIELDS} if samples else None,
        "samples": [dataclasses.asdict(one) for one in samples],
    }


def held(samples: Sequence[ProcessSample], name: str) -> dict[str, float]:
    """First, middle, last and peak value of one field, and its growth per thousand answers.

    Growth is that of the second half, as allocators settle late and a leak does not.
    """
    values, half = [getattr(one, name) for one in samples], len(samples) // 2
    answers = samples[-1].answers - samples[half].answers
    growth = (values[-1] - values[half]) / answers * 1000 if answers else 0.0
    told = {"first": values[0], "middle": values[half], "last": values[-1], "peak": max(values)}
    return told | {"growth_per_thousand": growth}


async def _ask(
    client: ServerClient,
    requests: Iterator[ToSend],
    clients: int,
    workload: Workload,
    tally: Tally,
    look: Callable[[Tally], None] = lambda tally: None,
) -> None:
    async def one() -> None:
        for request in requests:
            tally.asked += 1
            answer = await client.ask(request.body, stream=request.stream)
            tally.count(answer, workload.right(request, answer.text, answer.video))
            look(tally)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one())
    except ExceptionGroup as error:  # the others were cancelled
        raise error.exceptions[0] from None
