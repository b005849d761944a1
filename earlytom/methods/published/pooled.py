""" "Unified spatiotemporal compression" after its description, from the pure functions of `earlytom.pooled`.

Notation: F frames, P tokens a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from earlytom.errors import UserError
from earlytom.method import Counts, State
from earlytom.methods.published.compressing import Compressing
from earlytom.numbers import real
from earlytom.pooled import pooled


@dataclass(frozen=True)
class Pooled(Compressing):
    """See `Compressing`; `round(ratio * F * P)` tokens, at least one. It has one form: no released code was available.

    Attributes:
        alike, clustered: as in `earlytom.pooled.pooled`.
    """

    name, watches = "unified", True
    alike: float = 0.7
    clustered: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.faithful:
            raise UserError("unified follows a description and has no released form: leave faithful false")
        real("alike", self.alike, -1, 1)
        real("clustered", self.clustered, 0, 1)

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        return Counts((frames,), self._tokens(frames * tokens_per_frame))

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        assert relevance is not None  # a layer is watched
        count = self._tokens(features.shape[:2].numel())
        return pooled(features, relevance, count, alike=self.alike, clustered=self.clustered)

    def _tokens(self, tokens: int) -> int:
        return max(1, round(self.retention_ratio * tokens))
