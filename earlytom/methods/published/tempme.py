"""ToMe, and TempMe's schedule: similar tokens are merged, within frames and across neighbouring ones.

Only the merge step and the schedule are here, which need no training; TempMe's trained adapters and temporal embeddings
are in `earlytom.tempme.clip`, the published path. Both methods merge twice.

Inside the tower, if `depth` is given: after every layer tokens are merged by their hidden states, as the schedule says,
since a layer runs as a whole. (As published: after the layer's attention, by its keys, with attention proportional to
size.) The projector's pooling needs a grid, so after the last layer each cell gets a copy of the token it was merged
into. This makes the tower cheaper, not the language model.

After the projector: tokens are merged again, by the features themselves, to the retention ratio; copies of one token
merge first. A merged token keeps the place of the cell that others were merged into; tokens are ordered by place.

Notation: F frames, T = S + prefix tokens a frame inside the tower, P tokens after pooling, m frames a clip, C = F / m
clips, n tokens a clip, N tokens kept.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlytom.bipartite import Matching, match, reduce
from earlytom.errors import UserError
from earlytom.families import Vision
from earlytom.method import Counts, Note, State
from earlytom.methods.published.compressing import Exported
from earlytom.numbers import whole
from earlytom.ranking import ascending, at
from earlytom.tempme.block import join
from earlytom.tempme.schedule import LayerMerge, TempMeSchedule
from earlytom.untouched import tokens_of_clip


@dataclass(kw_only=True)
class MergedState(State):
    """The state of merged tokens inside the tower.

    Attributes:
        plan: the merge of each layer; empty before the first merge.
        tokens: [C, n] fp32, the number of original tokens in each; None before the first merge.
        where: [F, T] int64, the token of its clip that each original token was merged into; None likewise.
    """

    plan: list[LayerMerge]
    tokens: Tensor | None = None
    where: Tensor | None = None

    @property
    def ran(self) -> tuple[tuple[int, int], ...]:
        return tuple((merge.clips, merge.tokens + merge.within) for merge in self.plan)


@dataclass(frozen=True)
class TokenMerging(Exported):
    """Base class of ToMe and TempMe.

    Attributes:
        each: tokens merged in each frame by every layer of the tower before the first merge layer.
        depth: layers of the tower that run; None: no merging inside the tower.
    """

    streams = False  # merging inside the tower compares whole hidden states, earlier layers' included
    each: int = 0
    depth: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule = self._schedule()
        if self.depth is not None:
            whole("depth", self.depth, 1)
            if any(not 1 <= layer < self.depth for layer in schedule.merge_layers):
                raise UserError(
                    f"merge_layers must be between 1 and {self.depth - 1} to act inside a tower of {self.depth} "
                    f"layers, got {list(schedule.merge_layers)}"
                )
            first = 0 if self.each else min(schedule.merge_layers, default=self.depth) - 1
            object.__setattr__(self, "layers", tuple(range(first, self.depth)))  # of `Method`; the class is frozen

    def _schedule(self) -> TempMeSchedule:
        return TempMeSchedule(self.each, (), (), 0, 0)

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        clip = self._clip(frames)
        return Counts((frames,), frames // clip * self._tokens(clip, tokens_per_frame))

    def tower_key(self) -> Hashable:
        return ("merged", self._schedule(), self.depth) if self.depth else super().tower_key()

    def check(self, depth: int) -> None:
        if self.depth not in (None, depth):
            raise UserError(f"depth must be the {depth} layers of the vision tower that run, got {self.depth}")

    # Inside the tower

    def begin(self, vision: Vision, frames: int, device: torch.device) -> State:
        return MergedState(vision, [frames], torch.eye(frames, device=device), plan=[])

    def after_layer(
        self, layer: int, hidden: Tensor, received: Tensor | None, state: State, note: Note
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(state, MergedState)  # `begin` made it
        assert self.depth is not None  # or there would be no layers
        prefix = state.vision.tower.prefix
        if state.tokens is None:
            frames, count = hidden.shape[:2]
            state.plan = self._schedule().plan(frames, count, self.depth, protected=prefix)
            state.tokens = torch.ones(frames, count, device=hidden.device)
            state.where = torch.arange(count, device=hidden.device).repeat(frames, 1)
        own = state.plan[layer]
        if own.within:
            hidden = _apply(match(hidden, own.within, protected=own.protected), hidden, state)
        if layer + 1 < self.depth and (after := state.plan[layer + 1]).group > 1:
            hidden = _across(hidden, own.protected, after, state)
        return (_put_back(hidden, state, prefix) if layer + 1 == self.depth else hidden), received

    # After the projector

    def by(self, features: Tensor, relevance: Tensor | None, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
        frames, per_frame, _ = features.shape
        clip = self._clip(frames)
        joined, likes = (
            None if values is None else values.unflatten(0, (-1, clip)).flatten(1, 2)  # [C, m * P, E]
            for values in (features, metric)
        )
        assert joined is not None
        found = reduce(joined, self._tokens(clip, per_frame), metric=likes, protected=self._protected())
        order = ascending(found.place)
        tokens = at(found.values, order)
        start = torch.arange(frames // clip, device=features.device)[:, None] * (clip * per_frame)
        return tokens.flatten(0, 1), (found.place.gather(1, order) + start).flatten()

    def _clip(self, frames: int) -> int:
        """m: the product of the schedule's groups, or its greatest common divisor with the number of frames."""
        return math.gcd(frames, math.prod(self._schedule().groups))

    def _tokens(self, clip: int, per_frame: int) -> int:
        """Tokens kept of a clip."""
        return tokens_of_clip(clip * per_frame, self.retention_ratio, self._protected())

    def _protected(self) -> int:
        return 0


@dataclass(frozen=True)
class ToMe(TokenMerging):
    """See `TokenMerging`. In the released form for such models the first token of a clip, here a frame, is protected
    like a class token.

    Attributes:
        each: released: 8 to 16 of 197 tokens.
    """

    name = "tome"

    def _protected(self) -> int:
        return int(self.faithful)


@dataclass(frozen=True)
class TempMe(TokenMerging):
    """See `TokenMerging` and `TempMeSchedule`.

    Attributes:
        merge_layers, groups, across, within: as in `TempMeSchedule`; only `groups` matter after the projector.
    """

    name = "tempme"
    merge_layers: tuple[int, ...] = (8, 14, 20)
    groups: tuple[int, ...] = (2, 2, 2)
    across: int = 30
    within: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "merge_layers", self._schedule().merge_layers)  # lists become tuples
        object.__setattr__(self, "groups", self._schedule().groups)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in super().to_dict().items()}

    def _schedule(self) -> TempMeSchedule:
        return TempMeSchedule(self.each, self.merge_layers, self.groups, self.across, self.within, self.faithful)


def _apply(found: Matching, hidden: Tensor, state: MergedState) -> Tensor:
    """Merge tokens of each clip, and record in `state` where they went."""
    assert state.tokens is not None
    assert state.where is not None
    merged, state.tokens = found.merge(hidden.float(), state.tokens)
    owner = found.owner().repeat_interleave(len(state.where) // len(hidden), 0, output_size=len(state.where))
    state.where = owner.gather(1, state.where)
    return merged.to(hidden.dtype)


def _across(hidden: Tensor, protected: int, merge: LayerMerge, state: MergedState) -> Tensor:
    """Join neighbouring clips and merge across them, before the next layer."""
    assert state.tokens is not None
    assert state.where is not None
    count, per_clip = hidden.shape[1], len(state.where) // len(hidden)
    slot = torch.arange(len(state.where), device=hidden.device)[:, None] // per_clip % merge.group
    leads = state.where < protected
    patches = protected * merge.group + slot * (count - protected) - protected
    state.where = state.where + torch.where(leads, slot * protected, patches)
    hidden = join(hidden, merge.group, protected)
    state.tokens = join(state.tokens[..., None], merge.group, protected)[..., 0]
    return _apply(match(hidden, merge.across, protected=merge.protected), hidden, state) if merge.across else hidden


def _put_back(hidden: Tensor, state: MergedState, prefix: int) -> Tensor:
    """Copy merged tokens back to all cells, [C, n, D] to [F, T, D], and update `state.sources`."""
    assert state.tokens is not None
    assert state.where is not None
    clips, clip = len(hidden), len(state.where) // len(hidden)
    where = state.where.unflatten(0, (clips, clip))  # [C, m, T]
    # The number of each token's parts in each frame: whole numbers, so the order of `scatter_add` does not matter.
    parts = torch.zeros(clips, clip, hidden.shape[1], device=hidden.device)
    parts = parts.scatter_add(2, where, torch.ones_like(where, dtype=parts.dtype))
    shares = (parts / parts.sum(1, keepdim=True).clamp_min(1)).transpose(1, 2)  # [C, n, m]
    cells = where[:, :, prefix:].flatten(1)[:, :, None].expand(-1, -1, clip)
    made = shares.gather(1, cells).unflatten(1, (clip, -1)).mean(2)  # [C, m, m]
    state.sources = torch.block_diag(*made) @ state.sources
    index = where.flatten(1)[:, :, None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index).unflatten(1, (clip, -1)).flatten(0, 1)
