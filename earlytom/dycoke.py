"""DyCoke's temporal merging: of every four frames the first is kept whole, of the others the tokens that changed.

In each group of four, frame 1 is compared with frame 0, 3 with 2, and 2 with 0, position by position, and the least
similar tokens are kept: at least a quarter of all tokens in total. The released form (`faithful`) also keeps the third
frame of the last group whole, and orders kept tokens by rising similarity; the default does neither.

There is no host sync. Notation: F frames, P tokens a frame, E width, N tokens kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from earlytom.ranking import best, slots
from earlytom.untouched import DyCokeConfig

GROUP = DyCokeConfig.GROUP
EARLIER = (0, 0, 0, 2)  # the frame that each frame of a group is compared with; the first is not compared


def whole_frames(frames: int, faithful: bool = False) -> list[int]:
    """Indices of the frames that are kept whole."""
    last = (frames - 1) // GROUP * GROUP
    return [n for n in range(frames) if n % GROUP == 0 or (faithful and n == last + 2)]


def dycoke(
    features: Tensor, count: int, *, faithful: bool = False, metric: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens [N, E] and positions `frame * P + place` [N]; other frames than the whole ones keep `count` tokens each.

    Args:
        features: [F, P, E]; metric: [F, P, d], compared instead of the features.
    """
    frames, per_frame, _ = features.shape
    whole = whole_frames(frames, faithful)
    others = [n for n in range(frames) if n not in whole]
    earlier = [n - n % GROUP + EARLIER[n % GROUP] for n in others]
    seen = (features if metric is None else metric).float()
    mine, before = (seen[:0] if not which else torch.stack([seen[n] for n in which]) for which in (others, earlier))
    alike = cosine_similarity(mine, before, dim=-1)  # [F - whole, P]
    count = min(count, per_frame)
    place = alike.argsort(dim=-1, stable=True)[:, :count] if faithful else slots(best(-alike, count), count)
    every = torch.arange(per_frame, device=features.device)
    found = iter(place.unbind(0))
    positions = torch.cat([n * per_frame + (every if n in whole else next(found)) for n in range(frames)])
    return features.flatten(0, 1).index_select(0, positions), positions
