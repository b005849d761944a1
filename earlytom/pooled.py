"""One token budget for a whole video, after the description of "unified spatiotemporal compression".

The video's tokens are visited by falling attention, and taken if dissimilar to all taken so far. The rest of the budget
goes to density peaks of the others, each the mean of the tokens that join it.

No published code was available: rounding and ties are ours. The method's pruning inside the language model is not
implemented. The host waits at every token taken by attention, and for their number.

Notation: F frames, P tokens a frame, E width, M = F P, N tokens kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from earlytom.density import cluster
from earlytom.errors import UserError

NEIGHBOURS = 7


def take_unlike(unit: Tensor, attention: Tensor, count: int, alike: float) -> Tensor:
    """[M] bool: at most `count` tokens, visited by falling attention (of equal ones the first), each of a cosine below
    `alike` to all tokens taken before it.

    Args:
        unit: [M, E] of unit length; attention: [M].
    """
    order = attention.float().argsort(descending=True, stable=True)
    ranked = unit.index_select(0, order)
    free = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    taken = torch.zeros_like(free)
    for _ in range(count):
        best = free.byte().argmax(0, keepdim=True)  # the first one that may be taken
        taken = taken.index_copy(0, best, free[best] | taken[best])
        free = free & (ranked @ ranked[best][0] < alike)
        free = free.index_fill(0, best, False)
        if not bool(free.any()):
            break
    return torch.zeros_like(taken).index_copy(0, order, taken)


def pooled(
    features: Tensor, attention: Tensor, count: int, *, alike: float = 0.7, clustered: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Tokens [N, E] and positions `frame * P + place` [N], ascending.

    Args:
        features: [F, P, E]; attention: [F, P] received attention.
        count: N.
        alike: tokens are similar from this cosine on; clustered: least share of N for density peaks.
    """
    tokens = features.flatten(0, 1)
    if not 1 <= count <= len(tokens):
        raise UserError(f"of {len(tokens)} tokens at least one and at most all can stay, got {count}")
    values = tokens.float()
    taken = take_unlike(normalize(values, dim=-1), attention.flatten(), count - int(clustered * count), alike)
    rest = (~taken).nonzero().flatten()
    means, which = cluster(values[rest], count - int(taken.sum()), NEIGHBOURS)
    positions = torch.cat([taken.nonzero().flatten(), rest[which]])
    order = positions.argsort(stable=True)
    chosen = torch.cat([values[taken], means])[order]
    return chosen.to(features.dtype), positions[order]
