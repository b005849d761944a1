"""Density peaks: which of many vectors stand for the others, as several comparison methods choose them.

A vector with near neighbours is dense. One that is dense and far from all denser ones is a peak; the best peaks become
centres, and each of the others joins the centre nearest to it. All is decided for several sets of vectors at once, in
fp32, by a fixed tensor program without host sync; of equal values the lower index goes first.

Notation: G sets of n places each, of which a mask says which are taken, D width, C centres.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOISE = 1e-6  # the released steps add uniform noise of this size to each density


def spacing(vectors: Tensor, valid: Tensor) -> Tensor:
    """Distances between the vectors of each set over sqrt(D), [G, n, n] fp32; infinite from and to what is not valid.

    Args:
        vectors: [G, n, D]; valid: [G, n] bool.
    """
    x = vectors.float()
    # As the released steps compute it: scores that are nearly equal are told apart by how distances are rounded.
    apart = torch.cdist(x, x).div_(math.sqrt(x.shape[-1]))
    return apart.masked_fill_(~(valid[:, :, None] & valid[:, None]), math.inf)


def densities(apart: Tensor, neighbours: Tensor, most: int) -> Tensor:
    """How dense each place is, [G, n] fp32: exp of minus the mean square of its smallest distances, itself among them.

    Args:
        apart: [G, n, n] from `spacing`; neighbours: [G] int64, how many distances count, from 1 to `most`.
    """
    most = min(most, apart.shape[-1])
    near = apart.topk(most, dim=-1, largest=False, sorted=True).values
    counted = torch.arange(most, device=apart.device) < neighbours[:, None, None]
    return torch.exp(-torch.where(counted, near * near, 0).sum(-1) / neighbours[:, None])


def peak_scores(apart: Tensor, density: Tensor, valid: Tensor) -> Tensor:
    """Density times the distance to the nearest denser place (to the farthest of all, if there is none), [G, n] fp32;
    -1 for what is not valid."""
    both = valid[:, :, None] & valid[:, None]
    farthest = torch.where(both, apart, 0).amax((1, 2))
    denser = (density[:, None] > density[:, :, None]) & both
    away = torch.where(denser, apart, farthest[:, None, None]).amin(-1)
    return torch.where(valid, density * away, -1.0)


def by_peak(apart: Tensor, valid: Tensor, neighbours: Tensor, *, most: int = 7, noise: Tensor | None = None) -> Tensor:
    """The places of each set by falling score, [G, n] int64: its first C are the centres.

    Args:
        apart: [G, n, n] from `spacing`; valid: [G, n] bool.
        neighbours: [G] int64, how many distances make a density, from 1 to `most`; at most as many as are valid.
        noise: [G, n] fp32 in [0, 1), added to the densities times `NOISE`; None adds none.
    """
    density = densities(apart, neighbours, most)
    if noise is not None:
        density = density + noise * NOISE
    return peak_scores(apart, density, valid).argsort(dim=-1, descending=True, stable=True)


def first_of(order: Tensor, counts: Tensor) -> Tensor:
    """[G, n] bool: which places are among the first `counts [G]` of `order [G, n]`."""
    front = torch.arange(order.shape[-1], device=order.device) < counts[:, None]
    return torch.zeros_like(front).scatter(-1, order, front)


def nearest(apart: Tensor, centre: Tensor) -> Tensor:
    """The centre that each place belongs to, [G, n] int64: a centre to itself, others to the nearest, of equally near
    ones the first. `centre [G, n]` bool."""
    index = torch.arange(apart.shape[-1], device=apart.device)
    best = torch.where(centre[:, None], apart, math.inf).argmin(-1)
    return torch.where(centre, index, best)


def cluster(vectors: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """At most `count` density peaks of one set, each the mean of what joins it: values [C, D] and indices [C],
    ascending; `vectors [n, D]`. Waits for the indices."""
    count = min(count, len(vectors))
    if not count:
        return vectors[:0], torch.zeros(0, dtype=torch.int64, device=vectors.device)
    valid = torch.ones(1, len(vectors), dtype=torch.bool, device=vectors.device)
    apart = spacing(vectors[None], valid)
    near = torch.full((1,), min(neighbours, len(vectors)), device=vectors.device)
    order = by_peak(apart, valid, near, most=neighbours)
    centre = first_of(order, torch.full((1,), count, device=vectors.device))
    which = centre[0].nonzero().flatten()
    joins = (nearest(apart, centre)[0] == which[:, None]).float()
    return joins @ vectors / joins.sum(1, keepdim=True), which
