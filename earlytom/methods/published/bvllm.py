"""An approximation of B-VLLM without its Q-Formers, not the published method.

B-VLLM's frame selection is trained for another vision tower and depends on the question. Here at most sixteen
candidates have anchor frames evenly spaced in time, and each is a soft mixture of the frames similar to its anchor; the
question is ignored. The untrained parts are as published: candidates made of the same frames are merged, and each
survivor's tokens are merged to its share of the budget. A merged token keeps the place of the cell that others were
merged into, in the anchor frame. `earlytom.bvllm.path` is the published path, which needs trained weights.

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
    """See `Compressing`. The released form loses what was merged into a candidate that is itself merged.

    Attributes:
        threshold: candidates more similar than this are merged, in [0, 1].
        sharpness: factor of the cosines to the anchor, before the softmax of temperature `TEMPERATURE`.
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
        # Equal shares as published; here of the retention ratio's budget, and at least one token each.
        budget = round(self.retention_ratio * frames * per_frame)
        reduced = merge_tokens(kept, max(1, budget // len(kept)))
        order = reduced.place.argsort(dim=-1, stable=True)
        values = reduced.values.gather(1, order[:, :, None].expand(-1, -1, features.shape[-1]))
        positions = reduced.place.gather(1, order) + anchors[found.survives][:, None] * per_frame
        return values.flatten(0, 1).to(features.dtype), positions.flatten()

    def rows(self, features: Tensor, anchors: Tensor) -> Tensor:
        """Weight of each frame in each candidate, [k, F] fp32, from cosines of the frames' mean tokens less the video's
        mean."""
        means = features.float().mean(1)
        means = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
        return torch.softmax(self.sharpness * (means[anchors] @ means.T) / TEMPERATURE, -1)
