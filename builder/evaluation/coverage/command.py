"""Coverage of videos, from their files to a table, a record and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builder.evaluation.coverage.measure import Coverage, measure_coverage
from builder.evaluation.coverage.picture import MOST_VIDEOS, draw_coverage
from builder.evaluation.passes import ClipPasses, VisionPass
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.method import Method
from earlytom.methods.cells import Cells
from earlytom.methods.earlytom import EarlyTom
from runtime.checkpoint import Checkpoint, load_vision
from runtime.trace import Trace
from runtime.video import load_clip

_FIGURES = ("frame_mean", "frame_worst", "cell_mean", "cell_worst_frame", "cell_changed")


@dataclass(frozen=True)
class CoverageJob:
    """The settings of a measurement.

    Attributes:
        videos: files.
        frames: number sampled from each.
        config, cells: the settings of both methods, ratios ignored; EarlyTom has the budget schedule.
        ratios: retention ratios.
        plot: a PNG file, or None.
    """

    videos: tuple[Path, ...]
    frames: int
    config: EarlyTomConfig
    cells: CellsConfig
    ratios: tuple[float, ...]
    plot: Path | None = None

    def methods(self) -> list[tuple[str, Method]]:
        """Both methods at every ratio, by their titles."""
        budget = self.config.replace(schedule="budget")
        found: list[tuple[str, Method]] = []
        for ratio in self.ratios:
            found.append((f"EarlyTom budget {ratio:g}", EarlyTom(budget.replace(retention_ratio=ratio))))
            found.append((f"cells {ratio:g}", Cells(self.cells.replace(retention_ratio=ratio))))
        return found


def cover(job: CoverageJob, checkpoint: Checkpoint, trace: Trace) -> dict[str, Any]:
    """Run the measurement; returns the record of the JSON line."""
    if not checkpoint.trained:
        trace.line("note: its weights are not trained, so its features tell little of what is seen")
    # Videos first: an unreadable one is noticed before a large tower is loaded.
    size, sampling = checkpoint.preprocessing.size, checkpoint.preprocessing.sampling
    clips = [load_clip(video, job.frames, size, sampling=sampling).frames for video in job.videos]
    vision = VisionPass(load_vision(checkpoint.source), checkpoint)
    found: list[list[Coverage]] = []
    for number, (video, frames) in enumerate(zip(job.videos, clips, strict=True)):
        found.append(measure_coverage(ClipPasses(vision, frames, number), job.methods()))
        _table(trace, f"{video.name}: {len(frames)} frames", [one.to_dict() for one in found[-1]])
    means = [_mean([row[place].to_dict() for row in found]) for place in range(len(found[0]))]
    if len(found) > 1:
        _table(trace, f"mean of {len(found)} videos", means)
    if job.plot is not None:
        worst = sorted(range(len(found)), key=lambda index: min(one.changed_mean for one in found[index]))
        shown = [(job.videos[index].name, clips[index], found[index]) for index in worst]
        what = f"{checkpoint.name}: how well kept tokens cover every cell of the video"
        some = f"; the {MOST_VIDEOS} of {len(shown)} videos that lose most" if len(shown) > MOST_VIDEOS else ""
        draw_coverage(shown, checkpoint.family.geometry(checkpoint.config).cells, job.plot, caption=what + some)
        trace.line(f"picture: {job.plot}")
    each = [
        {"video": str(video), "frames": len(frames), "results": [one.to_dict() for one in row]}
        for video, frames, row in zip(job.videos, clips, found, strict=True)
    ]
    settings = {"earlytom": job.config.to_dict(), "cells": job.cells.to_dict()}
    return {"model": checkpoint.source, "trained": checkpoint.trained, **settings, "coverage": each, "mean": means}


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One method's figures, averaged over videos."""
    first = rows[0]
    kept = {name: first[name] for name in ("method", "frames", "tokens")}
    return kept | {name: float(np.mean([row[name] for row in rows])) for name in _FIGURES}


def _table(trace: Trace, title: str, rows: Sequence[dict[str, Any]]) -> None:
    columns = ("method", "frames", "tokens", "frames: mean", "worst", "cells: mean", "worst frame", "most changed")
    shown = [(row["method"], row["frames"], row["tokens"], *(f"{row[name]:.3f}" for name in _FIGURES)) for row in rows]
    trace.table(columns, shown, title=title)
