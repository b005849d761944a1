"""Cuts between scenes as several comparison methods make them: where frames differ more than a threshold, and where
they differ most until there are enough segments.

Notation: F frames, P tokens a frame, D width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import normalize


def frame_means(features: Tensor) -> Tensor:
    """`features [F, P, D]` to one direction a frame, [F, D] fp32 of unit length."""
    return normalize(features.float().mean(1), dim=-1)


def scene_bounds(vectors: Tensor, tau: float, least: int) -> list[tuple[int, int]]:
    """First and last frame of each segment, on the host, which waits for it.

    A segment starts where a frame's cosine with the one before is below `tau`, and at the least similar frames until
    there are `least` segments (or no frames left); of equally similar ones the first.

    Args:
        vectors: [F, D] of unit length.
    """
    frames = len(vectors)
    alike = (vectors[1:] * vectors[:-1]).sum(-1)
    order = alike.argsort(stable=True)
    starts = alike < tau
    starts[order[: least - 1]] = True
    cuts = [0, *(n + 1 for n, cut in enumerate(starts.tolist()) if cut), frames]
    return [(a, b - 1) for a, b in pairwise(cuts)]


def top(scores: Tensor, count: int) -> Tensor:
    """[F, P] bool: the `count` highest of `scores [F, P]` in each row; of equal ones the first."""
    order = scores.float().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :count], True)
