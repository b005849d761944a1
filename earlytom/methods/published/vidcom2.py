"""VidCom2, the "video compression commander", around a vision part: frames that are unlike the video have more tokens,
and of each frame those stay that are least like the video and the frame.

After its description. How many tokens a frame has is ours where fractions are rounded: seats are given to frames by the
method of highest averages, one to each before all others, so that the count is exact and the first frame is never left
out. Nothing waits for the device.

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
    """See `Compressing`; `round(ratio * F * P)` tokens, and F at least. It has one form.

    Attributes:
        temperature: how much more the frames have that are unlike the video.
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
        of_video = -(unit @ normalize(mean.mean(0), dim=-1))  # [F, P], how unlike the video a token is
        of_frame = -(unit * normalize(mean, dim=-1)[:, None]).sum(-1)
        unlike = of_video.mean(1)[None] / self.temperature  # [1, F]: an engine has no softmax of one dimension
        share = 1 - 1 / frames + unlike.softmax(1)[0]  # [F], 1 on average
        seat = ranks(of_video + of_frame)  # [F, P], whether a token is its frame's first, second, ...
        turn = ((seat + 0.5) / share[:, None]).masked_fill(seat == 0, -1)
        count = self.counts(frames, per_frame).tokens
        positions = slots(best(-turn.flatten(), count), count)
        return features.flatten(0, 1).index_select(0, positions), positions
