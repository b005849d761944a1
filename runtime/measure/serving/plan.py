"""A measurement of a server from its plan to its record, as a library: `python -m runtime.bench --serve URL` calls it.

Progress goes to `say`, line by line.
"""

from __future__ import annotations

import asyncio
import os
import platform
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlytom.errors import UserError
from runtime.drawing.clips import write_test_clip
from runtime.measure.serving import arrivals, processes
from runtime.measure.serving.client import ServerClient
from runtime.measure.serving.figures import figures
from runtime.measure.serving.generator import open_loop
from runtime.measure.serving.questions import SentVideo, ToSend, Workload
from runtime.measure.serving.soak import soak

TEST_CLIPS = (3, 7, 11, 19)
QUESTION = "What happens in this video?"  # default for the user's videos


@dataclass(frozen=True)
class LoadPlan:
    """The settings of a measurement.

    Attributes:
        url: of the server; key: its API key.
        videos: files; none: clips of the bundled model's test set.
        question: about every video; None: those of the test set, or `QUESTION`.
        rates: requests a second, one run each; inf: all at once.
        burstiness: see `arrivals`.
        requests, seconds: length of each run; one of them is None.
        most: limit of concurrent requests, or None.
        repeated: share of requests about a video that the server has seen.
        objectives: for goodput, seconds by latency.
        max_tokens: of an answer.
        soak: number of requests of a soak instead of `rates`, by `clients` clients; pid: of the server's process.
        seed: of arrivals, videos and questions.
    """

    url: str
    key: str | None = None
    videos: tuple[Path, ...] = ()
    question: str | None = None
    rates: tuple[float, ...] = (1.0,)
    burstiness: float = 1.0
    requests: int | None = 100
    seconds: float | None = None
    most: int | None = None
    repeated: float = 0.5
    objectives: Mapping[str, float] | None = None
    max_tokens: int = 16
    soak: int | None = None
    clients: int = 4
    pid: int | None = None
    seed: int = 0


Say = Callable[[str], object]


def measure(plan: LoadPlan, folder: Path, say: Say) -> dict[str, Any]:
    """The record of a plan, in seconds and bytes.

    Args:
        folder: scratch folder for drawn clips.
    """
    if plan.pid is not None:
        processes.check(plan.pid)
    pairs = questions(plan, folder)
    return asyncio.run(_measure(plan, pairs, say))


def questions(plan: LoadPlan, folder: Path) -> list[tuple[SentVideo, str]]:
    """Each video with each of its questions."""
    if plan.videos:
        read = [SentVideo(str(path), path.read_bytes()) for path in plan.videos]
        return [(video, plan.question or QUESTION) for video in read]
    found = []
    for number in TEST_CLIPS:
        path, asked = write_test_clip(folder / f"clip{number}.mp4", number)
        video = SentVideo(path.name, path.read_bytes())
        texts = [one.text for one in asked] if plan.question is None else [plan.question]
        found += [(video, text) for text in texts]
    return found


async def _measure(plan: LoadPlan, pairs: Sequence[tuple[SentVideo, str]], say: Say) -> dict[str, Any]:
    async with ServerClient(plan.url, plan.key) as client:
        workload = Workload(pairs, await client.model(), plan.max_tokens)
        await learn(client, workload)
        distinct = len(set(workload.answers))
        say(f"{client.url}: {len(pairs)} questions with {distinct} different answers, each asked alone before")
        about = {
            "url": client.url,
            "pairs": len(pairs),
            "different_answers": distinct,
            "repeated": plan.repeated,
            "max_tokens": plan.max_tokens,
            "seed": plan.seed,
        } | machine("before")
        if plan.soak is not None:
            found = await soak(
                client,
                workload,
                requests=plan.soak,
                clients=plan.clients,
                repeated=plan.repeated,
                seed=plan.seed,
                pid=plan.pid,
                say=say,
            )
        else:
            found = {
                "burstiness": plan.burstiness,
                "max_concurrency": plan.most,
                "objectives": dict(plan.objectives or {}),
                "rates": [await at_rate(client, workload, plan, rate, say) for rate in plan.rates],
            }
        return found | about | machine("after")


def machine(when: str) -> dict[str, Any]:
    """A record's fields about the machine and its load average of the last minute."""
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", f"machine_load_{when}": os.getloadavg()[0]}


async def learn(client: ServerClient, workload: Workload) -> None:
    """Ask each question alone, not streamed, and expect its answer from then on; also fills the server's caches."""
    for pair in range(len(workload.pairs)):
        answer = await client.ask(workload.known(pair, stream=False).body, stream=False)
        if not answer.good:
            video, question = workload.pairs[pair]
            what = f"{answer.status} {answer.text}".strip()
            raise UserError(f"{client.url} does not answer {question!r} about {video.name} ({what})")
        workload.learn(pair, answer.text)


async def at_rate(client: ServerClient, workload: Workload, plan: LoadPlan, rate: float, say: Say) -> dict[str, Any]:
    """The record of one run, with the share of a core that the generator used."""
    if plan.seconds is not None:
        due = arrivals.in_seconds(plan.seconds, rate, plan.burstiness, plan.seed)
    else:
        due = arrivals.of_number(plan.requests or 1, rate, plan.burstiness, plan.seed)
    if not len(due):
        raise UserError(f"no request arrives within {plan.seconds:g} s at the rate {rate:g}: give more --seconds")
    say(f"rate {rate:g}: {len(due)} requests ...")
    before = _processor_seconds()
    sent = await open_loop(
        workload.draw(len(due), plan.repeated, plan.seed),
        [float(one) for one in due],
        lambda request: client.ask(request.body, stream=request.stream),
        plan.most,
    )

    def right(request: ToSend, answer: Any) -> bool:
        return workload.right(request, answer.text, answer.video)

    found = figures(sent, right, plan.objectives or {})
    spent = (_processor_seconds() - before) / found["seconds"]
    return {"rate": rate if rate != float("inf") else "inf"} | found | {"generator_core_share": spent}


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
