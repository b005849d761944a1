"""The adaptive schedule as a chain of graphs, cut after each merge layer.

The video decides how many frames a merge leaves, so the layers after it have a dynamic first dimension. Within one
graph that would be a data-dependent shape, which TensorRT-RTX does not support; between two graphs the runtime reads
the count. Each graph holds its own layers, so no weight is stored twice. `runtime.engine.layout` names files and
tensors; the decisions are calls of the adaptive functions of `builder.export.functions`.

    stage 0        frames -> layers up to the first merge -> similarity -> plan -> merge
    stage 1, ...   hidden states -> layers up to the next merge -> similarity -> plan -> merge
    last stage     hidden states -> segments; the remaining layers -> projector -> pooling -> selection

Each stage passes on `sources`, multiplied by its merge's weights. These are the stages of EarlyTom; those of "cells",
which pass on other tensors, are in `builder.export.cell_stage`.

A merge always writes n rows; those past the count have zero weights and so are zero. With merging off there is one
stage, both first and last.

Notation: F frames, n frames that arrive at a stage, T = S + prefix tokens a frame inside the tower, P after pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from builder.export import functions
from builder.export.cell_stage import CellStage
from builder.export.stage_graph import StageGraph, layout_of
from builder.export.standing import ADAPTIVE_STANDING, adaptive_standing
from builder.export.vision import OPSET, ExportedGraph, VisionGraph, save, tokens_per_frame, trace
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.encoder import embed, project, run_span
from earlytom.errors import UserError
from earlytom.merge import apply_weights, frame_similarity
from earlytom.methods.earlytom import EarlyTom
from runtime.engine import layout

# Frames of the traced example: not 1, which the exporter would specialise to a constant.
EXAMPLE_FRAMES = 2


class EarlyTomStage(StageGraph):
    """See `StageGraph`."""

    of_tokens = (functions.ADAPTIVE_SELECT_TOKENS, ADAPTIVE_STANDING)

    def __init__(self, whole: VisionGraph, stage: int, frames: int) -> None:
        super().__init__(whole, stage, frames)
        assert isinstance(whole.config, EarlyTomConfig)
        self.config = whole.config

    def forward(self, entering: Tensor, *beside: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        *some, made_of = beside if self.stage else (None,)
        received = some[0] if some else None
        tower = self.whole.tower
        hidden = self.enter(entering)
        static = None if received is None else self._plan(self._similarity(hidden))[1]
        hidden, column = run_span(
            tower,
            self.span,
            hidden,
            EarlyTom(self.config),
            self.whole.layers,
            lambda **found: values.update(found),
            True,
        )
        if not self.last:
            return values | self._merge(hidden, column, made_of)
        if static is None:  # merging is off: this is the only stage
            received, static = column, self._plan(self._similarity(hidden))[1]
        assert received is not None
        values["static"] = static
        seen = project(
            self.whole.vision, hidden[:, tower.prefix :], received, lambda **found: values.update(found), True
        )
        assert seen.relevance is not None
        tokens, positions, count = self._select(seen.features, seen.relevance, static)
        sources = torch.eye(self.frames) if made_of is None else made_of.clone()  # an output must not be an input
        place, bias = self._standing(seen.features, positions, sources, count)
        outputs = (tokens.to(self.whole.dtype), positions, sources, place, bias, count)
        return values | dict(zip((*layout.OUTPUTS, layout.COUNT), outputs, strict=True))

    def body(self, node: ir.Node) -> ir.Function:
        c = self.config
        if node.op_type == functions.ADAPTIVE_FRAME_PLAN:
            return functions.adaptive_frame_plan(
                max_frames=self.frames, max_window=c.max_window, trailing=c.trailing, opset=OPSET
            )
        per_frame = tokens_per_frame(node)
        if node.op_type == ADAPTIVE_STANDING:
            return adaptive_standing(per_frame=per_frame, opset=OPSET)
        ratio = c.retention_ratio  # the node's own is fp32
        return functions.adaptive_select_tokens(frames=self.frames, per_frame=per_frame, ratio=ratio, opset=OPSET)

    def _merge(self, hidden: Tensor, column: Tensor | None, made_of: Tensor | None) -> dict[str, Tensor]:
        layer = self.whole.config.merge_layers[self.stage]
        similarity = self._similarity(hidden)
        weights, _, count = self._plan(similarity)
        values = {f"similarity_{layer}": similarity, f"weights_{layer}": weights}
        # Multiply even by the identity: else the exporter would merge two named values into one.
        sources = weights @ (torch.eye(self.frames) if made_of is None else made_of)
        values |= {layout.MERGED_HIDDEN: apply_weights(weights, hidden), layout.SOURCES: sources, layout.COUNT: count}
        return values if column is None else values | {layout.MERGED_RECEIVED: apply_weights(weights, column)}

    def _similarity(self, hidden: Tensor) -> Tensor:
        return frame_similarity(hidden[:, self.whole.tower.prefix :], self.whole.similarity_dtype)

    def _plan(self, similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A call of AdaptiveFramePlan."""
        c, n = self.config, similarity.shape[0]
        weights, static, count = torch.onnx.ops.symbolic_multi_out(
            f"{functions.DOMAIN}::{functions.ADAPTIVE_FRAME_PLAN}",
            (similarity,),
            {"tau": c.tau, "ema": c.ema, "max_window": c.max_window, "trailing": c.trailing},
            dtypes=(torch.float32, torch.bool, torch.int64),
            shapes=((n, n), (n,), (1,)),
            version=functions.VERSION,
        )
        return weights, static, count

    def _select(self, features: Tensor, relevance: Tensor, static: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A call of AdaptiveSelectTokens."""
        rows = features.shape[0] * features.shape[1]  # stands for M, see `_name_rows`
        tokens, positions, count = torch.onnx.ops.symbolic_multi_out(
            f"{functions.DOMAIN}::{functions.ADAPTIVE_SELECT_TOKENS}",
            (features, relevance, static),
            {"frames": self.frames, "ratio": self.whole.config.retention_ratio},
            dtypes=(features.dtype, torch.int64, torch.int64),
            shapes=((rows, features.shape[2]), (rows,), (1,)),
            version=functions.VERSION,
        )
        return tokens, positions, count

    def _standing(self, features: Tensor, positions: Tensor, sources: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """A call of AdaptiveStanding."""
        rows = positions.shape[0]
        place, bias = torch.onnx.ops.symbolic_multi_out(
            f"{functions.DOMAIN}::{ADAPTIVE_STANDING}",
            (features, positions, sources, count),
            {},
            dtypes=(torch.int64, torch.float32),
            shapes=((rows,), (rows,)),
            version=functions.VERSION,
        )
        return place, bias


def export_chain(graph: VisionGraph, frames: int, size: tuple[int, int], folder: Path) -> tuple[ExportedGraph, ...]:
    """Write one ONNX file per stage, with a weights file beside it where its weights are large.

    Args:
        graph: from `VisionGraph`, in the precision of the engine.
        frames: F.
        size: (H, W) of a frame.
        folder: where the files go, see `runtime.engine.layout.Graph.file`.
    """
    if graph.config.schedule != "adaptive":
        raise UserError(f"a chain of stages is for --schedule adaptive, not {graph.config.schedule}")
    clip = torch.zeros(frames, 3, *size, dtype=torch.uint8)
    with torch.no_grad():
        tokens, width = embed(graph.tower, graph.pixels(clip[:1])).shape[1:]
    examples = {
        layout.FRAMES: clip,
        layout.HIDDEN: torch.zeros(EXAMPLE_FRAMES, tokens, width, dtype=graph.tower.residual_dtype),
        layout.RECEIVED: torch.zeros(EXAMPLE_FRAMES, tokens - graph.tower.prefix),
        layout.MADE_OF: torch.zeros(EXAMPLE_FRAMES, frames),
        layout.CELL_SIZE: torch.zeros(EXAMPLE_FRAMES, tokens - graph.tower.prefix),
        layout.CELL_TIME: torch.zeros(EXAMPLE_FRAMES, tokens - graph.tower.prefix),
        layout.CELL_MADE_OF: torch.zeros(EXAMPLE_FRAMES, tokens - graph.tower.prefix, frames),
    }
    kind = STAGES[graph.config.method]
    return tuple(
        _export_stage(kind(graph, stage, frames), examples, folder)
        for stage in range(len(layout_of(graph, frames).graphs))
    )


def _export_stage(module: StageGraph, examples: dict[str, Tensor], folder: Path) -> ExportedGraph:
    written = module.stages[module.stage]
    inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (written.inputs, written.outputs))
    dynamic = None
    if module.stage:
        arriving = torch.export.Dim("n", min=1, max=max(module.frames, EXAMPLE_FRAMES))
        first, *beside = ({0: arriving} for _ in inputs)
        dynamic = (first, tuple(beside))  # as `forward` takes them
    model = trace(module, {name: examples[name] for name in inputs}, module.names, dynamic)
    _name_rows(model, module.of_tokens)
    path = folder / written.file(layout.ONNX_FILE)
    return save(model, path, outputs, module.body)


def _name_rows(model: ir.Model, of_tokens: Sequence[str]) -> None:
    """Name the first dimension M in the token outputs of the functions `of_tokens` and of the graph: the exporter has
    no symbol for it."""
    chosen = [value for node in model.graph if node.op_type in of_tokens for value in node.outputs[:2]]
    for value in (*chosen, *model.graph.outputs):
        if value in chosen or value.name in layout.OF_TOKENS:
            assert value.shape is not None
            value.shape = ir.Shape(["M", *value.shape[1:]])


STAGES: dict[str, type[StageGraph]] = {EarlyTomConfig.method: EarlyTomStage, CellsConfig.method: CellStage}
"""The stage class of each method that has the adaptive schedule."""
