"""A plot of runs at given rates: latencies and throughput over the rate, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.show.colours import BLUE, GREY, VERMILION
from runtime.show.figure import new_figure, save

_LATENCIES = (("ttft", "first token", BLUE), ("e2e", "answer", VERMILION))
_QUANTILES = (("p50", "-"), ("p90", "--"), ("p99", ":"))


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `load.png` into `folder`, if there are finite rates; returns its path."""
    runs = sorted((run for run in record["rates"] if run["rate"] != "inf"), key=lambda run: run["rate"])
    if not runs:
        return []
    figure, (left, right) = new_figure(2)
    for name, word, colour in _LATENCIES:
        measured = [(run["rate"], run[name]) for run in runs if run[name] is not None]
        for quantile, style in _QUANTILES:
            points = [(rate, 1000 * found[quantile]) for rate, found in measured]
            left.plot([x for x, _ in points], [y for _, y in points], style, color=colour, label=f"{word} {quantile}")
    left.set_ylabel("ms")
    left.set_yscale("log")
    rates = [run["rate"] for run in runs]
    right.plot(rates, rates, color=GREY, linestyle=":", label="arrived")
    right.plot(rates, [run["requests_per_second"] or 0 for run in runs], "o-", color=BLUE, label="answered")
    if record["objectives"]:
        right.plot(rates, [run["goodput_per_second"] or 0 for run in runs], "s-", color=VERMILION, label="goodput")
    right.set_ylabel("requests/s")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("requests that arrive a second")
        axes.legend(frameon=False)
    return [save(figure, folder / "load.png")]
