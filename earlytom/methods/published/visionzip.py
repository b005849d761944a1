"""VisionZip around a vision part; pure functions: `earlytom.visionzip`.

Attention and likeness are read where the tower's last layer that runs has left them: received attention of that layer,
and the features themselves instead of its keys, which a method is not shown. Notation: F frames, P tokens a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.budget import dynamic_tokens
from earlytom.method import Counts, State
from earlytom.methods.published.compressing import Compressing
from earlytom.visionzip import visionzip


@dataclass(frozen=True)
class VisionZip(Compressing):
    """See `Compressing`; `ceil(ratio * P)` tokens of every frame."""

    name = "visionzip"

    def watched(self, depth: int) -> int:
        return depth - 1

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        return Counts((frames,), frames * dynamic_tokens(tokens_per_frame, self.retention_ratio))

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        assert relevance is not None  # a layer is watched
        frames, per_frame = features.shape[:2]
        tokens, places = self.keep(features, relevance, dynamic_tokens(per_frame, self.retention_ratio))
        start = torch.arange(frames, device=features.device)[:, None] * per_frame
        return tokens.flatten(0, 1), (places + start).flatten()

    def keep(self, features: Tensor, relevance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The step that depends on the video: tokens [F, n, E] and their places [F, n]."""
        return visionzip(features, relevance, features, count, faithful=self.faithful)
