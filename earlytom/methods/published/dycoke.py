"""DyCoke's temporal merging, from the pure functions of `earlytom.dycoke`, without its pruning of the KV cache while
decoding. Notation: F frames, P tokens a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from earlytom.dycoke import dycoke, whole_frames
from earlytom.method import Counts
from earlytom.methods.published.compressing import Exported
from earlytom.untouched import DyCokeConfig


@dataclass(frozen=True)
class DyCoke(Exported):
    """See `Compressing`. The ratio is that of a group of four frames, at least 1/4; released 0.475: one frame whole and
    30 % of the other three."""

    name = "dycoke"
    retention_ratio: float = 0.475

    def __post_init__(self) -> None:
        super().__post_init__()
        DyCokeConfig(self.retention_ratio)  # refuses ratios below 1/4

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        whole = len(whole_frames(frames, self.faithful))
        return Counts((frames,), whole * tokens_per_frame + (frames - whole) * self._of_others(tokens_per_frame))

    def by(self, features: Tensor, relevance: Tensor | None, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return dycoke(features, self._of_others(features.shape[1]), faithful=self.faithful, metric=metric)

    def _of_others(self, per_frame: int) -> int:
        return DyCokeConfig(self.retention_ratio).of_others(per_frame)
