"""Top-k, ranks and argmax with a defined order of equal values: of equal ones the first comes first.

Backends order equal values differently, so nothing here sorts them. There is no host sync, shapes depend on no tensor's
values, and it is exported as it is. Indices are counted in fp32: exact below 2**24, and every backend has all operators
for it. For values that are not finite the result is arbitrary but in range: an index out of range on a GPU breaks the
CUDA context.

Notation: n values a list, k of them taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_TOP = 3840  # the most that TensorRT's TopK takes


def ranks(scores: Tensor) -> Tensor:
    """The rank of each of `scores [..., n]` by falling score, from 0, fp32; n * n comparisons a list."""
    index = torch.arange(scores.shape[-1], device=scores.device)
    other, mine = scores[..., None, :], scores[..., :, None]
    before = (other > mine) | ((other == mine) & (index < index[:, None]))
    return before.float().sum(-1)


def best(scores: Tensor, count: int) -> Tensor:
    """[..., n] bool: the `count` largest of `scores [..., n]` fp32."""
    n = scores.shape[-1]
    if not 0 < count < n:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if count <= n // 2:
        edge = scores.topk(count).values.amin(-1, keepdim=True)
    else:  # the same threshold from a smaller top-k
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
    """Argsort of `places [..., n]` int64, all different, [..., n] int64."""
    rank, index = ranks(-places.float()), torch.arange(places.shape[-1], dtype=torch.float32, device=places.device)
    return torch.where(rank[..., None, :] == index[:, None], index, 0.0).sum(-1).long()


def at(values: Tensor, index: Tensor) -> Tensor:
    """`values [..., n, D]` at `index [..., k]`, [..., k, D]."""
    return values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))
