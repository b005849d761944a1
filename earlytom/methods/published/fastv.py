"""FastV: all visual tokens enter the language model; before an early layer those to which the prompt's last token
attends least are dropped. Vision tower, projector and earlier layers see all tokens: only the later layers' prefill
becomes cheaper. `earlytom.inner` does it, without folding. Notation: F frames, P tokens a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.inner import InnerSettings
from earlytom.method import Counts, State
from earlytom.methods.published.compressing import Compressing
from earlytom.numbers import whole


@dataclass(frozen=True)
class FastV(Compressing):
    """See `Compressing`; the ratio holds from `inner_layer` on. It has one form.

    Attributes:
        inner_layer: layer of the language model, 1 or more; released: 2, with a ratio of 0.5.
    """

    name = "fastv"
    inner_layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.faithful:
            raise UserError("fastv has one form: leave faithful false")
        whole("inner_layer", self.inner_layer, 1)
        if self.retention_ratio < 1:
            found = InnerSettings(self.inner_layer, 1 - self.retention_ratio, fold=False)
            object.__setattr__(self, "inner", found)  # of `Method`; the class is frozen

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        return Counts((frames,), frames * tokens_per_frame)

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        tokens = features.flatten(0, 1)
        return tokens, torch.arange(len(tokens), device=tokens.device)
