"""Accuracy against visual tokens, one line a method, as a PNG. matplotlib is imported only to draw.

Settings without a ratio (frame merging alone) are points; other merge layers are left to the table. With results of the
group "budgets" there is a second panel: accuracy against the vision part's flops, for both methods and the controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.evaluation.methods import BUDGET, CELLS
from builder.evaluation.options import FULL
from builder.evaluation.report import main_ratio
from builder.evaluation.results import Result
from runtime.show.colours import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION
from runtime.show.figure import new_figure, save, tidy

_SIZE, _WIDE = (9.0, 5.0), (14.0, 5.0)  # inches
_OURS, _OURS_TOO = VERMILION, BLUE
# Method -> colour and marker.
_STYLES = {
    "cells-rounds": ("#882255", "H"),
    "cells-greedy": ("#AA4499", "h"),
    "cells-plain": ("#AA4499", "1"),
    "budget": (_OURS, "o"),
    "budget-bias": ("#882200", "p"),
    "adaptive": (_OURS_TOO, "s"),
    "diverse": ("#44AA99", "d"),
    "selection-diverse": ("#117733", "P"),
    "merging": (_OURS, "*"),
    "merging-adaptive": (_OURS_TOO, "*"),
    "selection": (BLACK, "P"),
    "top-k": (SKY, "^"),
    "pooling": (ORANGE, "v"),
    "pooling-space": (PINK, "<"),
    "frames": (GREEN, "D"),
    "random": (GREY, "X"),
}


def draw(found: Sequence[Result], path: Path, *, caption: str, chance: float | None) -> None:
    """Write the plot.

    Args:
        found: all results, including the full tokens.
        path: the PNG file.
        caption: its title.
        chance: accuracy without the video, drawn as a thin line; None: no line.
    """
    from matplotlib.ticker import NullLocator

    priced = [result for result in found if result.group == "budgets"]
    figure, panels = new_figure(2 if priced else 1, size=_WIDE if priced else _SIZE, sharey=True)
    axes = panels[0]
    full = next(result for result in found if result.name == FULL)
    for panel in panels:
        _reference(panel, full.accuracy.value, "full tokens", "black", "--")
        if chance is not None:
            _reference(panel, chance, "no video", "grey", ":")
        tidy(panel)
    drawn = {name: [result for result in found if result.name == name] for name in _STYLES}
    for name, results in drawn.items():
        if results:
            _line(axes, results, *_STYLES[name])
    axes.set_xscale("log")
    ticks = sorted({round(result.tokens) for result in (*drawn[BUDGET], *drawn[CELLS], full)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="visual tokens a clip (mean, log scale)", ylabel="accuracy, %", title=caption)
    if priced:
        _costs(panels[1], found, full.vision)
    if any(drawn.values()):
        figure.legend(*axes.get_legend_handles_labels(), fontsize="small", frameon=False, loc="outside right center")
    save(figure, path)


def _reference(axes: Any, accuracy: float, label: str, colour: str, style: str) -> None:
    """A thin horizontal line at an accuracy."""
    axes.axhline(100 * accuracy, color=colour, linewidth=1, linestyle=style, zorder=1)
    place = (1.0, 100 * accuracy)
    axes.annotate(label, place, (0, 4), axes.get_yaxis_transform(), "offset points", ha="right")


def _costs(axes: Any, found: Sequence[Result], whole: float) -> None:
    """Accuracy against the share of the full vision flops, without those of the decisions: both methods for every
    budget, filled at the main ratio, and the controls at that ratio."""
    main = main_ratio(found)
    ratios = sorted({result.ratio for result in found if result.group == "budgets" and result.ratio is not None})
    for name, one in ((CELLS, "cells"), (BUDGET, "budget")):
        for ratio in ratios:
            row = [r for r in found if r.ratio == ratio and (r.name == name or r.name.startswith(f"{one}@"))]
            _points(axes, row, whole, *_STYLES[name], filled=ratio == main)
    for name in ("frames", "top-k", "random", "pooling"):
        _points(axes, [r for r in found if (r.name, r.ratio) == (name, main)], whole, *_STYLES[name], filled=True)
    axes.axvline(50, color="#bbbbbb", linewidth=1, zorder=1)
    shown = ", ".join(f"{'filled' if ratio == main else 'open'}: {ratio:g}" for ratio in ratios)
    axes.set(xlabel="vision arithmetic, % of full", title=f"frames merged otherwise; ratio {shown}")


def _points(axes: Any, row: Sequence[Result], whole: float, colour: str, marker: str, *, filled: bool) -> None:
    """Results as points, without a line."""
    axes.plot(
        [100 * result.vision / whole for result in row],
        [100 * result.accuracy.value for result in row],
        color=colour,
        marker=marker,
        markersize=6,
        markerfacecolor=colour if filled else "white",
        linestyle="none",
    )


def _line(axes: Any, results: Sequence[Result], colour: str, marker: str) -> None:
    """One method, its 95 % intervals as error bars."""
    results = sorted(results, key=lambda result: result.tokens)
    value = [100 * result.accuracy.value for result in results]
    below = [100 * (result.accuracy.value - result.accuracy.low) for result in results]
    above = [100 * (result.accuracy.high - result.accuracy.value) for result in results]
    ours, single = results[0].name in (CELLS, BUDGET), marker == "*"
    axes.errorbar(
        [result.tokens for result in results],
        value,
        yerr=[below, above],
        label=results[0].title,
        color=colour,
        marker=marker,
        markersize=9 if single else 4.5,
        markerfacecolor="white" if single else colour,
        linestyle="none" if single else "-",
        linewidth=2.2 if ours else 1.2,
        capsize=2,
        elinewidth=0.8,
        zorder=3 if ours else 2,
    )
