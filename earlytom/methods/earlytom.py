"""EarlyTom: similar frames are merged inside the tower, and tokens are selected after the projector.

`EarlyTom` is the method. Its steps that depend on the video (`similarity`, `plan`, `select`, `select_varying`) are
overridden by an exporter or a timer; by default they call `earlytom.ops` and `earlytom.select`. `EachVideo` handles
several videos at once.

Notation: B videos, F frames, F' frames left, T = S + prefix tokens a frame inside the tower, P tokens after pooling, D
tower width, E LLM width, N tokens kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from earlytom import ops
from earlytom.budget import dynamic_tokens, effective_ratio, frames_per_stage, static_tokens, token_count
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.families import Vision
from earlytom.inner import InnerSettings
from earlytom.merge import apply_weights
from earlytom.method import SEVERAL_NEED_BUDGET, Counts, Method, Note, State
from earlytom.select import select_varying


class EarlyTom(Method):
    """See `Method`; its settings are an `EarlyTomConfig`."""

    name = "earlytom"
    streams = True

    def __init__(self, config: EarlyTomConfig) -> None:
        self.config = config
        self.layers = config.merge_layers
        if config.merges_inside:
            assert config.inner_layer is not None  # `merges_inside` implies it
            self.inner = InnerSettings(config.inner_layer, config.inner_ratio)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        return cls(EarlyTomConfig.from_dict(settings))

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    def counts(self, frames: int, tokens_per_frame: int) -> Counts | None:
        c = self.config
        if c.schedule == "adaptive":
            return None
        stages = frames_per_stage(frames, merges=len(c.merge_layers), frame_budget=c.frame_budget)
        return Counts(stages, token_count(frames, tokens_per_frame, c.retention_ratio, frames_out=stages[-1]))

    def tower_key(self) -> Hashable:
        return self.config.replace(retention_ratio=1.0)

    def check(self, depth: int) -> None:
        self.config.check_layers(depth)

    def watched(self, depth: int) -> int:
        """The last merge layer; with merging off the last layer."""
        return self.layers[-1] if self.layers else depth - 1

    # The steps that depend on the video

    def similarity(self, hidden: Tensor) -> Tensor:
        """Similarity of frames, [F, F] fp32, from `hidden [F, S, D]`."""
        return ops.frame_similarity(hidden)

    def plan(self, similarity: Tensor, frames_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Merge weights [F', F] fp32, segment starts [F] int64 and static [F] bool from `similarity [F, F]`.

        `frames_out` is F', None with the adaptive schedule.
        """
        c = self.config
        weights, static, start, count = ops.frame_plan(similarity, frames_out, c.tau, c.max_window, c.ema, c.trailing)
        if frames_out is None:
            weights = weights[: int(count)]  # the adaptive schedule's one host sync
        return weights, start, static

    def select(self, features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """`places` tokens of every frame: tokens [F' * places, E], positions [F' * places] int64."""
        return ops.select_tokens(features, received, static, places)

    def select_varying(
        self, features: Tensor, received: Tensor, static: Tensor, places: int, windows: int
    ) -> tuple[Tensor, Tensor]:
        """`places` tokens of a dynamic frame, `windows` of a static one, with a host sync: tokens [N, E], positions [N]
        int64."""
        return select_varying(features, received, static, places, windows)

    # The hooks

    def after_layer(
        self, layer: int, hidden: Tensor, received: Tensor | None, state: State, note: Note
    ) -> tuple[Tensor, Tensor | None]:
        """Stage I: merge similar frames."""
        tower = state.vision.tower
        similarity = self.similarity(tower.own(hidden)[:, tower.prefix :])
        weights, _, _ = self.plan(similarity, self._planned(state.frames)[len(state.stages)])
        note(**{f"similarity_{layer}": similarity, f"weights_{layer}": weights})
        hidden = apply_weights(weights, hidden)
        state.sources = weights @ state.sources
        state.stages.append(weights.shape[-2])
        return hidden, None if received is None else apply_weights(weights, received)

    def look(self, hidden: Tensor, state: State) -> None:
        """Set the final segments, from the merged frames."""
        tower = state.vision.tower
        final = self.similarity(tower.own(hidden)[:, tower.prefix :])
        _, state.start, state.static = self.plan(final, state.stages[-1])

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        """Stage II: select tokens."""
        assert relevance is not None  # a layer is watched
        assert state.static is not None  # `look` set it
        return self.keep(features, relevance, state.static, state.frames)

    def keep(self, features: Tensor, relevance: Tensor, static: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """The kept tokens [N, E] and their positions [N] int64, of a video of `frames` frames merged to F'."""
        kept, per_frame = static.shape[-1], features.shape[1]
        effective = effective_ratio(self.config.retention_ratio, frames, kept)
        places = dynamic_tokens(per_frame, effective)
        windows = places if self.config.schedule == "budget" else static_tokens(per_frame, effective)
        if places == windows == per_frame:  # nothing to leave out
            positions = torch.arange(kept * per_frame, device=features.device)
            tokens = features.reshape(*static.shape[:-1], len(positions), features.shape[2])
            return tokens, positions.expand(tokens.shape[:-1])
        if self.config.schedule == "budget":
            return self.select(features, relevance, static, places)
        return self.select_varying(features, relevance, static, places, windows)

    def _planned(self, frames: int) -> tuple[int | None, ...]:
        """Frames before the first merge and after each one; None where they depend on the video (adaptive schedule)."""
        merges = len(self.layers)
        if self.config.schedule == "adaptive":
            return (frames, *([None] * merges))
        return frames_per_stage(frames, merges=merges, frame_budget=self.config.frame_budget)


class EachVideo(EarlyTom):
    """`method` on each of several videos, whose frames are concatenated video by video.

    Frame counts are per video. Results have a leading B: similarity [B, F, F], weights and sources [B, F', F], segment
    start and static [B, F], tokens [B, N, E], positions, place and bias [B, N].
    """

    def __init__(self, method: EarlyTom, videos: int) -> None:
        if method.config.schedule != "budget":
            raise UserError(SEVERAL_NEED_BUDGET.format(method.config.schedule))
        super().__init__(method.config)
        self.method = method
        self.videos = videos

    def similarity(self, hidden: Tensor) -> Tensor:
        return torch.stack([self.method.similarity(one) for one in self._each(hidden)])

    def plan(self, similarity: Tensor, frames_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        weights, start, static = zip(*(self.method.plan(one, frames_out) for one in similarity), strict=True)
        return torch.stack(weights), torch.stack(start), torch.stack(static)

    def select(self, features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
        each = zip(self._each(features), self._each(received), static, strict=True)
        tokens, positions = zip(*(self.method.select(*one, places) for one in each), strict=True)
        return torch.stack(tokens), torch.stack(positions)

    def begin(self, vision: Vision, frames: int, device: torch.device) -> State:
        state = super().begin(vision, frames, device)
        state.sources = state.sources.expand(self.videos, -1, -1)
        return state

    def standing(self, features: Tensor, positions: Tensor, state: State) -> tuple[Tensor, Tensor]:
        each = zip(self._each(features), positions, state.sources, strict=True)
        place, bias = zip(
            *(self.method.standing(one, where, replace(state, sources=made)) for one, where, made in each), strict=True
        )
        return torch.stack(place), torch.stack(bias)

    def _each(self, values: Tensor) -> Tensor:
        """[B * F, ...] to [B, F, ...], a view."""
        return values.unflatten(0, (self.videos, -1))
