"""Memory growth over many requests on one pipeline: `python -m runtime.bench --soak N`.

Several clients in a closed loop ask the same question about a clip decoded once; every second request is streamed. The
process's resident memory (and PyTorch's allocations on a GPU) is sampled after requests, once a warm-up has filled
caches and allocators. Nothing is trimmed in between, so leaks and fragmentation show.
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

SAMPLES = 200  # about, during the run
MOST_WARMUP = 500


@dataclass(frozen=True)
class MemorySample:
    """Bytes after `requests` requests; None if not available."""

    requests: int
    rss: int | None
    cuda: int | None


@dataclass(frozen=True)
class Soak:
    """A soak: its seconds after the warm-up, and memory from the warm-up's end on."""

    requests: int
    clients: int
    warmup: int
    seconds: float
    samples: tuple[MemorySample, ...]

    def memory(self, kind: str) -> dict[str, float] | None:
        """First, last and peak bytes of "rss" or "cuda", and their growth per thousand requests."""
        values = [getattr(sample, kind) for sample in self.samples]
        if None in values:
            return None
        growth = (values[-1] - values[0]) / self.requests * 1000
        return {"first": values[0], "last": values[-1], "peak": max(values), "growth_per_thousand": growth}


def soak(pipeline: Pipeline, clip: Clip, question: str, *, requests: int, clients: int, new_tokens: int) -> Soak:
    """Ask `requests` times, after a warm-up of a tenth as many, at most `MOST_WARMUP`.

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
    """Load an engine, soak it and show the result; returns the record of the JSON line."""
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
