"""VisionZip: every frame keeps its most attended (dominant) tokens, and a few contextual tokens represent the rest.

Contextual tokens are evenly spaced among those that are not dominant; each of the rest joins the most similar one. As
published (`faithful`) a contextual token becomes the sum of itself and the mean of its members, about twice as long as
other tokens, and comes after the dominant ones. By default it is the mean of itself and its members, and tokens are in
raster order.

There is no host sync and no sort, so that it is exported as it is. Places are counted in fp32.
Notation: F frames, P tokens a frame, E width, n tokens kept of each frame.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import normalize

from earlytom.errors import UserError
from earlytom.ranking import at, best, largest, slots

DOMINANT = Fraction(54, 64)  # of the tokens of a frame


def visionzip(
    features: Tensor, attention: Tensor, metric: Tensor, count: int, *, faithful: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens [F, n, E] and their places in the frame [F, n].

    Args:
        features: [F, P, E]; attention: [F, P] received attention.
        metric: [F, P, d], compared by cosine; published: the layer's keys, mean over heads.
        count: n.
    """
    per_frame = features.shape[1]
    if not 1 <= count <= per_frame:
        raise UserError(f"of {per_frame} tokens a frame at least one and at most all can stay, got {count}")
    attended = int(count * DOMINANT)
    contextual, left = count - attended, per_frame - attended
    dominant = best(attention.float(), attended)
    spots, number = _evenly(dominant, contextual, max(1, left // contextual))
    likes = normalize(metric.float(), dim=-1)
    at_spots = slots(spots, contextual)
    into = largest(likes @ at(likes, at_spots).transpose(1, 2))  # [F, P]
    of = torch.arange(contextual, device=features.device)
    joins = ((into[:, None] == of[:, None]) & ~(dominant | spots)[:, None]).float()  # [F, contextual, P]
    others, members, own = joins @ features.float(), joins.sum(-1, keepdim=True), at(features, at_spots).float()
    means = own + others / members.clamp_min(1) if faithful else (own + others) / (1 + members)
    at_attended = slots(dominant, attended)
    tokens = torch.cat([at(features, at_attended), means.to(features.dtype)], 1)
    if faithful:
        return tokens, torch.cat([at_attended, at_spots], 1)
    places = slots(dominant | spots, count)
    which = torch.where(dominant, dominant.float().cumsum(-1) - 1, attended + number).long()
    return at(tokens, which.gather(1, places)), places


def _evenly(taken: Tensor, count: int, stride: int) -> tuple[Tensor, Tensor]:
    """The first `count` of each `stride`-th place that is not `taken [F, P]`: [F, P] bool, and their numbers, fp32."""
    place = (~taken).float().cumsum(-1) - 1
    number = torch.floor(place / stride)
    return ~taken & (number * stride == place) & (number < count), number
