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
from earlytom.method import Counts, State
from earlytom.methods.published.compressing import Compressing


@dataclass(frozen=True)
class EVS(Compressing):
    """See `Compressing`; `int(ratio * F * P)` tokens, and P at least: those of the first frame. It has one form."""

    name = "evs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.faithful:
            raise UserError("evs is one rule and has no other released form: leave faithful false")

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        return Counts((frames,), max(tokens_per_frame, int(self.retention_ratio * frames * tokens_per_frame)))

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        frames, per_frame, _ = features.shape
        unit = normalize(features.float(), dim=-1)
        changed = 1 - (unit[1:] * unit[:-1]).sum(-1)  # [F - 1, P]
        first = changed.new_full((1, per_frame), torch.inf)
        order = torch.cat([first, changed]).flatten().argsort(descending=True, stable=True)
        positions = order[: self.counts(frames, per_frame).tokens].sort().values
        return features.flatten(0, 1).index_select(0, positions), positions
