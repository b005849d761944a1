"""Tables of a server's measurements, times in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from runtime.measure.serving.soak import FIELDS

_QUANTILES = ("p50", "p90", "p99")
_DASH = "-"


class ShownTable(NamedTuple):
    """The arguments of `Screen.table`."""

    columns: Sequence[str]
    rows: list[tuple[str, ...]]
    title: str


def load_tables(record: Mapping[str, Any]) -> Iterator[ShownTable]:
    """The tables of runs at given rates."""
    runs = record["rates"]
    columns: tuple[str, ...] = (
        "rate",
        *(f"{name} {q}" for name in ("TTFT", "TPOT", "ITL", "answer") for q in _QUANTILES),
    )
    yield ShownTable(columns, [_latencies(run) for run in runs], "latency of good answers, ms")
    wanted = " ".join(f"{name}:{1000 * seconds:g}" for name, seconds in record["objectives"].items())
    columns = ("rate", "requests", "good", "wrong", "errors", "requests/s", "tokens/s", "goodput/s", "cached")
    title = f"throughput; goodput: {wanted or 'no objectives given'}"
    yield ShownTable(columns, [_throughput(run) for run in runs], title)
    columns = ("rate", "arrived/s", "late p50", "p99", "max", "held p50", "p99", "of a core")
    title = "the generator itself: how late it sent requests, ms, and what it took of a core"
    yield ShownTable(columns, [_generator(run) for run in runs], title)


def _latencies(run: Mapping[str, Any]) -> tuple[str, ...]:
    return (_rate(run["rate"]), *(_ms(run[name], q) for name in ("ttft", "tpot", "itl", "e2e") for q in _QUANTILES))


def _throughput(run: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _rate(run["rate"]),
        *(str(run[name]) for name in ("requests", "good", "wrong")),
        ", ".join(f"{status}: {count}" for status, count in run["errors"].items()) or _DASH,
        *(_number(run[f"{name}_per_second"]) for name in ("requests", "tokens", "goodput")),
        _DASH if run["cached_share"] is None else f"{run['cached_share']:.0%}",
    )


def _generator(run: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _rate(run["rate"]),
        _number(run["offered_per_second"]),
        *(_ms(run["late"], q) for q in ("p50", "p99", "max")),
        *(_ms(run["held"], q) for q in ("p50", "p99")),
        f"{run['generator_core_share']:.0%}",
    )


def soak_tables(record: Mapping[str, Any]) -> Iterator[ShownTable]:
    """Memory, descriptors and threads of the server's processes, if they were sampled."""
    if record["held"] is None:
        return
    rows = []
    for name in FIELDS:
        found, scale = record["held"][name], 2**20 if name.endswith("rss") else 1
        unit = " MiB" if scale > 1 else ""
        values = (
            f"{found[key] / scale:.{1 if scale > 1 else 0}f}{unit}" for key in ("first", "middle", "last", "peak")
        )
        rows.append((name.replace("_", " "), *values, f"{found['growth_per_thousand'] / scale:+.2f}{unit}"))
    yield ShownTable(
        ("held", "first", "middle", "last", "peak", "a thousand answers later"), rows, "the server's processes"
    )


def soak_line(record: Mapping[str, Any]) -> str:
    errors = ", ".join(f"{count} of {status}" for status, count in record["errors"].items()) or "none"
    return (
        f"{record['answered']} of {record['soak']} answered ({record['answers_per_second']:.1f}/s), "
        f"{record['wrong']} wrong, errors: {errors}"
    )


def added_tables(record: Mapping[str, Any]) -> Iterator[ShownTable]:
    """The table of `added`."""
    names = ("served", "pipeline", "added", "outside_engine")
    rows = [
        (
            kind,
            *(_ms(record[kind][name], q) for name in names for q in ("p50", "p90")),
            f"{1000 * record[kind]['added_quiet']:.1f}",
            str(record[kind]["different_answers"]),
        )
        for kind in ("known", "fresh")
    ]
    heads = (f"{name} {q}" for name in ("served", "Pipeline", "added", "outside engine") for q in ("p50", "p90"))
    repeats = record["known"]["repeats"]
    title = f"ms, {repeats} requests each, in turns; body of {record['body_bytes']:,} bytes"
    yield ShownTable(("video", *heads, "added, quiet", "differ"), rows, title)


def _rate(rate: float | str) -> str:
    return rate if isinstance(rate, str) else f"{rate:g}"


def _ms(found: Mapping[str, float] | None, quantile: str) -> str:
    return _DASH if found is None else f"{1000 * found[quantile]:.1f}"


def _number(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f}"
