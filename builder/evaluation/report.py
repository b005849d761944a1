"""The tables of a run: accuracies in percent, differences in percentage points, both with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from builder.evaluation.methods import ADAPTIVE, BUDGET, CELLS
from builder.evaluation.options import FEWER, FULL, MAIN_RATIO
from builder.evaluation.results import Comparison, Guess, Result
from builder.evaluation.statistics import Estimate
from earlytom.micro.data import KINDS
from runtime.trace import Trace

COMPARED = ("reference", "cells", "earlytom", "parts", "layers", "controls", "compared")


def main_ratio(found: Sequence[Result]) -> float | None:
    """The ratio of the short tables: the measured one nearest to 0.1; None if there is none."""
    ratios = {result.ratio for result in found if result.ratio is not None}
    return min(ratios, key=lambda ratio: (abs(ratio - MAIN_RATIO), ratio), default=None)


def find(found: Sequence[Result], name: str, ratio: float | None) -> Result | None:
    """A method's result at a ratio."""
    return next((result for result in found if (result.name, result.ratio) == (name, ratio)), None)


def best_control(found: Sequence[Result], ratio: float | None) -> Result | None:
    """The control of highest accuracy at a ratio."""
    controls = [result for result in found if result.group == "controls" and result.ratio == ratio]
    return max(controls, key=lambda result: result.accuracy.value, default=None)


def show_settings(trace: Trace, found: Sequence[Result], guess: Guess | None) -> None:
    """The main table: cost and accuracy of every setting."""
    columns = (
        "method,ratio,asked,tokens,frames,vision GFLOP,prefill GFLOP,encoder ms,compression ms,prefill ms,accuracy,"
    )
    columns += "95 %,of full"
    whole = find(found, FULL, None)
    rows: list[tuple[object, ...]] = []
    if guess is not None:
        rows.append(("chance", *[""] * 9, percent(guess.chance), "", ""))
        rows.append(("no video", "", "", "0", *[""] * 6, percent(guess.accuracy.value), _interval(guess.accuracy), ""))
    for result in found:
        times = result.times
        rows.append(
            (
                result.title,
                "" if result.ratio is None else f"{result.ratio:.2f}",
                "" if result.ratio is None or whole is None else f"{result.ratio * whole.tokens:.0f}",
                f"{result.tokens:.0f}",
                f"{result.frames:.1f}",
                f"{result.vision / 1e9:.2f}",
                f"{result.prefill / 1e9:.2f}",
                "" if times is None else f"{times.vision - (times.compression or 0):.1f}",
                "" if times is None or times.compression is None else f"{times.compression:.1f}",
                "" if times is None else f"{times.prefill:.1f}",
                percent(result.accuracy.value),
                _interval(result.accuracy),
                "" if result.relative is None else percent(result.relative.value),
            )
        )
    trace.table(columns.split(","), rows, title="accuracy and cost")


def show_times(trace: Trace, rows: Sequence[dict[str, Any]]) -> None:
    """Times alone, from a record's rows."""
    shown = [
        (
            row["method"],
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['vision_ms'] - row['compression_ms']:.1f}",
            f"{row['compression_ms']:.1f}",
            f"{row['prefill_ms']:.1f}",
            f"{row['vision_ms'] + row['prefill_ms']:.1f}",
        )
        for row in rows
    ]
    columns = ("method", "ratio", "encoder ms", "compression ms", "prefill ms", "first token ms")
    trace.table(columns, shown, title="times, medians over single clips")


def show_comparisons(trace: Trace, found: Sequence[Result], pairs: Sequence[Comparison]) -> None:
    """ "cells" and EarlyTom against the others on the same clips, at the main ratio."""
    ratio = main_ratio(found)
    for name in (CELLS, BUDGET, ADAPTIVE):
        if ratio is None or (ours := find(found, name, ratio)) is None:
            continue
        rows = []
        for pair in pairs:
            other = find(found, pair.to, pair.to_ratio)
            if (pair.name, pair.ratio) == (name, ratio) and other is not None and other.group in COMPARED:
                rows.append((other.title, f"{other.tokens:.0f}", points(pair.difference), f"{pair.p:.4f}"))
        trace.table(
            ("against", "its tokens", "difference in points", "p"),
            rows,
            title=f"{ours.title} at {ratio:g} ({ours.tokens:.0f} tokens), on the same clips",
        )


def show_field(trace: Trace, found: Sequence[Result], pairs: Sequence[Comparison]) -> None:
    """Published methods, and by how much "cells" and EarlyTom are better on the same clips, at every ratio."""
    ours = [name for name in (CELLS, BUDGET) if any(result.name == name for result in found)]
    rows = []
    for result in found:
        if result.group != "compared" or result.ratio is None:
            continue
        against = [next((points(pair.difference) for pair in pairs if _is(pair, name, result)), "") for name in ours]
        rows.append(
            (result.title, f"{result.ratio:.2f}", f"{result.tokens:.0f}", percent(result.accuracy.value), *against)
        )
    if rows:
        columns = ("method", "ratio", "tokens", "accuracy", *(f"{name} less it" for name in ours))
        trace.table(columns, rows, title="the field, on the same clips")


def _is(pair: Comparison, name: str, to: Result) -> bool:
    return (pair.name, pair.ratio, pair.to, pair.to_ratio) == (name, to.ratio, to.name, to.ratio)


def show_budgets(trace: Trace, found: Sequence[Result], pairs: Sequence[Comparison]) -> None:
    """Both methods with other merge layers and frame counts, against each other and the full tokens."""
    rows = []
    fewer = find(found, FEWER, None)
    columns: tuple[str, ...] = ("merged", "ratio", "vision arithmetic", "against full", "against EarlyTom")
    for result in found:
        if result.group != "budgets":
            continue
        mine = [pair for pair in pairs if (pair.name, pair.ratio) == (result.name, result.ratio)]
        against = {"budgets" if "@" in pair.to else pair.to: points(pair.difference) for pair in mine}
        full = find(found, FULL, None)
        assert full is not None  # always among them
        shown = [against.get(FULL, ""), against.get("budgets", "")]
        share = f"{100 * result.vision / full.vision:.0f} %"
        if fewer is not None:
            share += f", {100 * result.vision / fewer.vision:.0f} % of {fewer.title}"
            shown.append(against.get(FEWER, ""))
        rows.append((result.title, result.ratio, share, *shown))
    if fewer is not None:
        columns += (f"against {fewer.title}",)
    if rows:
        trace.table(columns, rows, title="budgets")


def show_kinds(trace: Trace, found: Sequence[Result], guess: Guess | None) -> None:
    """Accuracy by kind of question: full tokens, "cells", EarlyTom, the best control and published methods, at the main
    ratio."""
    ratio = main_ratio(found)
    named = [find(found, FULL, None), *(find(found, name, ratio) for name in (CELLS, BUDGET, ADAPTIVE))]
    field = [result for result in found if result.group == "compared" and result.ratio in (None, ratio)]
    shown = [result for result in (*named, best_control(found, ratio), *field) if result is not None]
    columns = [_label(result) for result in shown]
    rows = []
    for kind in KINDS:
        blind = [] if guess is None else [percent(guess.chances[kind]), _share(guess.kinds[kind])]
        rows.append((kind, KINDS[kind].needs, *blind, *(_share(result.kinds[kind]) for result in shown)))
    blind = [] if guess is None else ["chance", "no video"]
    trace.table(("kind", "needs", *blind, *columns), rows, title="accuracy by kind of question")


def percent(share: float) -> str:
    """A share in percent, with one decimal."""
    return f"{100 * share:.1f}"


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points, with interval."""
    value, low, high = (f"{100 * share:+.1f}" for share in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _interval(estimate: Estimate) -> str:
    return f"{percent(estimate.low)} to {percent(estimate.high)}"


def _share(estimate: Estimate | None) -> str:
    return "" if estimate is None else percent(estimate.value)


def _label(result: Result) -> str:
    return result.title if result.ratio is None else f"{result.title} {result.ratio:g}"
