"""Accuracy against the measured time to the first token, a panel for each ratio, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.evaluation.options import FULL
from builder.evaluation.results import Result
from builder.evaluation.ways.field import of_the_field
from runtime.show.colours import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION
from runtime.show.figure import new_figure, save, tidy

_HIGH, _WIDE, _LEGEND = 5.0, 4.6, 3.4  # inches
_MARKERS = "osD^v<>PXdhp8H*"
_COLOURS = {"cells": "#882255", "earlytom": VERMILION, "controls": GREY, "reference": BLACK}
# Of published methods, which differ by marker, too.
_OTHERS = (BLUE, SKY, GREEN, ORANGE, PINK, "#117733", "#44AA99")


def draw_field(found: Sequence[Result], path: Path, *, caption: str) -> None:
    """Write the plot of all results with times; those without a ratio are in every panel."""
    shown = [one for one in of_the_field(found) if one.times is not None]
    ratios: list[float | None] = [*sorted({one.ratio for one in shown if one.ratio is not None})] or [None]
    styles = _styles(shown)
    size = (_WIDE * len(ratios) + _LEGEND, _HIGH)
    figure, panels = new_figure(len(ratios), size=size, sharex=True, sharey=True)
    for panel, ratio in zip(panels, ratios, strict=True):
        for one in shown:
            if one.ratio in (None, ratio):
                _point(panel, one, *styles[one.name])
        panel.set(xlabel="measured time to the first token, ms", title="" if ratio is None else f"ratio {ratio:g}")
        tidy(panel)
    panels[0].set_ylabel("accuracy, %")
    figure.suptitle(caption, fontsize="medium")
    known: dict[str, Any] = {}
    for panel in panels:
        known |= {label: line for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), fontsize="small", frameon=False, loc="outside right center")
    save(figure, path)


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
