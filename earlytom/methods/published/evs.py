"""EVS, efficient video sampling: a token is kept if it differs from the token at its place in the previous frame; the
first frame is kept whole.

After its description and vLLM's rule: tokens of the whole video are ranked by that difference, so the count is exact.
There is no host sync.

Notation: F frames, P tokens a frame, N tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from earlytom.errors import UserError
from earlytom.methods.published.compressing import Exported
from earlytom.ranking import best, slots

NEW = 4.0  # the first frame's score, above any 1 - cosine


@dataclass(frozen=True)
class EVS(Exported):
    """See `Compressing`; `int(ratio * F * P)` tokens, and at least the P of the first frame. It has one form."""

    name = "evs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.faithful:
            raise UserError("evs is one rule and has no other released form: leave faithful false")

    def by(self, features: Tensor, relevance: Tensor | None, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
        frames, per_frame, _ = features.shape
        unit = normalize((features if metric is None else metric).float(), dim=-1)
        changed = 1 - (unit[1:] * unit[:-1]).sum(-1)  # [F - 1, P]
        score = torch.cat([changed.new_full((1, per_frame), NEW), changed]).flatten()
        count = self.counts(frames, per_frame).tokens
        positions = slots(best(score, count), count)
        return features.flatten(0, 1).index_select(0, positions), positions
