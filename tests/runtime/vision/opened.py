"""Graphs opened by path, as tests have them that made one by hand."""

from __future__ import annotations

from pathlib import Path

from earlytom.config import EarlyTomConfig
from runtime.engine.layout import Layout
from runtime.vision.onnxruntime import load
from runtime.vision.whole import Whole

ALONE = Layout(EarlyTomConfig(schedule="budget"), 2)  # of its graph only the place is looked at: it has no stage


def open_whole(path: Path, threads: int | None = None) -> Whole:
    """The graph at `path`, that a clip runs through alone, in ONNX Runtime."""
    return Whole(*load([path], ALONE.graphs, threads))
