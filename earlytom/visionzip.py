"""VisionZip: in every frame the most attended tokens stay, and a few others stand for what is left.

The few are evenly spaced among the others, and each of the rest joins the one that it is most like. As published such a
token is the sum of itself and the mean of those that join it, of about twice the length of any other, and comes behind
the attended ones (`faithful`). The default takes the mean of all of them, and keeps tokens in raster order.

Nothing waits for the device. Notation: F frames, P tokens a frame, E width, n tokens kept of each frame.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import normalize

from earlytom.errors import UserError

DOMINANT = Fraction(54, 64)  # of the tokens of a frame


def visionzip(
    features: Tensor, attention: Tensor, metric: Tensor, count: int, *, faithful: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens [F, n, E] and their places in the frame [F, n].

    Args:
        features: [F, P, E]; attention: [F, P] received attention.
        metric: [F, P, d], by which tokens are like each other: as published the keys of the layer, mean over heads.
        count: n.

    Raises:
        UserError: n is not in 1..P.
    """
    per_frame = features.shape[1]
    if not 1 <= count <= per_frame:
        raise UserError(f"of {per_frame} tokens a frame at least one and at most all can stay, got {count}")
    dominant = int(count * DOMINANT)
    contextual, left = count - dominant, per_frame - dominant
    order = attention.float().argsort(dim=-1, descending=True, stable=True)
    attended, rest = order[:, :dominant].sort(-1).values, order[:, dominant:].sort(-1).values
    stride = max(1, left // contextual)
    spots = torch.arange(contextual, device=features.device) * stride
    likes = normalize(_at(metric, rest).float(), dim=-1)
    into = (likes @ likes.index_select(1, spots).transpose(1, 2)).argmax(-1)  # [F, left]
    joins = into[:, None] == torch.arange(contextual, device=into.device)[:, None]
    is_spot = torch.zeros(left, dtype=torch.bool, device=into.device).index_fill(0, spots, True)
    joins = (joins & ~is_spot).float()  # [F, contextual, left]
    others, members = joins @ _at(features, rest).float(), joins.sum(-1, keepdim=True)
    own = _at(features, rest).index_select(1, spots).float()
    means = own + others / members.clamp_min(1) if faithful else (own + others) / (1 + members)
    tokens = torch.cat([_at(features, attended), means.to(features.dtype)], 1)
    places = torch.cat([attended, rest.index_select(1, spots)], 1)
    if faithful:
        return tokens, places
    by_place = places.argsort(dim=-1, stable=True)
    return _at(tokens, by_place), places.gather(1, by_place)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """`values [F, P, D]` at `index [F, k]`, [F, k, D]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
