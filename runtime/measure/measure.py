"""Requests stage by stage, variants taking turns, and load from several clients.

The stages of a request, in order; on a GPU each one ends when the device has done it, so nothing overlaps and the
stages add up to the time to the first token:

    decode        open the video and decode the sampled frames
    preprocess    resize them, on the host
    copy          frames to the device, scaled and normalised there (engines that do that themselves: only their part)
    vision        frames to visual tokens
    splice        embeddings of the question around them
    prefill       the decoder on the prompt, up to the first id on the host
    first_token   that id to text
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.measure.clock import Laps, percentiles
from runtime.measure.load import clients as asking
from runtime.measure.variants import Bench, Variant
from runtime.text.prompt import splice
from runtime.text.stream import TextStream
from runtime.video import Clip, load_clip

STAGES = ("decode", "preprocess", "copy", "vision", "splice", "prefill", "first_token")


@dataclass(frozen=True)
class MeasuredRequest:
    """One answered request; seconds.

    Attributes:
        stages: of each of `STAGES`.
        ttft: time to the first token, from the call.
        tpot: mean time of each further token.
        total: from the call to the last token.
        tokens: the answer's ids.
        visual_tokens: N, without what closes them.
        frames_per_stage: frames before the first merge and after each one.
    """

    stages: dict[str, float]
    ttft: float
    tpot: float
    total: float
    tokens: tuple[int, ...]
    visual_tokens: int
    frames_per_stage: tuple[int, ...]


class VariantRunner:
    """Answers one question about one video, `new_tokens` ids long, with any variant."""

    def __init__(self, bench: Bench, video: Path, new_tokens: int) -> None:
        self.bench, self.video, self.new_tokens = bench, video, new_tokens

    def clip(self, variant: Variant) -> Clip:
        """The video, decoded and resized for a variant."""
        prepared = self.bench.checkpoint.preprocessing
        return load_clip(self.video, variant.frames, prepared.size, sampling=prepared.sampling)

    def answer(self, variant: Variant, clip: Clip | None = None) -> MeasuredRequest:
        """One request; a clip that was decoded before takes no time."""
        bench = self.bench
        laps = Laps(bench.device, STAGES)
        if clip is None:
            clip = self.clip(variant)
            laps("decode")
            laps.seconds["decode"] -= clip.preprocess_seconds
            laps.seconds["preprocess"] = clip.preprocess_seconds
        ready = variant.copy(clip.frames)
        laps("copy")
        seen = variant.see(ready)
        laps("vision")
        visual = seen.tokens
        if not seen.closed:
            visual = bench.closings.closed(visual, seen.positions, bench.closing)
        words = bench.prompt.at(clip.times(bench.checkpoint.preprocessing.sampling))
        embeds = splice(words, visual, variant.decoding.embed, bench.spans(seen))
        told = bench.told(words, seen, embeds.shape[2])
        laps("splice")
        with closing(variant.decoding.stream(embeds, self.new_tokens, told)) as source:
            ids = [next(source)]
            laps("prefill")
            text = TextStream(bench.tokenizer)
            text.push(ids[0])
            laps("first_token")
            ttft, begun = laps.elapsed, time.perf_counter()
            for token in source:
                ids.append(token)
                text.push(token)
            decoding = time.perf_counter() - begun
        return MeasuredRequest(
            laps.seconds,
            ttft,
            decoding / (len(ids) - 1),
            ttft + decoding,
            tuple(ids),
            len(seen.tokens) - seen.closed,
            seen.frames_per_stage,
        )


def interleaved(
    runner: VariantRunner, variants: Sequence[Variant], *, warmup: int, repeats: int
) -> tuple[list[float], list[list[MeasuredRequest]]]:
    """Let variants take turns, so that what disturbs the machine disturbs all of them.

    Returns, for each variant, the seconds to the first token of its very first request (of the warm-up, NaN without
    one), and the requests that count. Who begins changes from round to round.
    """
    first = [float("nan")] * len(variants)
    for turn in range(warmup):
        for index, variant in enumerate(variants):
            request = runner.answer(variant)
            first[index] = first[index] if turn else request.ttft
    found: list[list[MeasuredRequest]] = [[] for _ in variants]
    for turn in range(repeats):
        for offset in range(len(variants)):
            index = (turn + offset) % len(variants)
            found[index].append(runner.answer(variants[index]))
    return first, found


@dataclass(frozen=True)
class Load:
    """What `clients` clients saw, each of which sends a request as soon as its last one was answered."""

    clients: int
    requests: int
    seconds: float
    ttft: tuple[float, ...]
    total: tuple[float, ...]


def under_load(runner: VariantRunner, variant: Variant, clients: int, requests: int) -> Load:
    """Answer `requests` requests of `clients` clients.

    The model answers one request at a time, in the order in which they come. A client decodes and resizes its video
    itself, which overlaps with the requests of others, and then waits in line; its times include that.
    """
    line: queue.Queue[tuple[float, Clip | BaseException, threading.Event]] = queue.Queue()
    ended = threading.Event()

    def ask(_: int) -> None:
        begun, done = time.perf_counter(), threading.Event()
        try:
            line.put((begun, runner.clip(variant), done))
        except BaseException as error:  # who serves is waiting for something in the line
            line.put((begun, error, done))
            raise
        while not (done.wait(0.1) or ended.is_set()):  # not for ever: another client's video may have ended it all
            pass

    started = time.perf_counter()
    ttft, total = [], []
    with asking(clients, requests, ask):
        try:
            for _ in range(requests):
                begun, clip, done = line.get()
                if isinstance(clip, BaseException):
                    raise clip
                waited = time.perf_counter() - begun
                request = runner.answer(variant, clip)
                done.set()
                ttft.append(waited + request.ttft)
                total.append(waited + request.total)
        finally:
            ended.set()
    return Load(clients, requests, time.perf_counter() - started, tuple(ttft), tuple(total))


def summary(requests: Sequence[MeasuredRequest]) -> dict[str, Any]:
    """The figures of one variant, seconds."""
    return {
        "ttft": percentiles([request.ttft for request in requests]),
        "stages": {name: percentiles([request.stages[name] for request in requests]) for name in STAGES},
        "tpot": percentiles([request.tpot for request in requests]),
        "total": percentiles([request.total for request in requests]),
        "visual_tokens": requests[-1].visual_tokens,
        "frames_per_stage": list(requests[-1].frames_per_stage),
    }
