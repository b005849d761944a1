"""DyCoke's merging in time: of every four frames one stays whole, of the others only what differs.

Frame 1 is compared with frame 0 of its group, 3 with 2, and 2 with 0, cell by cell, and the least similar tokens stay.
So no less than a quarter of all tokens can be left. The released form (`faithful`) leaves the third frame of the last
group whole, and lists what it keeps by rising similarity; the default does neither.

Nothing waits for the device. Notation: F frames, P tokens a frame, E width, N tokens kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

GROUP = 4
EARLIER = (None, 0, 0, 2)  # of each frame of a group, the one that it is compared with


def whole_frames(frames: int, faithful: bool = False) -> list[int]:
    """Which frames stay whole."""
    last = (frames - 1) // GROUP * GROUP
    return [n for n in range(frames) if n % GROUP == 0 or (faithful and n == last + 2)]


def dycoke(features: Tensor, count: int, *, faithful: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens [N, E] and positions `frame * P + place` [N]; `count` tokens stay of each frame that is not whole.

    Args:
        features: [F, P, E].
    """
    frames, per_frame, _ = features.shape
    whole = whole_frames(frames, faithful)
    every = torch.arange(per_frame, device=features.device)
    kept = []
    for frame in range(frames):
        before = EARLIER[frame % GROUP]
        place = every
        if frame not in whole and before is not None:
            other = features[frame - frame % GROUP + before]
            alike = cosine_similarity(features[frame].float(), other.float(), dim=-1)
            place = alike.argsort(stable=True)[:count]
            place = place if faithful else place.sort().values
        kept.append(frame * per_frame + place)
    positions = torch.cat(kept)
    return features.flatten(0, 1).index_select(0, positions), positions
