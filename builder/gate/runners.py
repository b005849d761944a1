"""Runs the PyTorch reference so that it returns every value that the gate compares.

`TorchRunner` runs the model in fp32 and returns the values that `builder.gate.runs` returns for the graph, with the
method's own decisions or with those of a run of the graph (`builder.gate.rules`). It judges nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from builder.export.vision import VisionGraph
from builder.gate.runs import Arrays
from earlytom.method import Method
from runtime.engine import layout


class TorchRunner(BaseRunner):
    """The PyTorch reference as a Polygraphy runner; `decisions[i]` decides in iteration i."""

    def __init__(self, graph: VisionGraph, decisions: Sequence[Method], frames: tuple[int, ...], name: str) -> None:
        super().__init__(name=name, prefix="pytorch")
        self.graph = graph
        self.decisions = iter(decisions)
        self.frames = frames

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add(layout.FRAMES, np.dtype(np.uint8), self.frames)

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, NDArray[Any]]:
        self.graph.decisions = next(self.decisions)
        started = time.perf_counter()
        trace = self.graph(torch.from_numpy(feed_dict[layout.FRAMES]))
        self.inference_time = time.perf_counter() - started
        return OrderedDict((name, value.numpy()) for name, value in trace.items())
