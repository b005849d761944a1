"""The best of a list, and where they stand, without a sort that sees equal values.

Backends order equal values as they like, so nothing here asks them to: of equal ones the first comes first, on each of
them. All shapes follow from numbers, nothing waits for the device, and an exporter writes it as it is. Places are
counted in fp32: exact below 2**24, and every backend has all operators for it. Of values that are not finite the answer
means nothing, but stays in range: an index out of range would end everybody's work on a GPU.

Notation: n values a list, k of them taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_TOP = 3840  # the most that TensorRT's TopK takes


def ranks(scores: Tensor) -> Tensor:
    """How many of `scores [..., n]` come before each by falling score, fp32; n * n comparisons a list."""
    index = torch.arange(scores.shape[-1], device=scores.device)
    other, mine = scores[..., None, :], scores[..., :, None]
    before = (other > mine) | ((other == mine) & (index < index[:, None]))
    return before.float().sum(-1)


def best(scores: Tensor, count: int) -> Tensor:
    """Which `count` of `scores fp32 [..., n]` are the largest, bool."""
    n = scores.shape[-1]
    if not 0 < count < n:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if count <= n // 2:
        edge = scores.topk(count).values.amin(-1, keepdim=True)
    else:  # the same value, and fewer of them to find
        edge = scores.topk(n - count + 1, largest=False).values.amax(-1, keepdim=True)
    above, level = scores > edge, scores == edge
    left = count - above.float().sum(-1, keepdim=True)
    return above | (level & (level.float().cumsum(-1) <= left))


def slots(mask: Tensor, count: int) -> Tensor:
    """The indices of the `count` true values of each list of `mask [..., n]`, ascending, [..., count] int64."""
    n = mask.shape[-1]
    if 0 < count <= MOST_TOP:
        falling = n - torch.arange(n, dtype=torch.float32, device=mask.device)  # no two are equal
        return (n - torch.where(mask, falling, 0.0).topk(count).values).long().clamp_max(n - 1)
    index = torch.arange(n, dtype=torch.float32, device=mask.device)
    place = mask.float().cumsum(-1) - 1
    here = mask[..., None, :] & (place[..., None, :] == index[:count, None])
    return torch.where(here, index, 0.0).sum(-1).long()


def largest(values: Tensor) -> Tensor:
    """Where the largest of each list of `values [..., n]` is, the first of equal ones, [...] int64."""
    n = values.shape[-1]
    index = torch.arange(n, dtype=torch.float32, device=values.device)
    return torch.where(values >= values.amax(-1, keepdim=True), index, float(n)).amin(-1).long().clamp_max(n - 1)


def ascending(places: Tensor) -> Tensor:
    """The order in which `places int64 [..., n]`, no two of them equal, rise, [..., n] int64."""
    rank, index = ranks(-places.float()), torch.arange(places.shape[-1], dtype=torch.float32, device=places.device)
    return torch.where(rank[..., None, :] == index[:, None], index, 0.0).sum(-1).long()


def at(values: Tensor, index: Tensor) -> Tensor:
    """`values [..., n, D]` at `index [..., k]`, [..., k, D]."""
    return values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))
