"""FastVID: every frame keeps its most attended tokens, and a few frames of each scene keep density peaks of the rest,
into which the scene's other tokens are merged.

The published method takes frame vectors and attention from a pooling head, which not every tower has; here both are
arguments. So is the noise on densities, which the published code draws at each call.

N depends on the video, so the host waits for the scene cuts. Notation: F frames, P tokens a frame, E width, N tokens
kept, n of each frame on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from earlytom.density import by_peak, first_of, spacing
from earlytom.scenes import scene_bounds, top


@dataclass(frozen=True)
class FastVIDSettings:
    """Settings of FastVID.

    Attributes:
        ratio: share of tokens to keep; n is rounded down, and at least one.
        context: share of n for density peaks.
        least: the fewest segments; tau: a segment starts below this cosine.
        every: each `every`-th frame of a segment, counted from its last one, has density peaks.
        weight: the least weight of a peak against the mean of its members, itself among them.
        neighbours: number of nearest neighbours for densities.
    """

    ratio: float
    context: float = 0.4
    least: int = 8
    tau: float = 0.9
    every: int = 4
    weight: float = 0.6
    neighbours: int = 4


def fastvid(
    features: Tensor,
    attention: Tensor,
    vectors: Tensor,
    settings: FastVIDSettings,
    *,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [N, E] and positions `frame * P + place` [N], ascending.

    Args:
        features: [F, P, E]; attention: [F, P]; vectors: [F, D] of unit length, by which scenes are told apart.
        noise: [F, P] in [0, 1); None is none.
    """
    frames, per_frame, _ = features.shape
    count = max(1, math.floor(per_frame * settings.ratio))
    context = math.floor(settings.context * count)
    attended = top(attention, count - context)
    bounds = scene_bounds(vectors, settings.tau, settings.least)
    centres = centre_counts(bounds, frames, context, per_frame - count + context, settings.every)
    centre = peaks(features, ~attended, torch.tensor(centres, device=features.device), settings.neighbours, noise)
    values = features.float()
    tokens = [
        fold_scene(
            values[a : b + 1].flatten(0, 1), attended[a : b + 1].flatten(), centre[a : b + 1].flatten(), settings
        )
        for a, b in bounds
    ]
    positions = (attended | centre).flatten().nonzero().flatten()
    return torch.cat(tokens).index_select(0, positions).to(features.dtype), positions


def centre_counts(bounds: list[tuple[int, int]], frames: int, context: int, most: int, every: int) -> list[int]:
    """The number of density peaks of each frame, at most `most`: a segment has `context` for each of its frames, spread
    evenly over every `every`-th frame counted from its last one, later frames first."""
    counts = [0] * frames
    for a, b in bounds:
        anchors = range(b, a - 1, -every)
        share, rest = divmod((b - a + 1) * context, len(anchors))
        for n, frame in enumerate(anchors):
            counts[frame] = min(most, share + (n < rest))
    return counts


def peaks(features: Tensor, free: Tensor, counts: Tensor, neighbours: int, noise: Tensor | None) -> Tensor:
    """[F, P] bool: of the `free [F, P]` tokens of each frame the `counts [F]` best density peaks."""
    apart = spacing(features, free)
    near = free.sum(1).clamp(1, neighbours)
    return first_of(by_peak(apart, free, near, most=neighbours, noise=noise), counts) & free


def fold_scene(values: Tensor, attended: Tensor, centre: Tensor, settings: FastVIDSettings) -> Tensor:
    """A scene's tokens [M, E] fp32, with each token that is not `attended [M]` merged into the most similar `centre
    [M]`, itself included."""
    which = centre.nonzero().flatten()
    if not len(which):
        return values
    unit = normalize(values, dim=-1)
    into = (unit @ unit[which].T).argmax(1)  # [M]
    joins = ((into == torch.arange(len(which), device=into.device)[:, None]) & ~attended).float()
    members = joins.sum(1, keepdim=True)
    weight = (1 / (members + 1)).clamp_min(settings.weight)
    return values.index_copy(0, which, weight * values[which] + (1 - weight) * (joins @ values) / members.clamp_min(1))
