"""DyCoke's merging in time around a vision part; pure functions: `earlytom.dycoke`. What the published method leaves
out of the cache while decoding is not part of it. Notation: F frames, P tokens a frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from earlytom.dycoke import GROUP, dycoke, whole_frames
from earlytom.errors import UserError
from earlytom.method import Counts, State
from earlytom.methods.published.compressing import Compressing


@dataclass(frozen=True)
class DyCoke(Compressing):
    """See `Compressing`. The ratio, 1/4 at least, is that of a whole group of frames; the released one is 0.475: 30 %
    of three frames of four."""

    name = "dycoke"
    retention_ratio: float = 0.475

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retention_ratio < 1 / GROUP:
            raise UserError(
                f"dycoke keeps one frame of {GROUP} whole, so retention_ratio must be at least {1 / GROUP:g}, "
                f"got {self.retention_ratio}"
            )

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        whole = len(whole_frames(frames, self.faithful))
        tokens = whole * tokens_per_frame + (frames - whole) * self._of_others(tokens_per_frame)
        return Counts((frames,), tokens)

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        return dycoke(features, self._of_others(features.shape[1]), faithful=self.faithful)

    def _of_others(self, per_frame: int) -> int:
        """How many tokens of a frame that is not whole: rounded down, but for what is lost in computing the share."""
        share = (GROUP * self.retention_ratio - 1) / (GROUP - 1)
        return min(per_frame, math.floor(round(share * per_frame, 9)))
