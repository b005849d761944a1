"""The vision parts of engines alone, interleaved: `python -m runtime.bench --vision-only`.

No model is loaded, so that engines can be compared whose decoder does not fit into memory. The frames of one video are
decoded once and then encoded by each engine in turn, after a warm-up. The peaks are measured in the same run; that of
floats is the best fp32 product in PyTorch and, on a CPU, in ONNX Runtime.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint import Checkpoint, describe
from runtime.engine.manifest import Manifest
from runtime.measure import report
from runtime.measure.arguments import BenchSettings
from runtime.measure.clock import matmul_rate, percentiles, timed
from runtime.measure.variants import name_of, open_engine, read_engine
from runtime.measure.vision.products import float_peak, integer_peak
from runtime.trace import Trace
from runtime.video import load_clip
from runtime.vision import VisionBackend, encode_one


def measure(asked: BenchSettings, video: Path, trace: Trace) -> dict[str, Any]:
    """The record of the JSON line: seconds, operations and shares of the peaks of every engine."""
    checkpoint, device = describe(asked.model), torch.device(asked.device)
    first = Manifest.read(asked.engine[0], verify_files=False)
    if checkpoint.family.any_size:
        checkpoint = checkpoint.sized(first.model.preprocessing.size)
    count = asked.frames or first.frames
    engines: list[tuple[Manifest, str, VisionBackend]] = []
    missing: list[str] = []
    for folder in asked.engine:
        manifest = read_engine(folder, checkpoint, count)
        opened, left_out = open_engine(folder, manifest)
        engines += [(manifest, backend, vision) for backend, vision in opened.items()]
        missing += left_out
    given = checkpoint.preprocessing
    frames = load_clip(video, count, given.size, sampling=given.sampling).frames.contiguous()
    trace.line(f"{checkpoint.source}, {count} frames, the vision parts alone, {torch.get_num_threads()} threads")
    for reason in missing:
        trace.line(f"  left out: {reason}")
    on_cpu = device.type == "cpu"  # ONNX Runtime's peaks are a CPU's
    floats = [matmul_rate(device, torch.float32), *([float_peak(checkpoint, count)] if on_cpu else [])]
    whole = on_cpu and any(manifest.int8 is not None for manifest, _, _ in engines)
    integers = [integer_peak(checkpoint, count)] if whole else []
    seconds = in_turns([vision for _, _, vision in engines], frames, asked.warmup, asked.repeats)
    floats.append(matmul_rate(device, torch.float32))  # other load can only lower it
    integers += [integer_peak(checkpoint, count)] if whole else []
    peak, integer = max(floats), max(integers, default=None)
    return {
        "model": checkpoint.source,
        "frames": count,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "warmup": asked.warmup,
        "repeats": asked.repeats,
        "matmul": peak,
        "integer_matmul": integer,
        "engines": [
            engine_record(checkpoint, manifest, backend, taken, peak, integer)
            for (manifest, backend, _), taken in zip(engines, seconds, strict=True)
        ],
        "left_out": missing,
    }


def in_turns(visions: Sequence[VisionBackend], frames: Tensor, warmup: int, repeats: int) -> list[list[float]]:
    """The seconds of each engine's `repeats` requests; each round begins with another engine."""
    found: list[list[float]] = [[] for _ in visions]
    for turn in range(warmup + repeats):
        for offset in range(len(visions)):
            index = (turn + offset) % len(visions)
            vision = visions[index]
            _, seconds = timed(vision.device, functools.partial(encode_one, vision, frames.to(vision.device)))
            if turn >= warmup:
                found[index].append(seconds)
    return found


def engine_record(
    checkpoint: Checkpoint,
    manifest: Manifest,
    backend: str,
    seconds: Sequence[float],
    peak: float,
    integer: float | None,
) -> dict[str, Any]:
    """The figures of one engine; flops by `earlytom.flops`, whatever the precision."""
    config: Any = checkpoint.config
    work = checkpoint.family.vision_flops(config, manifest.frames_per_stage, manifest.settings.merge_layers)
    taken = percentiles(seconds)
    rate = work / taken["p50"]
    return {
        "name": name_of(manifest, backend),
        "engine": manifest.name,
        "frames_per_stage": list(manifest.frames_per_stage),
        "seconds": taken,
        "flops": work,
        "rate": rate,
        "of_peak": rate / peak,
        "of_integer_peak": rate / integer if manifest.int8 is not None and integer else None,
    }


def show(trace: Trace, record: dict[str, Any]) -> None:
    """Print one table, with the peaks and the speed-up over the first engine."""
    engines = record["engines"]
    rows = [
        (
            one["name"],
            f"{one['seconds']['p50']:.3f}",
            f"{one['seconds']['p90']:.3f}",
            f"{one['flops'] / 1e12:.3f}",
            f"{one['rate'] / 1e12:.3f}",
            f"{one['of_peak']:.0%}",
            "-" if one["of_integer_peak"] is None else f"{one['of_integer_peak']:.0%}",
            f"{engines[0]['seconds']['p50'] / one['seconds']['p50']:.2f}x",
        )
        for one in engines
    ]
    columns = ("engine", "s p50", "p90", "TFLOP", "TFLOP/s", "of peak", "of integer peak", "sooner")
    peak = f"peak: {record['matmul'] / 1e12:.3g} TFLOP/s, the best fp32 matrix product"
    trace.table(columns, rows, title=f"the vision part alone, {record['repeats']} requests in turns ({peak})")
    if record["integer_matmul"] is not None:
        trace.line(report.integer_line(record["integer_matmul"], record["matmul"]))
