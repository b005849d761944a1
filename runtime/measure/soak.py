"""Many requests on one pipeline: does its memory stay where it is? `python -m runtime.bench --soak N`.

Several clients, each with a request under way at any time, ask the same question about a clip that was decoded once;
every other request is read token by token. Memory is what the process has resident (and what PyTorch has allocated on a
GPU), sampled between requests after a warm-up, in which caches fill and the allocators find their size. Nothing is
given back by hand in between, so what a request leaves behind is in the figures, fragmentation included.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.measure.arguments import BenchSettings
from runtime.measure.load import clients as asking
from runtime.measure.load import conditions, opened
from runtime.measure.memory import resident
from runtime.pipeline import Pipeline
from runtime.trace import Trace
from runtime.video import Clip, load_clip

SAMPLES = 200  # during the run, at most
MOST_WARMUP = 500


@dataclass(frozen=True)
class MemorySample:
    """Bytes after so many requests; None where there is no such figure."""

    requests: int
    rss: int | None
    cuda: int | None


@dataclass(frozen=True)
class Soak:
    """What `requests` requests of `clients` clients took, after a warm-up, and memory from its end on."""

    requests: int
    clients: int
    warmup: int
    seconds: float
    samples: tuple[MemorySample, ...]

    def memory(self, kind: str) -> dict[str, float] | None:
        """First, last and peak bytes of "rss" or "cuda", and how many they grew by in a thousand requests."""
        values = [getattr(sample, kind) for sample in self.samples]
        if None in values:
            return None
        growth = (values[-1] - values[0]) / self.requests * 1000
        return {"first": values[0], "last": values[-1], "peak": max(values), "growth_per_thousand": growth}


def soak(pipeline: Pipeline, clip: Clip, question: str, *, requests: int, clients: int, new_tokens: int) -> Soak:
    """Ask `requests` times, after a tenth as many that do not count.

    Args:
        pipeline: one in whose line `clients` requests may wait.
    """
    warmup = min(MOST_WARMUP, max(1, requests // 10))
    _ask(pipeline, clip, question, warmup, clients, new_tokens, every=warmup)
    gc.collect()
    samples = [_sample(0, pipeline)]
    started = time.perf_counter()
    samples += _ask(pipeline, clip, question, requests, clients, new_tokens, every=max(1, requests // SAMPLES))
    seconds = time.perf_counter() - started
    gc.collect()
    return Soak(requests, clients, warmup, seconds, (*samples, _sample(requests, pipeline)))


def _ask(
    pipeline: Pipeline, clip: Clip, question: str, requests: int, clients: int, new_tokens: int, every: int
) -> list[MemorySample]:
    lock = threading.Lock()
    samples: list[MemorySample] = []

    def ask(number: int) -> None:
        if number % 2:
            pipeline.ask(clip, question, max_new_tokens=new_tokens)
        else:
            for _ in pipeline.stream(clip, question, max_new_tokens=new_tokens):
                pass
        if number % every == 0:
            with lock:
                samples.append(_sample(number, pipeline))

    with asking(clients, requests, ask):
        pass  # they are all there is
    return samples


def _sample(requests: int, pipeline: Pipeline) -> MemorySample:
    decoder = pipeline.decoder
    on_gpu = decoder is not None and decoder.device.type == "cuda"
    return MemorySample(requests, resident(), torch.cuda.memory_allocated() if on_gpu else None)


def measure(asked: BenchSettings, video: Path, trace: Trace) -> dict[str, Any]:
    """Load an engine, soak it as `asked` say and show the result; the record of the JSON line."""
    requests = asked.soak or 0
    with opened(asked, waiting=asked.soak_clients) as pipeline:
        manifest = pipeline.manifest
        prepared = manifest.model.preprocessing
        clip = load_clip(video, manifest.frames, prepared.size, sampling=prepared.sampling)
        trace.line(f"{manifest.name} ({pipeline.vision.name}), {asked.soak} requests of {asked.soak_clients} ...")
        found = soak(
            pipeline,
            clip,
            asked.question,
            requests=requests,
            clients=asked.soak_clients,
            new_tokens=asked.max_new_tokens,
        )
        record = {
            "soak": found.requests,
            "clients": found.clients,
            "warmup": found.warmup,
            "new_tokens": asked.max_new_tokens,
            "seconds": found.seconds,
            "requests_per_second": found.requests / found.seconds,
            "rss": found.memory("rss"),
            "cuda": found.memory("cuda"),
            "samples": [dataclasses.asdict(sample) for sample in found.samples],
            **conditions(asked, pipeline),
        }
    trace.line(_line(record))
    return record


def _line(record: dict[str, Any]) -> str:
    parts = [f"{record['requests_per_second']:.1f} requests/s"]
    for name, kind in (("resident", "rss"), ("on the GPU", "cuda")):
        if (found := record[kind]) is not None:
            first, last, peak = (found[key] / 2**20 for key in ("first", "last", "peak"))
            parts.append(f"{name} {first:.1f} MiB at first, {last:.1f} at last, {peak:.1f} at most")
            if record["soak"] >= 1000:  # of fewer it would be a guess
                parts[-1] += f", {found['growth_per_thousand'] / 2**10:+.1f} KiB in a thousand requests"
    return "; ".join(parts)
