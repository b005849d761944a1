"""Accuracy against visual tokens, one line a method, as a PNG. matplotlib is loaded when a plot is asked for.

The lines of what is compared at the same number of tokens; single settings (frame merging alone) are points, and the
choices of merge layers are left to the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.evaluation.methods import FULL
from builder.evaluation.results import Result

_SIZE, _DPI = (9.0, 5.0), 160  # inches; a README shows about 900 pixels
_OURS, _OURS_TOO = "#D55E00", "#0072B2"
# Method -> colour and marker. The colours can be told apart with any colour vision (Okabe and Ito).
_STYLES = {
    "budget": (_OURS, "o"),
    "adaptive": (_OURS_TOO, "s"),
    "merging": (_OURS, "*"),
    "merging-adaptive": (_OURS_TOO, "*"),
    "selection": ("#000000", "P"),
    "top-k": ("#56B4E9", "^"),
    "pooling": ("#E69F00", "v"),
    "pooling-space": ("#CC79A7", "<"),
    "frames": ("#009E73", "D"),
    "random": ("#999999", "X"),
}


def draw(found: Sequence[Result], path: Path, *, caption: str, chance: float | None) -> None:
    """Write the plot.

    Args:
        found: all results; the full tokens are among them.
        path: the PNG file.
        caption: of the picture.
        chance: accuracy without the video, a thin line; None draws none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed, and pyplot's global state stays untouched
    axes = figure.subplots()
    full = next(result for result in found if result.name == FULL)
    axes.axhline(100 * full.accuracy.value, color="black", linewidth=1, linestyle="--", zorder=1)
    drawn = {name: [result for result in found if result.name == name] for name in _STYLES}
    for name, results in drawn.items():
        if results:
            _line(axes, results, *_STYLES[name])
    axes.set_xscale("log")
    rightmost = (1.0, 100 * full.accuracy.value)
    axes.annotate("full tokens", rightmost, (0, 4), axes.get_yaxis_transform(), "offset points", ha="right")
    if chance is not None:
        axes.axhline(100 * chance, color="grey", linewidth=1, linestyle=":", zorder=1)
        axes.annotate("no video", (1.0, 100 * chance), (0, 4), axes.get_yaxis_transform(), "offset points", ha="right")
    ticks = sorted({round(result.tokens) for result in (*drawn["budget"], full)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="visual tokens a clip (mean, log scale)", ylabel="accuracy, %", title=caption)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if any(drawn.values()):
        figure.legend(fontsize="small", frameon=False, loc="outside right center")
    figure.savefig(path, format="png", metadata={"Software": None})


def _line(axes: Any, results: Sequence[Result], colour: str, marker: str) -> None:
    """One method, its 95 % intervals as error bars."""
    results = sorted(results, key=lambda result: result.tokens)
    value = [100 * result.accuracy.value for result in results]
    below = [100 * (result.accuracy.value - result.accuracy.low) for result in results]
    above = [100 * (result.accuracy.high - result.accuracy.value) for result in results]
    ours, single = results[0].group == "earlytom", marker == "*"
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
