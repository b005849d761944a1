"""Latency and throughput of a pipeline as a service uses it: `python -m runtime.bench --service`.

One engine, one question, through `Pipeline`:

    fresh       a video file, not cached
    ready       a clip decoded and resized before
    watched     every question about a watched video
    live        a video pushed frame by frame, asked about after its last frame (engines with --chunk)

and many callers with video files, where the next video is decoded while one is answered. Live frames come at 1.25 times
the measured time that the head takes for one, so that they do not queue.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.measure.arguments import BenchSettings
from runtime.measure.clock import median, percentiles, timed
from runtime.measure.load import clients, conditions, opened
from runtime.pipeline import Pipeline
from runtime.service.requests import Answer
from runtime.trace import Trace
from runtime.video import Clip, load_clip
from runtime.vision.chunked import ChunkedVision

STAGES = ("decode", "preprocess", "vision", "prefill", "first_token")


class Service:
    """A loaded pipeline, a video and a question about it."""

    def __init__(self, pipeline: Pipeline, video: Path, question: str, new_tokens: int) -> None:
        self.pipeline, self.video, self.question = pipeline, video, question
        self.how: dict[str, Any] = {"max_new_tokens": new_tokens}
        prepared = pipeline.manifest.model.preprocessing
        self.clip: Clip = load_clip(video, pipeline.manifest.frames, prepared.size, sampling=prepared.sampling)

    def fresh(self) -> Answer:
        return self.pipeline.ask(self.video, self.question, **self.how)

    def ready(self) -> Answer:
        return self.pipeline.ask(self.clip, self.question, **self.how)

    def watched(self, repeats: int) -> tuple[float, list[Answer], int]:
        """Seconds of `Pipeline.watch`, the answers after it, and the bytes kept for the video."""
        started = time.perf_counter()
        with self.pipeline.watch(self.clip) as watched:
            seconds = time.perf_counter() - started
            answers = [watched.ask(self.question, **self.how) for _ in range(repeats)]
            return seconds, answers, self.pipeline.watched.counters.bytes

    def live(self, vision: ChunkedVision, repeats: int) -> dict[str, Any]:
        """Live frames: median seconds from the last frame to the visual tokens and to the first token."""
        frames = self.clip.frames
        pace = 1.25 * self._head_seconds(vision) / vision.chunk
        left, first, share = [], [], []
        for turn in range(repeats + 1):
            with self.pipeline.open_stream(total=len(frames)) as video:
                for frame in frames[:-1]:
                    video.push(frame)
                    time.sleep(pace)
                last = time.perf_counter()
                video.push(frames[-1])
                timings = video.finish()
                answer = video.ask(self.question, **self.how)
                if turn:  # the first one allocates
                    left.append(timings.after_last_frame)
                    share.append(timings.share)
                    first.append(time.perf_counter() - last - answer.timings.total + answer.timings.first_token)
        return {
            "seconds_between_frames": pace,
            "after_last_frame": median(left),
            "first_token_after_last_frame": median(first),
            "share_before": median(share),
            "chunk": vision.chunk,
        }

    def _head_seconds(self, vision: ChunkedVision) -> float:
        """Median seconds of the head on a chunk."""
        seconds = []
        with vision.begin() as clip:
            for some in self.clip.frames.split(vision.chunk):
                seconds.append(timed(clip.device, functools.partial(clip.push, some))[1])
        return median(seconds)

    def callers(self, count: int, requests: int) -> dict[str, Any]:
        """`requests` requests of `count` callers in a closed loop."""
        answers: list[Answer] = []
        started = time.perf_counter()
        with clients(count, requests, lambda _: answers.append(self.fresh())):
            pass  # they are all there is
        seconds = time.perf_counter() - started
        return {
            "callers": count,
            "requests": requests,
            "requests_per_second": requests / seconds,
            "first_token": percentiles([answer.timings.first_token for answer in answers]),
            "waiting": percentiles([answer.timings.waiting for answer in answers]),
        }


def measure(asked: BenchSettings, video: Path, trace: Trace) -> dict[str, Any]:
    """Load an engine, measure it and show the result; returns the record of the JSON line."""
    with opened(asked, waiting=max(asked.concurrency, default=1)) as pipeline:
        manifest = pipeline.manifest
        trace.line(f"{manifest.name} ({pipeline.vision.name}), {manifest.frames} frames, {manifest.tokens} tokens ...")
        service = Service(pipeline, video, asked.question, asked.max_new_tokens)
        requests = {"fresh": _in_turn(service.fresh, asked), "ready": _in_turn(service.ready, asked)}
        reading, requests["watched"], kept = service.watched(asked.repeats)
        vision = pipeline.vision
        record = {
            "service": {name: _stages(answers) for name, answers in requests.items()},
            "watch_seconds": reading,
            "watched_bytes": kept,
            "live": service.live(vision, asked.repeats) if isinstance(vision, ChunkedVision) else None,
            "callers": [service.callers(count, max(count, asked.requests)) for count in asked.concurrency],
            "new_tokens": asked.max_new_tokens,
            "repeats": asked.repeats,
            **conditions(asked, pipeline),
        }
    show(trace, record)
    return record


def _in_turn(call: Callable[[], Answer], asked: BenchSettings) -> list[Answer]:
    answers = [call() for _ in range(asked.warmup + asked.repeats)]
    return answers[asked.warmup :]


def _stages(answers: list[Answer]) -> dict[str, float]:
    """Medians, seconds."""
    return {name: median([getattr(answer.timings, name) for answer in answers]) for name in STAGES}


def show(trace: Trace, record: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [(name, *(f"{1000 * stages[stage]:.1f}" for stage in STAGES)) for name, stages in record["service"].items()]
    words = [stage.replace("_", " ") for stage in STAGES]
    trace.table(("request", *words), rows, f"ms (medians of {record['repeats']} requests, one at a time)")
    trace.line(f"to watch a video: {1000 * record['watch_seconds']:.1f} ms, {record['watched_bytes']:,} bytes kept")
    if (live := record["live"]) is not None:
        trace.line(
            f"live, a frame every {1000 * live['seconds_between_frames']:.1f} ms: visual tokens "
            f"{1000 * live['after_last_frame']:.1f} ms and the first token "
            f"{1000 * live['first_token_after_last_frame']:.1f} ms after the last frame, {live['share_before']:.0%} of "
            f"the first layers' work done before it"
        )
    if record["callers"]:
        found = [
            (
                one["callers"],
                f"{one['requests_per_second']:.2f}",
                *(f"{1000 * one['first_token'][p]:.1f}" for p in ("p50", "p90", "p99")),
                f"{1000 * one['waiting']['p50']:.1f}",
            )
            for one in record["callers"]
        ]
        columns = ("callers", "requests/s", "first token p50", "p90", "p99", "of it in line p50")
        trace.table(columns, found, "callers in the pipeline's line, each with a video file; ms")
