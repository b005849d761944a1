"""The method "cells": frames are merged cell by cell inside the tower, diverse tokens are taken after the projector.

`Cells` is the method. Its steps that depend on the video (`plan`, `take`) come from `earlytom.cells`; an exporter
overrides them. `EachCells` handles several videos at once. No received attention is needed, so every layer of the tower
can use fused attention.

Notation: B videos, F frames, F' frames left, T = S + prefix tokens a frame inside the tower, P tokens after pooling, D
tower width, E LLM width, M = F' P, N tokens taken.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from earlytom import ops
from earlytom.budget import frames_per_stage, token_count
from earlytom.cells.config import CellsConfig
from earlytom.cells.merge import CellPlan, merge_marks, plan_cells
from earlytom.cells.select import affinity, likeness, saliency, select_rounds, token_sizes
from earlytom.config import check_layers
from earlytom.errors import UserError
from earlytom.families import Vision
from earlytom.method import SEVERAL_NEED_BUDGET, Counts, Method, Note, State
from earlytom.standing import places, size_bias


@dataclass(kw_only=True)
class CellsState(State):
    """The state of merged cells.

    Attributes:
        cell_size, cell_time: [F', S] fp32, the number of original cells merged into each, and the frame of the video
            that it shows; None before the first merge.
        made: [T, F', F] fp32, weight of each input frame in each token inside the tower; None likewise.
        affine: [M, M] fp32, similarity of tokens; set by `choose`.
    """

    cell_size: Tensor | None = None
    cell_time: Tensor | None = None
    made: Tensor | None = None
    affine: Tensor | None = None


class Cells(Method):
    """See `Method`; its settings are a `CellsConfig`."""

    name = "cells"
    streams = True

    def __init__(self, config: CellsConfig) -> None:
        self.config = config
        self.layers = config.merge_layers

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        return cls(CellsConfig.from_dict(settings))

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    def counts(self, frames: int, tokens_per_frame: int) -> Counts | None:
        """The same as EarlyTom's with the budget schedule, so that both can be compared."""
        if self.config.schedule == "adaptive":
            return None
        stages = frames_per_stage(frames, merges=len(self.layers), frame_budget=self.config.frame_budget)
        return Counts(stages, self._tokens(frames, stages[-1], tokens_per_frame))

    def tower_key(self) -> Hashable:
        return self.config.replace(retention_ratio=1.0, rounds=None)

    def check(self, depth: int) -> None:
        check_layers(self.layers, depth)

    def begin(self, vision: Vision, frames: int, device: torch.device) -> State:
        return CellsState(vision, [frames], torch.eye(frames, device=device))

    # The steps that depend on the video

    def plan(self, hidden: Tensor, frames_out: int | None, prefix: int) -> CellPlan:
        """The merge of `hidden [F, T, D]` to `frames_out` frames (None: adaptive); `prefix` leading tokens are no
        cells."""
        return plan_cells(hidden, frames_out, self.config.power, prefix, threshold=self.config.threshold)

    def take(self, salient: Tensor, alike: Tensor, count: int) -> Tensor:
        """Indices of `count` tokens, [N] int64 ascending, from saliency `[M]` and similarity `[M, M]`, both fp32."""
        if self.config.rounds is None:
            return ops.select_greedy(salient, alike, count)
        return select_rounds(salient, alike, count, self.config.rounds)

    # The hooks

    def after_layer(
        self, layer: int, hidden: Tensor, received: Tensor | None, state: State, note: Note
    ) -> tuple[Tensor, Tensor | None]:
        """Stage I: merge frames cell by cell."""
        assert isinstance(state, CellsState)  # `begin` made it
        frames_out = self._planned(state.frames)[len(state.stages)]
        tower, prefix = state.vision.tower, state.vision.tower.prefix
        plan = each_its_own(hidden) if frames_out == len(hidden) else self.plan(tower.own(hidden), frames_out, prefix)
        frames_out = len(plan.member)
        if frames_out < len(hidden):  # otherwise nothing is merged
            state.cell_size, state.cell_time = merge_marks(plan, *marks(state, hidden[:, prefix:]))
            state.made = plan.weights if state.made is None else plan.weights @ state.made
            state.sources = state.made[prefix:].mean(0)
            hidden = plan.apply(hidden)
        note(**{f"weights_{layer}": plan.weights, f"member_{layer}": plan.member, f"taken_{layer}": plan.taken})
        state.stages.append(frames_out)
        return hidden, received

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        """Stage II: take diverse tokens."""
        assert isinstance(state, CellsState)
        every = features.flatten(0, 1)
        tokens = state.vision.own(every)
        count = self._tokens(state.frames, *features.shape[:2])
        state.size, time = pooled_marks(state, features)
        state.time = time.long()
        state.affine = affinity(tokens, time.flatten(), state.frames)
        if count == len(tokens):  # nothing to leave out
            taken = torch.arange(count, device=tokens.device)
        else:
            taken = self.take(saliency(tokens), likeness(state.affine), count)
        return every.index_select(0, taken), taken

    def standing(self, features: Tensor, positions: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """As in `Method`, from the similarities that `choose` left in `state`."""
        assert isinstance(state, CellsState)
        assert state.affine is not None
        assert state.size is not None
        assert state.time is not None
        sizes = token_sizes(state.affine, state.size.flatten(), positions)
        return places(state.time, positions, features.shape[1]), size_bias(sizes)

    def _planned(self, frames: int) -> tuple[int | None, ...]:
        """Frames before the first merge and after each one; None where they depend on the video (adaptive schedule)."""
        merges = len(self.layers)
        if self.config.schedule == "adaptive":
            return (frames, *([None] * merges))
        return frames_per_stage(frames, merges=merges, frame_budget=self.config.frame_budget)

    def _tokens(self, frames: int, frames_left: int, per_frame: int) -> int:
        """N for a video of `frames` frames, of which `frames_left` remain."""
        return token_count(frames, per_frame, self.config.retention_ratio, frames_out=frames_left)


@dataclass(kw_only=True)
class SeveralStates(State):
    """The states of several videos, one each in `each`."""

    each: list[State]


class EachCells(Cells):
    """`method` on each of several videos, whose frames are concatenated video by video.

    Frame counts are per video. Results have a leading B: sources [B, F', F], tokens [B, N, E], positions, place and
    bias [B, N].
    """

    def __init__(self, method: Cells, videos: int) -> None:
        if method.config.schedule != "budget":
            raise UserError(SEVERAL_NEED_BUDGET.format(method.config.schedule))
        super().__init__(method.config)
        self.method = method
        self.videos = videos

    def begin(self, vision: Vision, frames: int, device: torch.device) -> State:
        each = [self.method.begin(vision, frames, device) for _ in range(self.videos)]
        return SeveralStates(vision, [frames], torch.stack([one.sources for one in each]), each=each)

    def after_layer(
        self, layer: int, hidden: Tensor, received: Tensor | None, state: State, note: Note
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(state, SeveralStates)  # `begin` made it
        noted: dict[str, list[Tensor]] = {}

        def keep(**values: Tensor) -> None:
            for name, value in values.items():
                noted.setdefault(name, []).append(value)

        merged = [
            self.method.after_layer(layer, one, None, own, keep)[0]
            for one, own in zip(self._each(hidden), state.each, strict=True)
        ]
        note(**{name: torch.stack(values) for name, values in noted.items()})
        state.stages = list(state.each[0].stages)
        state.sources = torch.stack([own.sources for own in state.each])
        return torch.cat(merged), received

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        assert isinstance(state, SeveralStates)
        each = zip(self._each(features), state.each, strict=True)
        tokens, positions = zip(*(self.method.choose(one, None, own) for one, own in each), strict=True)
        return torch.stack(tokens), torch.stack(positions)

    def standing(self, features: Tensor, positions: Tensor, state: State) -> tuple[Tensor, Tensor]:
        assert isinstance(state, SeveralStates)
        each = zip(self._each(features), positions, state.each, strict=True)
        place, bias = zip(*(self.method.standing(*one) for one in each), strict=True)
        return torch.stack(place), torch.stack(bias)

    def _each(self, values: Tensor) -> Tensor:
        """[B * F, ...] to [B, F, ...], a view."""
        return values.unflatten(0, (self.videos, -1))


def each_its_own(hidden: Tensor) -> CellPlan:
    """The plan that merges no frames of `hidden [F, T, D]`."""
    frames, tokens = hidden.shape[:2]
    eye, index = torch.eye(frames, device=hidden.device), torch.arange(frames, device=hidden.device)
    return CellPlan(eye.expand(tokens, -1, -1), eye, index[:, None].expand(-1, tokens))


def marks(state: CellsState, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Current sizes and times [F', S] fp32 of `cells [F', S, ...]`."""
    if state.cell_size is None or state.cell_time is None:
        frames, count = cells.shape[:2]
        time = torch.arange(frames, dtype=torch.float32, device=cells.device)
        return torch.ones(frames, count, device=cells.device), time[:, None].expand(frames, count)
    return state.cell_size, state.cell_time


def pooled_marks(state: CellsState, features: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes and times [F', P] fp32 of `features [F', P, E]`, pooled as the tokens were; times are rounded."""
    size, time = marks(state, features)
    if state.cell_size is not None:
        size, time = state.vision.pool(torch.stack([size, time], -1)).unbind(-1)
    return size, time.round()
