"""Run the model that a graph came from, so that it returns every value that is compared.

`TorchRunner` runs the PyTorch model in fp32 and returns the names that `builder.gate.runs` gives for the graph;
`ForcedDecisions` makes it take the decisions that a run of the graph took, so that frames and tokens are the same ones.
What the values must be like is not known here: `builder.gate` and `builder.gate.drift` judge them.
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
from torch import Tensor

from builder.export.vision import VisionGraph
from builder.gate.runs import Arrays
from earlytom.config import EarlyTomConfig
from earlytom.method import Method, State
from earlytom.methods.earlytom import EarlyTom
from runtime.engine import layout


class ForcedDecisions(EarlyTom):
    """Takes the decisions that a run of the graph took, in their order."""

    def __init__(self, config: EarlyTomConfig, taken: Arrays) -> None:
        super().__init__(config)
        self.weights = [torch.from_numpy(taken[f"weights_{layer}"]) for layer in config.merge_layers]
        self.static = torch.from_numpy(taken["static"])
        self.positions = torch.from_numpy(taken[layout.POSITIONS])
        self.taken = 0

    def plan(self, similarity: Tensor, frames_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        frames = similarity.shape[0]
        merging = self.taken < len(self.weights)
        weights = self.weights[self.taken] if merging else torch.eye(frames)
        self.taken += 1
        return weights, torch.zeros(frames, dtype=torch.int64), self.static

    def select(self, features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
        rows = features.flatten(0, 1)
        return rows[self.positions.clamp(0, len(rows) - 1)], self.positions  # a position out of range fails as a token

    def select_varying(
        self, features: Tensor, received: Tensor, static: Tensor, places: int, windows: int
    ) -> tuple[Tensor, Tensor]:
        return self.select(features, received, static, places)

    def standing(self, features: Tensor, positions: Tensor, state: State) -> tuple[Tensor, Tensor]:
        return super().standing(features, positions.clamp(0, features.shape[:2].numel() - 1), state)


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
