"""Run a graph, and the model it came from, so that both return every value that is compared.

`run_tapped` runs a graph or a chain in ONNX Runtime, as it is or with every result rounded, and returns values inside
of it beside its outputs. `TorchRunner` runs the PyTorch model in fp32 and returns the same names; `ForcedDecisions`
makes it take the decisions that a run of the graph took, so that frames and tokens are the same ones. What the values
must be like is not known here: `builder.gate` and `builder.drift` judge them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.logger import G_LOGGER
from torch import Tensor

from builder.batches import split, stack
from builder.export import VisionGraph
from builder.rounding import round_results
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.method import Method
from earlytom.methods.earlytom import EarlyTom
from runtime.engine import layout
from runtime.partial import temporary

Arrays = dict[str, NDArray[Any]]


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


def run_tapped(
    onnx_path: Path | Sequence[Path], names: Sequence[str], feeds: list[Arrays], *, rounded: bool, batch: int = 1
) -> RunResults:
    """Outputs and the values `names` of the graph or chain for every feed, in ONNX Runtime; see `write_tapped`.

    Feeds are of one clip each, and so are the results: a graph of `batch` videos gets as many at once, in their order.
    """
    if not isinstance(onnx_path, Path):
        from builder.chain_run import run_chain
        from builder.chunk_run import is_chunked, run_chunks

        run_stages = run_chunks if is_chunked(onnx_path) else run_chain
        results = run_stages(onnx_path, names, feeds, rounded=rounded)
    elif batch == 1:
        results = run_each(onnx_path, names, feeds, rounded=rounded)
    else:
        stacked = stack([feed[layout.FRAMES] for feed in feeds], batch)
        together = run_each(onnx_path, names, [{layout.FRAMES: clips} for clips in stacked], rounded=rounded)
        results = [one for values in together for one in split(values, batch)]
    return RunResults([("onnxruntime", [IterationResult(one, runner_name="onnxruntime") for one in results])])


def run_each(onnx_path: Path, names: Sequence[str], feeds: Iterable[Arrays], *, rounded: bool) -> list[Arrays]:
    """The outputs and the values `names` of one graph for every feed."""
    onnxruntime.set_default_logger_severity(3)  # its notes on constants it will not fold are not for users
    with temporary(onnx_path) as tapped:
        write_tapped(onnx_path, names, rounded=rounded, path=tapped)
        with (
            G_LOGGER.verbosity(G_LOGGER.ERROR),
            OnnxrtRunner(SessionFromOnnx(str(tapped)), name="onnxruntime") as runner,
        ):
            return [{name: np.asarray(value) for name, value in runner.infer(feed).items()} for feed in feeds]


def values_of(paths: Sequence[Path], names: Sequence[str]) -> list[list[str]]:
    """Of graphs that run one after the other: which of the values `names` each of them has.

    Raises:
        UserError: none of them has one of the values.
    """
    graphs = [onnx.load(str(path), load_external_data=False).graph for path in paths]
    had = [{value.name for value in (*graph.output, *graph.value_info)} for graph in graphs]
    missing = [name for name in names if not any(name in one for one in had)]
    if missing:
        raise UserError(
            f"no graph of {paths[0].parent} has a value named {missing[0]}, so another version exported them: build "
            "again with --force"
        )
    return [[name for name in names if name in one] for one in had]


def write_tapped(onnx_path: Path, names: Sequence[str], *, rounded: bool, path: Path | None = None) -> Path:
    """Write a copy of the graph that also returns the values `names`, to `path` or a file beside it.

    The folder is the graph's in any case, as its external data is there.

    `rounded`: as `builder.rounding` has it.

    Raises:
        UserError: the graph has no such value.
    """
    model = onnx.load(str(onnx_path), load_external_data=False)
    have = {value.name for value in model.graph.output}
    known = {value.name: value for value in model.graph.value_info}
    missing = [name for name in names if name not in have | known.keys()]
    if missing:
        raise UserError(
            f"{onnx_path} has no value named {missing[0]}, so another version exported it: build it again with --force"
        )
    model.graph.output.extend(known[name] for name in names if name not in have)
    if rounded:
        round_results(model)
    path = path or onnx_path.with_name(f".taps-{onnx_path.name}")
    path.write_bytes(model.SerializeToString())
    return path
