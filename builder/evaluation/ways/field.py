"""The table of published methods beside EarlyTom, "cells" and the controls: accuracy, costs, times, papers' figures.

Accuracies may be of several runs on the same clips (a record); times are of one run, with settings interleaved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from builder.evaluation.options import FULL
from builder.evaluation.report import percent, points
from builder.evaluation.results import Comparison, Result
from builder.evaluation.timing import Times
from builder.evaluation.ways.claims import CLAIMS
from builder.evaluation.ways.row import FEW_RATIOS

GROUPS = ("reference", "cells", "earlytom", "compared", "controls")
OURS = {"cells-rounds": "cells less it", "budget": "EarlyTom less it"}
_HEAD = (
    *("method", "tokens in", "vision, prefill, % of full", "encoder + compression + prefill = first token, ms"),
    *("right, %", "of full, %", *OURS.values(), "published elsewhere"),
)


def timed_rows(settings: Iterable[tuple[str, float | None]], times: Iterable[Times]) -> list[dict[str, Any]]:
    """The times of (method, ratio) settings as rows of a record."""
    return [
        {
            "method": name,
            "ratio": ratio,
            "vision_ms": one.vision,
            "compression_ms": one.compression,
            "prefill_ms": one.prefill,
        }
        for (name, ratio), one in zip(settings, times, strict=True)
    ]


def with_times(found: Sequence[Result], rows: Sequence[dict[str, Any]]) -> list[Result]:
    """The results with their times replaced by those of a record's rows, None if not there."""
    known = {
        (row["method"], row["ratio"]): Times(row["vision_ms"], row["prefill_ms"], row["compression_ms"]) for row in rows
    }
    return [replace(result, times=known.get((result.name, result.ratio))) for result in found]


def of_the_field(found: Sequence[Result]) -> list[Result]:
    """The results shown, in the order of `GROUPS`: at the ratios of the published methods, or without a ratio."""
    shown = [one for one in found if one.group in GROUPS and one.ratio in (None, *FEW_RATIOS["compared"])]
    return sorted(shown, key=lambda one: GROUPS.index(one.group))


def field_table(found: Sequence[Result], pairs: Sequence[Comparison]) -> str:
    """Markdown: one table of rows without a ratio, and one for each ratio."""
    shown = of_the_field(found)
    full = next(one for one in shown if one.name == FULL)
    parts = []
    for ratio in sorted({one.ratio for one in shown}, key=lambda one: one or 0.0):
        nominal = "At a ratio of their own" if ratio is None else f"Ratio {ratio:g}, {ratio * full.tokens:.0f} tokens"
        rows = [_row(one, full, pairs) for one in shown if one.ratio == ratio]
        parts.append("\n".join((f"## {nominal}", "", _line(_HEAD), _line(["---"] * len(_HEAD)), *map(_line, rows))))
    return "\n\n".join(parts) + "\n"


def _row(one: Result, full: Result, pairs: Sequence[Comparison]) -> list[str]:
    low, high = percent(one.accuracy.low), percent(one.accuracy.high)
    return [
        one.title,
        f"{one.tokens:.0f}",
        f"{100 * one.vision / full.vision:.0f}, {100 * one.prefill / full.prefill:.0f}",
        _times(one.times),
        f"{percent(one.accuracy.value)} [{low}, {high}]",
        "" if one.relative is None else percent(one.relative.value),
        *(_difference(name, one, pairs) for name in OURS),
        CLAIMS.get(one.name, ""),
    ]


def _times(times: Times | None) -> str:
    if times is None or times.compression is None:
        return ""
    parts = (times.vision - times.compression, times.compression, times.prefill)
    return f"{' + '.join(f'{part:.1f}' for part in parts)} = {times.first_token:.1f}"


def _difference(name: str, one: Result, pairs: Sequence[Comparison]) -> str:
    wanted = (name, one.ratio, one.name, one.ratio)
    found = (pair for pair in pairs if (pair.name, pair.ratio, pair.to, pair.to_ratio) == wanted)
    return next((points(pair.difference) for pair in found), "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
