"""Requests stage by stage, interleaved between variants, and load from several clients.

The stages of a request, in order; on a GPU each one ends with a device synchronisation, so that they do not overlap and
add up to TTFT:

    decode        open the video and decode the sampled frames
    preprocess    resize them, on the host
    copy          frames to the device, scaled and normalised there (engines do the latter, or both, in `vision`)
    vision        frames to visual tokens
    splice        the prompt's embeddings, with visual tokens
    prefill       the decoder on the prompt, up to the first id on the host
    first_token   detokenisation of that id
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
        stages: by name, see `STAGES`.
        ttft: time to first token.
        tpot: mean time per output token after the first.
        total: from the call to the last token.
        tokens: the answer's ids.
        visual_tokens: N, without closing tokens.
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
    """Answers one question about one video with any variant, in `new_tokens` tokens."""

    def __init__(self, bench: Bench, video: Path, new_tokens: int) -> None:
        self.bench, self.video, self.new_tokens = bench, video, new_tokens

    def clip(self, variant: Variant) -> Clip:
        """The video, decoded and resized for a variant."""
        prepared = self.bench.checkpoint.preprocessing
        return load_clip(self.video, variant.frames, prepared.size, sampling=prepared.sampling)

    def answer(self, variant: Variant, clip: Clip | None = None) -> MeasuredRequest:
        """Answer one request; with `clip`, "decode" and "preprocess" take 0 s."""
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
    """Interleave the variants, so that other load on the machine affects all; each round begins with another one.

    Returns, for each variant, the TTFT of its first warm-up request (NaN without warm-up), and the measured requests.
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
    """A closed loop of `clients` clients; `seconds` is its duration, `ttft` and `total` are each request's seconds."""

    clients: int
    requests: int
    seconds: float
    ttft: tuple[float, ...]
    total: tuple[float, ...]


def under_load(runner: VariantRunner, variant: Variant, clients: int, requests: int) -> Load:
    """Answer `requests` requests of `clients` clients.

    The model answers one request at a time, first come, first served. Each client decodes and resizes its video, in
    parallel with others, and then waits in line; its times include both.
    """
    line: queue.Queue[tuple[float, Clip | BaseException, threading.Event]] = queue.Queue()
    ended = threading.Event()

    def ask(_: int) -> None:
        begun, done = time.perf_counter(), threading.Event()
        try:
            line.put((begun, runner.clip(variant), done))
        except BaseException as error:  # the serving loop waits for an item in the queue
            line.put((begun, error, done))
            raise
        while not (done.wait(0.1) or ended.is_set()):  # an error of another client may have ended the loop
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
