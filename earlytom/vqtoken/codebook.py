"""VQToken's codebook: k-means of the directions of a video's tokens.

Seeding is that of k-means++ (a row's probability is proportional to its squared distance to the nearest seed), followed
by Lloyd's iterations. The uniform draws are arguments, so results are deterministic. Decisions are made in fp32;
probabilities are summed in fp64.

K may be chosen at the elbow of the loss over K. Rule "intended" takes the elbow; "released" takes it as if the curve
began at 3 clusters instead of 12, so that it mostly gives 12. The released code's third rule, "silhouette", never looks
at the clusters and gives 12 (16 for fewer than 50 tokens); it is here for comparison.

The host waits for the choice of K only, and on a CPU after each iteration, to end a fit early.

Notation: M = T * S tokens, time-major, D width, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from earlytom.errors import UserError

LEAST = 12  # the fewest clusters of the adaptive choice
SILHOUETTE_TOKENS, SILHOUETTE_FEW = 50, 16  # below 50 tokens the "silhouette" rule gives 16 clusters
FIXED_CAP, ADAPTIVE_CAP = 50, 100
SPREAD = 1e-6  # added to squared distances: a row may be drawn twice
CLOSE = 1e-4  # a fit ends when the norm of all centres' moves is below this
TIE = 2e-7  # cosines within this are equal: otherwise rounding would tell copies of a centre apart

Rule = Literal["released", "intended", "silhouette"]


@dataclass(frozen=True)
class Fit:
    """One run of k-means.

    Attributes:
        seeds: [K] int64, rows of the initial centres.
        labels: [M] int64.
        centres: [K, D] fp32; where the cap on iterations ended the fit, updated once more after `labels`.
        rounds: [] int64, iterations.
    """

    seeds: Tensor
    labels: Tensor
    centres: Tensor
    rounds: Tensor


def directions(tokens: Tensor) -> Tensor:
    """`tokens [M, D]` divided by their lengths, fp32; a token of zeros remains zero."""
    x = tokens.float()
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first row whose cumulative probability exceeds `uniform []`, [] int64; `weights [M]` need not be
    normalised."""
    chances = (weights / weights.sum()).double()
    total = chances.cumsum(0)
    total = total / total[-1:]
    found = torch.searchsorted(total, uniform.reshape(1), right=True)[0]
    return found.clamp_max(len(weights) - 1)


def seed_rows(unit: Tensor, uniforms: Tensor) -> Tensor:
    """K rows of `unit [M, D]` for the initial centres, [K] int64, from the draws `uniforms [K]` fp64."""
    rows = [(uniforms[0] * len(unit)).long().clamp_max(len(unit) - 1)]
    nearest = torch.full((len(unit),), math.inf, device=unit.device)
    for uniform in uniforms[1:]:
        seed = unit.index_select(0, rows[-1].reshape(1))
        nearest = torch.minimum(nearest, torch.cdist(unit, seed)[:, 0])
        rows.append(draw(nearest * nearest + SPREAD, uniform))
    return torch.stack(rows)


def assign(unit: Tensor, centres: Tensor) -> Tensor:
    """The centre of largest cosine for each row, of equal ones the first, [M] int64."""
    cosine = unit @ directions(centres).T
    return (cosine >= cosine.amax(1, keepdim=True) - TIE).byte().argmax(1)


def cluster_sums(values: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sums [K, D] fp32 of `values [M, D]` by label, and the number of members, [K] fp32."""
    member = (labels == torch.arange(clusters, device=labels.device)[:, None]).float()
    return member @ values.float(), member.sum(1)


def fit(unit: Tensor, seeds: Tensor, cap: int = FIXED_CAP) -> Fit:
    """k-means from given rows.

    Args:
        unit: [M, D] from `directions`; seeds: [K] int64; cap: the most iterations.
    """
    centres = unit.index_select(0, seeds)
    labels = torch.zeros(len(unit), dtype=torch.int64, device=unit.device)
    rounds = torch.zeros((), dtype=torch.int64, device=unit.device)
    done = torch.zeros((), dtype=torch.bool, device=unit.device)
    for _ in range(cap):
        labels = torch.where(done, labels, assign(unit, centres))
        rounds = rounds + ~done
        total, members = cluster_sums(unit, labels, len(seeds))
        moved = torch.where(members[:, None] > 0, total / members[:, None].clamp_min(1), centres)
        done = done | ((centres - moved).norm() < CLOSE)
        centres = torch.where(done, centres, moved)
        if done.device.type == "cpu" and bool(done):
            break
    return Fit(seeds, labels, centres, rounds)


def fit_seeded(unit: Tensor, uniforms: Tensor, cap: int = FIXED_CAP) -> Fit:
    """k-means with K clusters, seeded by the draws `uniforms [K]` fp64."""
    if uniforms.dim() != 1 or not len(uniforms):
        raise UserError(f"a codebook needs one uniform draw for each cluster, [K], got {list(uniforms.shape)}")
    return fit(unit, seed_rows(unit, uniforms), cap)


def left_over(unit: Tensor, found: Fit) -> Tensor:
    """J, the loss: the sum of squared distances of rows to the centres of their labels, [] fp32."""
    return ((unit - found.centres.index_select(0, found.labels)) ** 2).sum()


def draws_needed(most: int) -> int:
    """The most draws that `fit_adaptive` takes: for a fit of each size, and for the last one."""
    return sum(range(LEAST, most + 1)) + max(most, SILHOUETTE_FEW)


def fit_adaptive(unit: Tensor, uniforms: Tensor, most: int, rule: Rule, cap: int = ADAPTIVE_CAP) -> list[Fit]:
    """Fits of 12 to `most` clusters, then the result: a fit with the number of clusters that `rule` chooses.

    Args:
        uniforms: draws fp64, see `draws_needed`.
    """
    if most < LEAST + 2 and rule != "silhouette":
        raise UserError(f"the number of clusters is chosen from {LEAST} to at least {LEAST + 2}, got most={most}")
    fits: list[Fit] = []
    for count in range(LEAST, most + 1):
        fits.append(fit_seeded(unit, _next_draws(uniforms, fits, count), cap))
    if rule == "silhouette":
        chosen = LEAST if len(unit) >= SILHOUETTE_TOKENS else SILHOUETTE_FEW
    else:
        chosen = bend(torch.stack([left_over(unit, one) for one in fits]), rule)
    return [*fits, fit_seeded(unit, _next_draws(uniforms, fits, chosen), cap)]


def _next_draws(uniforms: Tensor, fits: Sequence[Fit], count: int) -> Tensor:
    taken = sum(len(one.seeds) for one in fits)
    if taken + count > len(uniforms):
        raise UserError(f"{taken + count} draws are needed, got {len(uniforms)}")
    return uniforms[taken : taken + count]


def bend(curve: Tensor, rule: Rule) -> int:
    """The number of clusters at the elbow of `curve`, J from 12 clusters on, by `rule` "released" or "intended"."""
    second = curve[2:] - 2 * curve[1:-1] + curve[:-2]
    j = int(second.argmax())
    return max(LEAST, j + 4) if rule == "released" else LEAST + j + 1


def codebook(values: Tensor, found: Fit) -> Tensor:
    """The mean of each cluster's members, [K, D] fp32; zeros for an empty cluster.

    Args:
        values: [M, D], the directions as released, or the tokens themselves.
    """
    total, members = cluster_sums(values, found.labels, len(found.seeds))
    return total / members[:, None].clamp_min(1)


def medoids(unit: Tensor, found: Fit) -> Tensor:
    """The member nearest to each cluster's mean direction, of equal ones the first, [K] int64; for an empty cluster its
    seed."""
    clusters = len(found.seeds)
    cosine = directions(codebook(unit, found)) @ unit.T  # [K, M]
    member = found.labels == torch.arange(clusters, device=unit.device)[:, None]
    cosine = torch.where(member, cosine, -math.inf)
    best = (cosine >= cosine.amax(1, keepdim=True) - TIE).byte().argmax(1)
    return torch.where(member.any(1), best, found.seeds)
