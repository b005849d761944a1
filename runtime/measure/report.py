"""Results as tables, in milliseconds, and as the JSON line, in seconds and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.measure.clock import median, percentiles
from runtime.measure.measure import STAGES, Load, MeasuredRequest, summary
from runtime.measure.memory import Memory
from runtime.measure.variants import Bench, Variant
from runtime.trace import Trace

Record = dict[str, Any]
QUANTILES = ("p50", "p90", "p99")


def variant_record(
    bench: Bench,
    variant: Variant,
    requests: Sequence[MeasuredRequest],
    first: float,
    memory: Memory,
    peak: float,
    integer_peak: float | None = None,
) -> Record:
    """The figures of one variant.

    Args:
        first: TTFT of the first warm-up request; NaN without warm-up.
        peak, integer_peak: flops a second of a matrix product, and of one in int8 (None if not measured). Shares of
            them count the variant's flops by `earlytom.flops` over the median time of their stage.
    """
    found = summary(requests)
    vision, prefill = bench.arithmetic(tuple(found["frames_per_stage"]), found["visual_tokens"], variant.config)
    stages = found["stages"]
    return {
        "name": variant.name,
        "about": variant.about,
        "engine": variant.folder,
        "earlytom": variant.config.to_dict(),
        **found,
        "first_ttft": None if first != first else first,  # NaN: there was no warm-up
        "memory": dataclasses.asdict(memory),
        "flops": {"vision": vision, "prefill": prefill},
        "of_peak": {
            "vision": vision / stages["vision"]["p50"] / peak,
            "prefill": prefill / stages["prefill"]["p50"] / peak,
        },
        "of_integer_peak": vision / stages["vision"]["p50"] / integer_peak if variant.int8 and integer_peak else None,
    }


def load_record(variant: Variant, load: Load) -> Record:
    """Throughput and latencies at one concurrency."""
    return {
        "name": variant.name,
        "clients": load.clients,
        "requests": load.requests,
        "requests_per_second": load.requests / load.seconds,
        "ttft": percentiles(load.ttft),
        "total": percentiles(load.total),
    }


def point_record(variant: Variant, requests: Sequence[MeasuredRequest]) -> Record:
    """One point of a scaling curve, medians in seconds."""
    return {
        "name": variant.name,
        "frames": variant.frames,
        "ratio": variant.config.retention_ratio,
        "visual_tokens": requests[-1].visual_tokens,
        "ttft": median([request.ttft for request in requests]),
        **{name: median([request.stages[name] for request in requests]) for name in ("vision", "prefill")},
    }


def gains(variants: Sequence[Mapping[str, Any]], compression: Mapping[str, float]) -> Record:
    """The gains by compression, from medians; None if a variant needed for one was not measured.

    `vision_of_flops` is the vision speed-up of the budget schedule over the one that its flops alone would give;
    `compression` is the compression's share of the encoder's time, by schedule.
    """
    by = {record["name"]: record for record in variants}

    def ratio(above: str, below: str, *path: str) -> float | None:
        if above not in by or below not in by:
            return None
        values = []
        for record in (by[above], by[below]):
            value: Any = record
            for key in path:
                value = value[key]
            values.append(value)
        return values[0] / values[1]

    speedup = ratio("full", "budget", "stages", "vision", "p50")
    arithmetic = ratio("full", "budget", "flops", "vision")
    return {
        "ttft_full_over_budget": ratio("full", "budget", "ttft", "p50"),
        "ttft_naive_over_budget": ratio("naive", "budget", "ttft", "p50"),
        "ttft_naive_over_adaptive": ratio("naive", "adaptive", "ttft", "p50"),
        "vision_full_over_budget": speedup,
        "vision_flops_full_over_budget": arithmetic,
        "vision_of_flops": speedup / arithmetic if speedup and arithmetic else None,
        "compression_of_encoder": dict(compression),
    }


def show(trace: Trace, record: Mapping[str, Any]) -> None:
    """All tables."""
    _show_times(trace, record)
    _show_arithmetic(trace, record)
    if record["throughput"]:
        _show_throughput(trace, record["throughput"])
    for axis, points in record["scaling"].items():
        if points:
            title = f"scaling over {axis}, ms (medians of {record['scale_repeats']})"
            _show_scaling(trace, points, title)
    _show_gains(trace, record["gains"])


def _show_times(trace: Trace, record: Mapping[str, Any]) -> None:
    rows = [
        (
            one["name"],
            str(one["visual_tokens"]),
            *(_ms(one["stages"][name]["p50"]) for name in STAGES),
            *(_ms(one["ttft"][q]) for q in QUANTILES),
            _ms(one["tpot"]["p50"]),
        )
        for one in record["variants"]
    ]
    columns = ("variant", "tokens", *STAGES, "TTFT p50", "p90", "p99", "TPOT")
    trace.table(columns, rows, title=f"time to the first token, ms (stages: medians of {record['repeats']} requests)")


def _show_arithmetic(trace: Trace, record: Mapping[str, Any]) -> None:
    variants, integer = record["variants"], record["integer_matmul"]
    rows = [
        (
            one["name"],
            " -> ".join(map(str, one["frames_per_stage"])),
            f"{one['flops']['vision'] / 1e9:.2f}",
            f"{one['of_peak']['vision']:.0%}",
            f"{one['flops']['prefill'] / 1e9:.2f}",
            f"{one['of_peak']['prefill']:.0%}",
            *(_mb(one["memory"][name]) for name in ("rss", "growth", "cuda")),
        )
        for one in variants
    ]
    work = ("variant", "frames", "vision GFLOP", "of peak", "prefill GFLOP", "of peak", "RSS MB", "growth MB", "GPU MB")
    peak = record["matmul"] / 1e12
    title = f"arithmetic (peak: {peak:.3g} TFLOP/s, the best {record['dtype']} matrix product) and peak memory"
    trace.table(work, rows, title=title)
    if integer is not None:
        trace.line(integer_line(integer, record["matmul"]))
        for one in variants:
            if one["of_integer_peak"] is not None:
                trace.line(f"  {one['name']}: its vision part at {one['of_integer_peak']:.0%} of the integer peak")


def _show_throughput(trace: Trace, loads: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (
            one["name"],
            str(one["clients"]),
            f"{one['requests_per_second']:.2f}",
            *(_ms(one["ttft"][q]) for q in QUANTILES),
            _ms(one["total"]["p50"]),
        )
        for one in loads
    ]
    title = "clients in line for one model, which answers one request at a time; decoding of videos overlaps; ms"
    trace.table(("variant", "clients", "requests/s", "TTFT p50", "p90", "p99", "answer p50"), rows, title=title)


def _show_scaling(trace: Trace, points: Sequence[Mapping[str, Any]], title: str) -> None:
    rows = [
        (
            one["name"],
            str(one["frames"]),
            f"{one['ratio']:g}",
            str(one["visual_tokens"]),
            *(_ms(one[name]) for name in ("vision", "prefill", "ttft")),
        )
        for one in points
    ]
    trace.table(("variant", "frames", "ratio", "tokens", "vision", "prefill", "TTFT"), rows, title=title)


def integer_line(integer: float, floating: float) -> str:
    """The integer peak and its ratio to that of floats, the most that int8 can gain."""
    return (
        f"integer peak: {integer / 1e12:.3g} TOP/s, one product of the tower in int8 in ONNX Runtime; "
        f"{integer / floating:.2f}x the peak of floats, which is the most that int8 can gain"
    )


def _show_gains(trace: Trace, found: Mapping[str, Any]) -> None:
    """The gains, a line each."""
    for key, text in (
        ("ttft_full_over_budget", "TTFT, full over budget: {:.2f}x"),
        ("ttft_naive_over_budget", "TTFT, naive over budget: {:.2f}x"),
        ("ttft_naive_over_adaptive", "TTFT, naive over adaptive: {:.2f}x"),
        ("vision_full_over_budget", "vision, full over budget: {:.2f}x"),
        ("vision_flops_full_over_budget", "vision arithmetic, full over budget: {:.2f}x"),
        ("vision_of_flops", "vision speed-up as a share of that: {:.0%}"),
    ):
        if found[key] is not None:
            trace.line(text.format(found[key]))
    for name, share in found["compression_of_encoder"].items():
        trace.line(f"compression, {name}: {share:.1%} of its encoder")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"
