"""VisionZip, from the pure functions of `earlytom.visionzip`.

Attention is that received in the last layer that runs. Similarity is that of the features, not of the layer's keys as
published: methods have no access to keys. Notation: F frames, P tokens a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.budget import dynamic_tokens
from earlytom.methods.published.compressing import Exported
from earlytom.visionzip import visionzip


@dataclass(frozen=True)
class VisionZip(Exported):
    """See `Compressing`; `ceil(ratio * P)` tokens of every frame."""

    name, watches = "visionzip", True

    def by(self, features: Tensor, relevance: Tensor | None, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert relevance is not None  # a layer is watched
        frames, per_frame = features.shape[:2]
        count = dynamic_tokens(per_frame, self.retention_ratio)
        likes = features if metric is None else metric
        tokens, places = visionzip(features, relevance, likes, count, faithful=self.faithful)
        start = torch.arange(frames, device=features.device)[:, None] * per_frame
        return tokens.flatten(0, 1), (places + start).flatten()
