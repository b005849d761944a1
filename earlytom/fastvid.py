"""FastVID: in every frame the most attended tokens stay, and in a few frames of each scene the density peaks of the
rest, which the other tokens of the scene are folded into.

The published method takes frame vectors and attention from a pooling head that not every tower has; whoever calls this
hands in what there is. Noise on densities, drawn anew by the published code, is handed in, too.

How many tokens there will be only the video tells, so the host waits for the cuts. Notation: F frames, P tokens a
frame, E width, N tokens kept, n of each frame on average.
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
    """What it goes by.

    Attributes:
        ratio: share of tokens to keep; n is rounded down, and at least one.
        context: share of n that stands for what is not attended.
        least: segments at least; tau: a segment starts below this cosine.
        every: of a segment's frames, counted from its last one, each such one has centres.
        weight: of a centre beside the mean of what belongs to it.
        neighbours: distances that make a density.
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
    """How many centres each frame has: those of a segment, `context` a frame, go to every so many frames counted from
    its last one, as evenly as can be, the later ones first; `most` at most."""
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
    """Values of a scene's tokens [M, E] fp32, in which each centre has a share of the tokens that are most like it,
    itself among them; `attended` ones take no part."""
    which = centre.nonzero().flatten()
    if not len(which):
        return values
    unit = normalize(values, dim=-1)
    into = (unit @ unit[which].T).argmax(1)  # [M]
    joins = ((into == torch.arange(len(which), device=into.device)[:, None]) & ~attended).float()
    members = joins.sum(1, keepdim=True)
    weight = (1 / (members + 1)).clamp_min(settings.weight)
    return values.index_copy(0, which, weight * values[which] + (1 - weight) * (joins @ values) / members.clamp_min(1))
