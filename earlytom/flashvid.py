"""FlashVID: every frame keeps diverse attended tokens; the rest are linked from frame to frame, and linked tokens are
averaged.

After its description. Most of a frame's tokens are taken one by one, each with the largest product of attention,
relevance to the scene and distance to those taken. Each other token is linked to its best match anywhere in the
previous frame, if their cosine is high enough; linked tokens are averaged, and of a scene's averages the density peaks
are kept, each as the mean of its members.

N depends on the video, so the host waits. Notation: F frames, P tokens a frame, E width, M = F P, N tokens kept, n of
each frame on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from earlytom.density import cluster
from earlytom.scenes import frame_means, scene_bounds


@dataclass(frozen=True)
class FlashVIDSettings:
    """Settings of FlashVID.

    Attributes:
        ratio: share of tokens to keep; n is rounded up.
        expansion: factor of `ratio`, for a language model that prunes tokens itself; published: 1.25.
        diverse: share of n for diverse attended tokens.
        least: the fewest segments; tau: a segment starts below this cosine.
        linked: a token is linked above this cosine.
        neighbours: number of nearest neighbours for densities.
    """

    ratio: float
    expansion: float = 1.0
    diverse: float = 0.7
    least: int = 8
    tau: float = 0.9
    linked: float = 0.8
    neighbours: int = 7


def flashvid(features: Tensor, attention: Tensor, settings: FlashVIDSettings) -> tuple[Tensor, Tensor]:
    """Tokens [N, E] and positions `frame * P + place` [N], ascending.

    Args:
        features: [F, P, E]; attention: [F, P] received attention.
    """
    per_frame, width = features.shape[1:]
    count = min(per_frame, math.ceil(settings.ratio * per_frame * settings.expansion))
    context = math.floor((1 - settings.diverse) * count)
    unit = normalize(features.float(), dim=-1)
    bounds = scene_bounds(frame_means(features), settings.tau, settings.least)
    diverse = spread_tokens(unit, attention.float() * relevance(unit, bounds), count - context)
    found_tokens, found_positions = [], []
    values = features.float()
    for a, b in bounds:
        taken = diverse[a : b + 1]
        root = follow(unit[a : b + 1], taken, settings.linked)
        means, at = average_trees(values[a : b + 1].flatten(0, 1), root, taken.flatten())
        tokens, which = cluster(means, (b - a + 1) * context, settings.neighbours)
        own = taken.flatten().nonzero().flatten()
        positions = torch.cat([own, at[which]])
        order = positions.argsort(stable=True)
        found_tokens.append(torch.cat([values[a : b + 1].reshape(-1, width)[own], tokens])[order])
        found_positions.append(positions[order] + a * per_frame)
    return torch.cat(found_tokens).to(features.dtype), torch.cat(found_positions)


def relevance(unit: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """Mean cosine of each token to the mean tokens of its scene's frames, [F, P], at least 0; `unit [F, P, E]`."""
    out = []
    for a, b in bounds:
        means = normalize(unit[a : b + 1].mean(1), dim=-1)
        out.append((unit[a : b + 1] @ means.T).mean(-1).clamp_min(0))
    return torch.cat(out)


def spread_tokens(unit: Tensor, weight: Tensor, count: int) -> Tensor:
    """[F, P] bool: in each frame the token of largest weight, then `count - 1` times the one of largest weight times
    smallest distance (1 - cosine) to those taken; of equal ones the first.

    Args:
        unit: [F, P, E]; weight: [F, P], 0 or more.
    """
    frames, per_frame, _ = unit.shape
    apart = (1 - unit @ unit.transpose(1, 2)).clamp_min(0)  # [F, P, P]
    far = torch.full((frames, per_frame), 2.0, device=unit.device)  # the largest possible distance
    taken = torch.zeros(frames, per_frame, dtype=torch.bool, device=unit.device)
    for _ in range(min(count, per_frame)):
        best = torch.where(taken, -1.0, weight * far).argmax(-1, keepdim=True)
        taken = taken.scatter(1, best, True)
        near = apart.gather(1, best[..., None].expand(-1, -1, per_frame))[:, 0]
        far = torch.minimum(far, near)
    return taken


def follow(unit: Tensor, taken: Tensor, linked: float) -> Tensor:
    """The first token of each token's chain of links, as an index [M] int64; itself if it has no link.

    Args:
        unit: [F, P, E] of one scene; taken: [F, P] bool, tokens without links.
    """
    frames, per_frame, _ = unit.shape
    index = torch.arange(frames * per_frame, device=unit.device)
    if frames == 1:
        return index
    alike = unit[1:] @ unit[:-1].transpose(1, 2)  # [F - 1, P (later), P (earlier)]
    alike = alike.masked_fill(taken[1:, :, None] | taken[:-1, None], -1.0)
    best, before = alike.max(-1)
    start = torch.arange(frames - 1, device=unit.device)[:, None] * per_frame
    parent = index.unflatten(0, (frames, per_frame)).clone()
    parent[1:] = torch.where(best > linked, before + start, parent[1:])
    root, steps = parent.flatten(), 1
    while steps < frames:  # pointer doubling
        root, steps = root[root], 2 * steps
    return root


def average_trees(values: Tensor, root: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each root's tokens that are not `taken [M]`, [R, E], and the roots [R], ascending; `values [M, E]`, `root
    [M]`."""
    rest = (~taken).nonzero().flatten()
    roots, which = root[rest].unique(return_inverse=True)
    total = torch.zeros(len(roots), values.shape[1], device=values.device).index_add(0, which, values[rest])
    return total / which.bincount(minlength=len(roots))[:, None], roots
