"""The comparison of variants: `python -m runtime.bench` without --vision-only, --service, --soak and --serve.

One process, one set of weights, one question about one video. Requests of the variants (`runtime.measure.variants`) are
interleaved after a warm-up; then memory, throughput, scaling and the compression's share are measured.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from earlytom.config import EarlyTomConfig
from runtime.checkpoint import describe
from runtime.checkpoint.precision import fitting_dtype
from runtime.engine.dtypes import DTYPES
from runtime.engine.manifest import Manifest
from runtime.measure import report
from runtime.measure.arguments import BenchSettings
from runtime.measure.clock import matmul_rate
from runtime.measure.measure import VariantRunner, interleaved, under_load
from runtime.measure.memory import peak_memory
from runtime.measure.overhead import compression_share
from runtime.measure.variants import Bench, Variant, read_engine, settings
from runtime.measure.vision.products import float_peak, integer_peak
from runtime.trace import Trace


@dataclass(frozen=True)
class Prepared:
    """A checked comparison, ready to be measured.

    Attributes:
        asked: the settings, without impossible variants.
        config: of variants in PyTorch.
        precision: name of the dtype of variants in PyTorch.
        missing: what was left out, and why.
    """

    asked: BenchSettings
    bench: Bench
    config: EarlyTomConfig
    frames: int
    precision: str
    variants: Sequence[Variant]
    missing: Sequence[str]

    @property
    def machine(self) -> str:
        device = self.bench.device
        return (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )


def prepare(asked: BenchSettings, trace: Trace) -> Prepared:
    """Load the model and the engines, check that they match, and print what will be compared."""
    checkpoint = describe(asked.model)
    if checkpoint.family.any_size and asked.engine:  # all variants see what the engine does
        checkpoint = checkpoint.sized(Manifest.read(asked.engine[0]).model.preprocessing.size)
    frames = asked.frames or checkpoint.frames
    config = settings(checkpoint, asked.ratio, asked.merge_layers, asked.tau)
    device, dtype, note = torch.device(asked.device), DTYPES.get(asked.dtype or ""), None
    if dtype is None:
        dtype, note = fitting_dtype(checkpoint, whole=True)
    precision = next(name for name, one in DTYPES.items() if one == dtype)
    manifests = [read_engine(folder, checkpoint, frames) for folder in asked.engine]  # before a model is loaded
    bench = Bench(checkpoint, asked.question, device, dtype, int8=asked.decoder_dtype is not None)
    for count in (frames, *asked.scale_frames):
        bench.check(count, asked.max_new_tokens)
    missing: list[str] = []
    if "naive" in asked.variants and not bench.family.released:
        asked = dataclasses.replace(asked, variants=tuple(name for name in asked.variants if name != "naive"))
        missing.append(f"naive: EarlyTom was not released for {bench.family.title}")
    variants = [bench.variant(name, config, frames) for name in asked.variants]
    for ratio in asked.scale_ratios:  # a method that does not have it is refused now
        for one in asked.variants:
            bench.variant(one, config.replace(retention_ratio=ratio), frames)
    for folder, manifest in zip(asked.engine, manifests, strict=True):
        found, left_out = bench.engines(folder, manifest)
        variants += found
        missing += left_out
    prepared = Prepared(asked, bench, config, frames, precision, variants, missing)
    trace.line(f"{checkpoint.source}, {frames} frames, {precision}, {prepared.machine}, torch {torch.__version__}")
    if note is not None:
        trace.line(f"note: {note}")
    for variant in variants:
        trace.line(f"  {variant.name}: {variant.about}")
    for reason in missing:
        trace.line(f"  left out: {reason}")
    return prepared


def measure(prepared: Prepared, video: Path, trace: Trace) -> dict[str, Any]:
    """Run all measurements; returns the record of the JSON line."""
    asked, bench, config, frames = prepared.asked, prepared.bench, prepared.config, prepared.frames
    checkpoint, device, dtype, variants = bench.checkpoint, bench.device, bench.dtype, prepared.variants
    runner = VariantRunner(bench, video, asked.max_new_tokens)
    trace.line("measuring requests in turn ...")
    rates = [matmul_rate(device, dtype)]
    on_cpu = device.type == "cpu"  # ONNX Runtime's peaks are a CPU's
    if on_cpu and dtype == torch.float32:
        rates.append(float_peak(checkpoint, frames))
    integer = integer_peak(checkpoint, frames) if on_cpu and any(variant.int8 for variant in variants) else None
    first, requests = interleaved(runner, variants, warmup=asked.warmup, repeats=asked.repeats)
    rates.append(matmul_rate(device, dtype))
    trace.line("measuring memory, throughput, scaling, compression ...")
    memories = [peak_memory(lambda one=variant: runner.answer(one), device) for variant in variants]  # type: ignore[misc]
    throughput = [
        report.load_record(variant, under_load(runner, variant, clients, max(clients, asked.requests)))
        for clients in asked.concurrency
        for variant in variants
    ]
    scaling = measure_scaling(runner, asked, config, frames)
    compression = measure_compression(runner, variants, asked.scale_repeats)
    peak = max(*rates, matmul_rate(device, dtype))  # other load can only lower it
    records = [
        report.variant_record(bench, *each, peak, integer)
        for each in zip(variants, requests, first, memories, strict=True)
    ]
    return {
        "model": checkpoint.source,
        "trained": checkpoint.trained,
        "device": prepared.machine,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "dtype": prepared.precision,
        "frames": frames,
        "question": asked.question,
        "new_tokens": asked.max_new_tokens,
        "warmup": asked.warmup,
        "repeats": asked.repeats,
        "scale_repeats": asked.scale_repeats,
        "matmul": peak,
        "integer_matmul": integer,
        "variants": records,
        "left_out": prepared.missing,
        "throughput": throughput,
        "scaling": scaling,
        "gains": report.gains(records, compression),
    }


def measure_scaling(
    runner: VariantRunner, asked: BenchSettings, config: EarlyTomConfig, frames: int
) -> dict[str, list[dict[str, Any]]]:
    """Scaling over frames and over ratios, without engines, whose shapes are fixed.

    "full" does not depend on the ratio, so it is in the first curve only.
    """

    def points(names: Sequence[str], at: EarlyTomConfig, count: int) -> list[dict[str, Any]]:
        variants = [runner.bench.variant(name, at, count) for name in names]
        _, found = interleaved(runner, variants, warmup=1, repeats=asked.scale_repeats)
        return [report.point_record(*each) for each in zip(variants, found, strict=True)]

    compressed = [name for name in asked.variants if name != "full"]
    return {
        "frames": [point for count in asked.scale_frames for point in points(asked.variants, config, count)],
        "ratios": [
            point
            for ratio in asked.scale_ratios
            for point in points(compressed, config.replace(retention_ratio=ratio), frames)
        ],
    }


def measure_compression(runner: VariantRunner, variants: Sequence[Variant], repeats: int) -> dict[str, float]:
    """The compression's share of the encoder's time, for "adaptive" and "budget" as far as they are measured."""
    return {
        variant.name: compression_share(
            runner.bench, variant.config, variant.copy(runner.clip(variant).frames), repeats
        )
        for variant in variants
        if variant.name in ("adaptive", "budget") and isinstance(variant.config, EarlyTomConfig)
    }
