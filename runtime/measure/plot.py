"""Plots of a benchmark's record: TTFT as stacked bars, and scaling curves, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.measure.measure import STAGES
from runtime.show.colours import BLACK, BLUE, GREY, ORANGE, PINK, SKY, VERMILION, YELLOW
from runtime.show.figure import new_figure, save

_COLOURS = (GREY, PINK, YELLOW, VERMILION, SKY, BLUE, BLACK)
_LINES = {"full": (GREY, "D"), "naive": (ORANGE, "^"), "adaptive": (BLUE, "s"), "budget": (VERMILION, "o")}


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `ttft.png`, and `scaling.png` if scaling was measured, into `folder`; returns their paths."""
    written = [_draw_bars(record, folder / "ttft.png")]
    if any(record["scaling"].values()):
        written.append(_draw_curves(record["scaling"], folder / "scaling.png"))
    return written


def _draw_bars(record: Mapping[str, Any], path: Path) -> Path:
    figure, (axes,) = new_figure(1)
    names = [one["name"] for one in record["variants"]]
    places = list(range(len(names)))[::-1]  # the first one on top
    left = [0.0] * len(names)
    for stage, colour in zip(STAGES, _COLOURS, strict=True):
        width = [1000 * one["stages"][stage]["p50"] for one in record["variants"]]
        axes.barh(places, width, left=left, color=colour, label=stage)
        left = [begin + more for begin, more in zip(left, width, strict=True)]
    axes.set_yticks(places, names)
    axes.set_xlabel("time to the first token, ms (medians of the stages)")
    axes.set_title(f"{record['model']}, {record['frames']} frames, {record['dtype']}, {record['device']}")
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False)
    return save(figure, path)


def _draw_curves(scaling: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """One panel for each axis that was measured."""
    measured = [(axis, key) for axis, key in (("frames", "frames"), ("ratios", "ratio")) if scaling[axis]]
    figure, panels = new_figure(len(measured))
    for axes, (axis, key) in zip(panels, measured, strict=True):
        for name in dict.fromkeys(point["name"] for point in scaling[axis]):
            colour, marker = _LINES[name]
            points = sorted((p[key], 1000 * p["ttft"]) for p in scaling[axis] if p["name"] == name)
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
        axes.set_xlabel("frames" if key == "frames" else "retention ratio")
        axes.set_ylabel("time to the first token, ms")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    return save(figure, path)
