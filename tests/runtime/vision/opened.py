"""Graphs opened by path, as tests have them that made one by hand."""

from __future__ import annotations

from pathlib import Path

from earlytom.config import EarlyTomConfig
from runtime.engine.layout import Layout
from runtime.vision.onnxruntime import load
from runtime.vision.whole import Whole

BUDGET = EarlyTomConfig(schedule="budget")


def open_whole(path: Path, threads: int | None = None, batch: int = 1) -> Whole:
    """The graph at `path`, that a clip, or `batch` of them, runs through alone, in ONNX Runtime."""
    return Whole(*load([path], Layout(BUDGET, 2, batch=batch).graphs, threads))
