"""The time that a server adds: the same requests to it and to a `Pipeline` in this process, interleaved.

    known    a further question about a video in both prefix caches (the request still holds the whole file)
    fresh    a new video, which the server hashes and decodes in another process

Only one side works at any moment. Both decode greedily, and their answers are compared. Other load on the machine
affects both sides, but unevenly; `added_quiet` is the difference of their 10th percentiles, which it disturbs least.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from earlytom.errors import UserError
from runtime.measure.serving.client import ServedAnswer, ServerClient
from runtime.measure.serving.figures import spread
from runtime.measure.serving.questions import SentVideo, Workload
from runtime.pipeline import Pipeline

T = TypeVar("T")


def added(
    pipeline: Pipeline,
    url: str,
    key: str | None,
    pair: tuple[SentVideo, str],
    folder: Path,
    *,
    warmup: int,
    repeats: int,
    max_tokens: int,
) -> dict[str, Any]:
    """The record: seconds of both sides and their differences, and the number of different answers.

    Args:
        pair: an mp4 file and a question.
        folder: a scratch folder for the video.
    """
    video, question = pair
    if not video.copies:
        raise UserError(f"{video.name} is no mp4, and only of those there can be copies: give another --video")
    with asyncio.Runner() as runner:
        client = ServerClient(url, key)
        try:
            workload = Workload([pair], runner.run(client.model()), max_tokens)

            def served(body: bytes) -> ServedAnswer:
                answer = runner.run(client.ask(body, stream=False))
                if not answer.good:
                    raise UserError(f"{client.url} does not answer ({answer.status} {answer.text})")
                return answer

            path = folder / "added.mp4"
            path.write_bytes(video.content)
            with pipeline.watch(path) as watched:
                known = in_turn(
                    lambda: workload.known(0, stream=False).body,
                    served,
                    lambda: watched.ask(question, max_new_tokens=max_tokens).text,
                    warmup,
                    repeats,
                )
            fresh = in_turn(
                lambda: workload.fresh(0, stream=False).body,
                served,
                lambda: pipeline.ask(path, question, max_new_tokens=max_tokens).text,
                warmup,
                repeats,
            )
            return {"known": known, "fresh": fresh, "body_bytes": len(workload.known(0, stream=False).body)}
        finally:
            runner.run(client.__aexit__(None, None, None))


def in_turn(
    body: Callable[[], bytes],
    serve: Callable[[bytes], ServedAnswer],
    ask: Callable[[], str],
    warmup: int,
    repeats: int,
) -> dict[str, Any]:
    """Both sides, each first in every second turn, as the first may affect the second; bodies are made untimed."""
    pairs: list[tuple[float, float]] = []
    outside: list[float] = []
    differ = 0
    for turn in range(warmup + repeats):
        request = body()
        if turn % 2:
            text, asked = _timed(ask)
            answer, seconds = _timed(lambda request=request: serve(request))  # type: ignore[misc]
        else:
            answer, seconds = _timed(lambda request=request: serve(request))  # type: ignore[misc]
            text, asked = _timed(ask)
        if turn < warmup:
            continue
        differ += answer.text != text
        pairs.append((seconds, asked))
        if answer.inside is not None:
            outside.append(seconds - answer.inside)
    return {
        "repeats": repeats,
        "served": spread([one for one, _ in pairs]),
        "pipeline": spread([one for _, one in pairs]),
        "added": spread([one - other for one, other in pairs]),
        "added_quiet": float(
            np.percentile([one for one, _ in pairs], 10) - np.percentile([one for _, one in pairs], 10)
        ),
        "outside_engine": spread(outside),
        "different_answers": differ,
    }


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    found = call()
    return found, time.perf_counter() - started
