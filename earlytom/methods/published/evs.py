"""EVS, efficient video sampling, around a vision part: a token stays if its place in the picture changed since the
frame before; the first frame stays whole.

After its description and the rule that vLLM has for it: the least alike tokens of the whole video stay, wherever they
are, so that the count is exact. Nothing waits for the device.

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

NEW = 4.0  # more than any cosine differs from 1: the first frame goes before all


@dataclass(frozen=True)
class EVS(Exported):
    """See `Compressing`; `int(ratio * F * P)` tokens, and P at least: those of the first frame. It has one form."""

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
