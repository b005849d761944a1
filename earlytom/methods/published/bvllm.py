"""A likeness of B-VLLM without its Q-Formers: an approximation, not the published method.

What chooses frames in B-VLLM is trained, for another vision tower, and reads the question. Here sixteen candidates are
anchored in time instead, each a soft mixture of the frames that look like its anchor; text plays no part. What needs no
training is as published: candidates that are made of the same frames are merged, and each survivor's tokens are merged
to its share of the budget. A token keeps the place of the cell that others were merged into, in the candidate's own
frame. `earlytom.bvllm.path` has the published path, for who has the weights.

Notation: F frames, P tokens a frame, E LLM width, k candidates, L survivors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.bvllm.frames import THRESHOLD, merge_candidates, merge_tokens
from earlytom.bvllm.path import CHOOSERS, TEMPERATURE
from earlytom.method import State
from earlytom.methods.controls import even_frames
from earlytom.methods.published.compressing import Compressing
from earlytom.numbers import real


@dataclass(frozen=True)
class BVLLMStyle(Compressing):
    """See `Compressing`. The released form loses what was merged into a candidate that is merged away itself.

    Attributes:
        threshold: candidates more alike than this are merged, in [0, 1].
        sharpness: how much a candidate prefers frames like its anchor: what cosines are multiplied by.
    """

    name = "bvllm-style"
    threshold: float = THRESHOLD
    sharpness: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        real("threshold", self.threshold, 0, 1)
        real("sharpness", self.sharpness, 0)

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        frames, per_frame, _ = features.shape
        anchors = torch.tensor(even_frames(frames, min(CHOOSERS, frames)), device=features.device)
        rows = self.rows(features, anchors)
        found = merge_candidates(rows, self.threshold)
        candidates = (rows @ features.float().flatten(1)).unflatten(1, features.shape[1:])
        kept = found.merge(candidates, faithful=self.faithful)
        # As published an equal share of the budget each; here of the retention ratio's, and one token at least.
        budget = round(self.retention_ratio * frames * per_frame)
        reduced = merge_tokens(kept, max(1, budget // len(kept)))
        order = reduced.place.argsort(dim=-1, stable=True)
        values = reduced.values.gather(1, order[:, :, None].expand(-1, -1, features.shape[-1]))
        positions = reduced.place.gather(1, order) + anchors[found.survives][:, None] * per_frame
        return values.flatten(0, 1).to(features.dtype), positions.flatten()

    def rows(self, features: Tensor, anchors: Tensor) -> Tensor:
        """How much of each frame each candidate is made of, [k, F]: by how much their mean tokens are alike, about the
        video's mean."""
        means = features.float().mean(1)
        means = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
        return torch.softmax(self.sharpness * (means[anchors] @ means.T) / TEMPERATURE, -1)
