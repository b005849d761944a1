"""Accuracy against the measured time to the first token, a panel for each ratio, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.evaluation.options import FULL
from builder.evaluation.results import Result
from builder.evaluation.ways.field import of_the_field

_HIGH, _WIDE, _LEGEND, _DPI = 5.0, 4.6, 3.4, 160  # inches
_MARKERS = "osD^v<>PXdhp8H*"
_COLOURS = {"cells": "#882255", "earlytom": "#D55E00", "controls": "#999999", "reference": "#000000"}
# Of the field's methods, told apart by marker too.
_OTHERS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#117733", "#44AA99")


def draw_field(found: Sequence[Result], path: Path, *, caption: str) -> None:
    """Write the plot of all results that have times; what has no ratio is in every panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in of_the_field(found) if one.times is not None]
    ratios: list[float | None] = [*sorted({one.ratio for one in shown if one.ratio is not None})] or [None]
    styles = _styles(shown)
    figure = Figure(figsize=(_WIDE * len(ratios) + _LEGEND, _HIGH), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(ratios), squeeze=False, sharex=True, sharey=True)[0]
    for panel, ratio in zip(panels, ratios, strict=True):
        for one in shown:
            if one.ratio in (None, ratio):
                _point(panel, one, *styles[one.name])
        panel.set(xlabel="measured time to the first token, ms", title="" if ratio is None else f"ratio {ratio:g}")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    figure.suptitle(caption, fontsize="medium")
    known: dict[str, Any] = {}
    for panel in panels:
        known |= {label: line for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), fontsize="small", frameon=False, loc="outside right center")
    figure.savefig(path, format="png", metadata={"Software": None})


def _styles(shown: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method."""
    styles: dict[str, tuple[str, str]] = {}
    for one in shown:
        if one.name not in styles:
            own = len(styles)
            styles[one.name] = (_COLOURS.get(one.group, _OTHERS[own % len(_OTHERS)]), _MARKERS[own % len(_MARKERS)])
    return styles


def _point(axes: Any, one: Result, colour: str, marker: str) -> None:
    """One result with its 95 % interval."""
    assert one.times is not None  # those shown have them
    value, low, high = (100 * share for share in (one.accuracy.value, one.accuracy.low, one.accuracy.high))
    axes.errorbar(
        one.times.first_token,
        value,
        yerr=[[value - low], [high - value]],
        label=one.title,
        color=colour,
        marker="_" if one.name == FULL else marker,
        markersize=11 if one.name == FULL else 6,
        linestyle="none",
        capsize=2,
        elinewidth=0.8,
    )
