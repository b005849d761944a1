"""A stage of the adaptive schedule of "cells"; see `builder.export.chain`.

    stage 0        frames -> layers up to the first merge -> plan -> merge
    stage 1, ...   hidden states -> layers up to the next merge -> plan -> merge
    last stage     hidden states -> the remaining layers -> projector -> pooling -> tokens, as many as n frames give

Each stage also passes on the cells' sizes, times and source weights. Received attention is not used.

Notation: F frames, n frames that arrive at a stage, S cells a frame inside the tower, T = S + prefix tokens, P after
pooling, M = n P.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from builder.export import adaptive_cells as functions
from builder.export.functions import DOMAIN, VERSION
from builder.export.stage_graph import StageGraph
from builder.export.vision import OPSET, VisionGraph
from earlytom.cells.config import CellsConfig
from earlytom.cells.merge import CellPlan, merge_marks
from earlytom.cells.select import affinity, likeness, saliency
from earlytom.encoder import project, run_span
from earlytom.methods.cells import Cells
from runtime.engine import layout


class CellStage(StageGraph):
    """See `StageGraph`."""

    of_tokens = (functions.ADAPTIVE_TAKE_CELLS, functions.ADAPTIVE_CELL_STANDING)

    def __init__(self, whole: VisionGraph, stage: int, frames: int) -> None:
        super().__init__(whole, stage, frames)
        assert isinstance(whole.config, CellsConfig)
        self.config = whole.config

    def forward(self, entering: Tensor, *beside: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}

        def note(**found: Tensor) -> None:
            values.update(found)

        hidden = self.enter(entering)
        hidden, _ = run_span(self.whole.tower, self.span, hidden, Cells(self.config), self.whole.layers, note, True)
        size, time, made = beside or self._untouched(hidden.shape[1] - self.whole.tower.prefix)
        if not self.last:
            return values | self._merge(hidden, size, time, made)
        found = project(self.whole.vision, hidden[:, self.whole.tower.prefix :], None, note, True)
        features = found.features
        size, time = self.whole.vision.pool(torch.stack([size, time], -1)).unbind(-1)
        when = time.round()
        affine = affinity(features.flatten(0, 1), when.flatten(), self.frames)
        tokens, positions, count = self._take(features, affine)
        place, bias = self._standing(affine, when.long(), size, positions)
        outputs = (tokens.to(self.whole.dtype), positions, made.mean(1), place, bias, count)
        return values | dict(zip((*layout.OUTPUTS, layout.COUNT), outputs, strict=True))

    def body(self, node: ir.Node) -> ir.Function:
        c = self.config
        if node.op_type == functions.ADAPTIVE_CELL_PLAN:
            return functions.adaptive_cell_plan(prefix=self.whole.tower.prefix, opset=OPSET)
        given = node.inputs[0 if node.op_type == functions.ADAPTIVE_TAKE_CELLS else 1]  # features or times
        assert given is not None
        assert given.shape is not None
        per_frame = given.shape[1]
        assert isinstance(per_frame, int)  # only the number of frames is dynamic
        if node.op_type == functions.ADAPTIVE_CELL_STANDING:
            return functions.adaptive_cell_standing(per_frame=per_frame, opset=OPSET)
        ratio = c.retention_ratio  # the node's own is fp32
        return functions.adaptive_take_cells(
            frames=self.frames, per_frame=per_frame, ratio=ratio, rounds=c.rounds, opset=OPSET
        )

    def _untouched(self, cells: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sizes [F, S], times [F, S] and source weights [F, S, F] of cells before any merge."""
        eye = torch.eye(self.frames)
        time = torch.arange(self.frames, dtype=torch.float32)
        return (
            torch.ones(self.frames, cells),
            time[:, None].expand(-1, cells),
            eye[:, None].expand(-1, cells, -1),
        )

    def _merge(self, hidden: Tensor, size: Tensor, time: Tensor, made: Tensor) -> dict[str, Tensor]:
        layer, prefix = self.config.merge_layers[self.stage], self.whole.tower.prefix
        plan, count = self._plan(hidden)
        size, time = merge_marks(plan, size, time)
        of_cells = (plan.weights[prefix:] @ made.transpose(0, 1)).transpose(0, 1)
        outputs = {layout.HIDDEN: plan.apply(hidden), layout.CELL_SIZE: size, layout.CELL_TIME: time}
        outputs[layout.CELL_MADE_OF] = of_cells
        values = {f"weights_{layer}": plan.weights, f"member_{layer}": plan.member, f"taken_{layer}": plan.taken}
        return values | {layout.BETWEEN[name]: value for name, value in outputs.items()} | {layout.COUNT: count}

    def _plan(self, hidden: Tensor) -> tuple[CellPlan, Tensor]:
        """A call of AdaptiveCellPlan."""
        (n, tokens, _), c = hidden.shape, self.config
        weights, member, taken, count = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{functions.ADAPTIVE_CELL_PLAN}",
            (hidden,),
            {"threshold": c.threshold, "power": c.power, "prefix": self.whole.tower.prefix},
            dtypes=(torch.float32, torch.float32, torch.int64, torch.int64),
            shapes=((tokens, n, n), (n, n), (n, tokens), (1,)),
            version=VERSION,
        )
        return CellPlan(weights, member, taken), count

    def _take(self, features: Tensor, affine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A call of AdaptiveTakeCells."""
        rows = features.shape[0] * features.shape[1]  # stands for N, see `builder.export.chain`
        tokens, positions, count = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{functions.ADAPTIVE_TAKE_CELLS}",
            (features, saliency(features.flatten(0, 1)), likeness(affine)),
            {"frames": self.frames, "ratio": self.config.retention_ratio, "rounds": self.config.rounds or 0},
            dtypes=(features.dtype, torch.int64, torch.int64),
            shapes=((rows, features.shape[2]), (rows,), (1,)),
            version=VERSION,
        )
        return tokens, positions, count

    def _standing(self, affine: Tensor, time: Tensor, size: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A call of AdaptiveCellStanding."""
        rows = positions.shape[0]
        place, bias = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{functions.ADAPTIVE_CELL_STANDING}",
            (affine, time, size, positions),
            {},
            dtypes=(torch.int64, torch.float32),
            shapes=((rows,), (rows,)),
            version=VERSION,
        )
        return place, bias
