"""VidCom2, the "video compression commander": frames less similar to the video get more tokens, and each frame keeps
the tokens least similar to the video and to the frame.

After its description; the rounding of frames' shares is ours: one token for each frame, then the others by the method
of highest averages (Webster's), so that the count is exact and no frame is left out. There is no host sync.

Notation: F frames, P tokens a frame, N tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from earlytom.errors import UserError
from earlytom.methods.published.compressing import Exported
from earlytom.numbers import real
from earlytom.ranking import best, ranks, slots


@dataclass(frozen=True)
class VidCom2(Exported):
    """See `Compressing`; `round(ratio * F * P)` tokens, and at least F. It has one form.

    Attributes:
        temperature: of the softmax over frames' dissimilarity to the video; lower is more uneven.
    """

    name = "vidcom2"
    temperature: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.faithful:
            raise UserError("vidcom2 follows a description and has no released form here: leave faithful false")
        real("temperature", self.temperature, 0, low_open=True)

    def by(self, features: Tensor, relevance: Tensor | None, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
        frames, per_frame, _ = features.shape
        values = (features if metric is None else metric).float()
        unit, mean = normalize(values, dim=-1), values.mean(1)  # [F, P, E] and [F, E]
        of_video = -(unit @ normalize(mean.mean(0), dim=-1))  # [F, P], a token's dissimilarity to the video
        of_frame = -(unit * normalize(mean, dim=-1)[:, None]).sum(-1)
        unlike = of_video.mean(1)[None] / self.temperature  # [1, F]: engines have no softmax over a 1-D tensor
        share = 1 - 1 / frames + unlike.softmax(1)[0]  # [F], 1 on average
        seat = ranks(of_video + of_frame)  # [F, P], a token's rank in its frame, from 0
        turn = ((seat + 0.5) / share[:, None]).masked_fill(seat == 0, -1)
        count = self.counts(frames, per_frame).tokens
        positions = slots(best(-turn.flatten(), count), count)
        return features.flatten(0, 1).index_select(0, positions), positions
