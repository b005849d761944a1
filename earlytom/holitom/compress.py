"""HoliTom after the projector: static positions are averaged over time, and of dynamic ones the most attended are kept.

In each segment (`earlytom.holitom.segments`) a static position is averaged over the frames, and density peaks (centres)
of the averages are kept, each mixed with those that join it. Of the dynamic positions every frame keeps those that
receive most attention. Both keep the share r' of their tokens: the ratio over the share that averaging leaves.

There are two forms, never to be mixed in one table. The released one (`faithful`) compares in the features' dtype, may
round a static region to no token, and chooses a single centre by noise alone, as with one neighbour all densities are
equal. The default compares in fp32, keeps at least one token of each static region, and uses at least three neighbours.

Notation: T frames, S positions a frame, D width, G segments, N tokens kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from earlytom.density import by_peak, first_of, nearest, spacing
from earlytom.errors import UserError
from earlytom.holitom.segments import Segmentation, segment, similarity

SEGMENTS = 4  # compressed at a time


@dataclass(frozen=True)
class HoliTomSettings:
    """Settings of HoliTom.

    Attributes:
        ratio: share of the T * S tokens to keep, in (0, 1].
        tau: a position is unchanged if its cosine with itself one frame later is above this.
        beta: weight of a centre against the mean of those that join it; None: the mean of all of them.
        neighbours: nearest neighbours for densities; at most the segment's centres (by default at least three).
        max_window: the most frames of a segment.
        faithful: the released form.
    """

    ratio: float
    tau: float = 0.8
    beta: float | None = 0.6
    neighbours: int = 7
    max_window: int = 1024
    faithful: bool = False


@dataclass(frozen=True)
class HoliTomTokens:
    """The kept tokens of a video, in the released order: segment by segment, first the static tokens by position, then
    the dynamic ones by frame and position.

    Attributes:
        tokens: [N, D] in the dtype of the features.
        positions: [N] int64, `frame * S + position`; a static token's frame is the first of its segment.
        last: [N] int64, the last frame that each token stands for.
        segmentation: the segments.
        effective: r'.
        centres: for each segment that has any, its centres by falling score, as positions.
    """

    tokens: Tensor
    positions: Tensor
    last: Tensor
    segmentation: Segmentation
    effective: float
    centres: list[Tensor]


def compress(
    features: Tensor, attention: Tensor, settings: HoliTomSettings, *, noise: Tensor | None = None
) -> HoliTomTokens:
    """The tokens of one video.

    Args:
        features: [T, S, D], any float dtype.
        attention: [T, S] received attention.
        noise: [n] in [0, 1), a value for each static position of each segment that keeps centres, in order; further
            values are not used. None: no noise.
    """
    if features.dim() != 3 or attention.shape != features.shape[:2]:
        raise UserError(
            f"features must be [T, S, D] and attention [T, S], got {list(features.shape)} and {list(attention.shape)}"
        )
    frames, per_frame = attention.shape
    device = features.device
    compared = similarity(features, dtype=None if settings.faithful else torch.float32)
    found = segment(compared > settings.tau, settings.max_window)
    effective = effective_share(settings.ratio, frames * per_frame, found.saved)
    centres, dynamic = counts(found, effective, per_frame, settings.faithful)
    static = compress_static(features, found, centres, settings, noise)
    first, lengths = found.bounds[:, 0], found.bounds[:, 1] - found.bounds[:, 0] + 1
    moving = keep_dynamic(attention, found, np.repeat(dynamic, lengths))
    # Two slots for each position of each frame: static tokens of a segment that begins there precede dynamic ones.
    total = int(centres.sum() + (dynamic * lengths).sum())
    begins = torch.from_numpy(first).to(device)
    slots = torch.zeros(frames, 2, per_frame, dtype=torch.bool, device=device)
    slots[:, 1] = moving
    slots[begins, 0] = static.centre
    order = (~slots.flatten()).argsort(stable=True)[:total]
    frame, where = order // (2 * per_frame), order % per_frame
    merged = order % (2 * per_frame) < per_frame
    positions = frame * per_frame + where
    ends = torch.zeros(frames, dtype=torch.int64, device=device)
    ends[begins] = torch.from_numpy(found.bounds[:, 1]).to(device)
    tokens = features.flatten(0, 1).index_select(0, positions)
    if len(static.values):
        tokens = tokens.index_copy(0, (~merged).argsort(stable=True)[: len(static.values)], static.values)
    last = torch.where(merged, ends.index_select(0, frame), frame)
    return HoliTomTokens(tokens, positions, last, found, effective, static.by_score)


def effective_share(ratio: float, tokens: int, saved: int) -> float:
    """r': the share of the tokens left by averaging that equals `ratio` of all `tokens`, at most 1."""
    return min(ratio / ((tokens - saved) / tokens), 1.0)


def counts(found: Segmentation, effective: float, per_frame: int, faithful: bool) -> tuple[np.ndarray, np.ndarray]:
    """Each segment's number of centres and of dynamic tokens a frame, both [G] int64, on the host."""
    static = found.static_counts
    centres = np.rint(static * effective).astype(np.int64)  # half to even
    if not faithful:
        centres = np.maximum(centres, static > 0)
    dynamic = np.array([math.ceil(int(n) * effective) for n in per_frame - static], dtype=np.int64)
    return centres, dynamic


@dataclass(frozen=True)
class StaticTokens:
    """The kept static tokens: centre [G, S] bool, values [sum C, D] in that order, and the centres of each segment that
    has any, by falling score, as positions."""

    centre: Tensor
    values: Tensor
    by_score: list[Tensor]


def compress_static(
    features: Tensor, found: Segmentation, centres: np.ndarray, settings: HoliTomSettings, noise: Tensor | None
) -> StaticTokens:
    """Average the static positions of each segment, and keep `centres [G]` of them.

    `SEGMENTS` at a time, sorted by static positions: there is little padding, and distances stay in the CPU's cache.
    """
    centre = torch.zeros(len(centres), features.shape[1], dtype=torch.bool, device=features.device)
    chosen = np.flatnonzero(centres)
    values: dict[int, Tensor] = {}
    by_score: dict[int, Tensor] = {}
    begins = np.cumsum(found.static_counts[chosen]) - found.static_counts[chosen]  # offsets into the noise
    first = dict(zip(chosen.tolist(), begins.tolist(), strict=True))
    by_size = chosen[np.argsort(-found.static_counts[chosen], kind="stable")]
    for some in np.split(by_size, range(SEGMENTS, len(by_size), SEGMENTS)) if len(by_size) else ():
        drawn = None
        if noise is not None:
            drawn = torch.cat([noise[first[g] :][: found.static_counts[g]] for g in some.tolist()])
        own, kept, order = _static_of(features, found, some, centres[some], settings, drawn)
        centre[torch.from_numpy(some).to(centre.device)] = own
        values |= zip(some.tolist(), kept.split(centres[some].tolist()), strict=True)
        by_score |= {g: one[: int(centres[g])] for g, one in zip(some.tolist(), order, strict=True)}
    tokens = torch.cat([values[g] for g in chosen.tolist()]) if values else features.new_zeros(0, features.shape[2])
    return StaticTokens(centre, tokens, [by_score[g] for g in chosen.tolist()])


def _static_of(
    features: Tensor,
    found: Segmentation,
    some: np.ndarray,
    centres: np.ndarray,
    settings: HoliTomSettings,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For the segments `some [g]`: centres [g, S] bool, their values [sum C, D], and positions by falling score [g, n]
    int64."""
    device, counts = features.device, found.static_counts[some]
    valid = found.static.index_select(0, torch.from_numpy(some).to(device))
    places = (~valid).byte().argsort(dim=-1, stable=True)[:, : int(counts.max())]  # static positions first
    valid = valid.gather(1, places)
    means = segment_means(features, found.bounds[some])
    means = means.gather(1, places[:, :, None].expand(-1, -1, means.shape[-1]))
    apart = spacing(means, valid)
    least = 1 if settings.faithful else 3  # two that are each other's nearest are equally dense
    asked = np.minimum(np.maximum(np.minimum(settings.neighbours, centres), least), counts)
    spread = None
    if noise is not None:
        spread = torch.zeros(valid.shape, device=device).masked_scatter(valid, noise.to(device, torch.float32))
    neighbours, wanted = (torch.from_numpy(one).to(device) for one in (asked, centres))
    order = by_peak(apart, valid, neighbours, most=int(asked.max()), noise=spread)
    own = first_of(order, wanted)
    values = fold(means, apart, valid, own, int(centres.max()), int(centres.sum()), settings.beta)
    centre = torch.zeros(len(some), features.shape[1], dtype=torch.bool, device=device).scatter(1, places, own)
    return centre, values.to(features.dtype), places.gather(1, order)


def segment_means(features: Tensor, bounds: np.ndarray) -> Tensor:
    """The mean over each segment's frames, `features [T, S, D]` and `bounds [G, 2]` to [G, S, D] fp32."""
    return torch.stack([features[first : last + 1].float().mean(0) for first, last in bounds.tolist()])


def fold(means: Tensor, apart: Tensor, valid: Tensor, own: Tensor, most: int, total: int, beta: float | None) -> Tensor:
    """Values of the centres `own [G, n]` bool, by position, [total, D] fp32, each mixed with those that join it.

    Args:
        most: the most centres of a segment.
    """
    owner = nearest(apart, own)
    at = (~own).byte().argsort(dim=-1, stable=True)[:, :most]  # centres first, by position
    joins = (owner[:, None] == at[:, :, None]) & valid[:, None] & ~own[:, None]  # [G, most, n]
    members = joins.sum(-1, keepdim=True)
    centre = means.gather(1, at[:, :, None].expand(-1, -1, means.shape[-1]))
    others = joins.float() @ means
    if beta is None:
        value = (centre + others) / (members + 1)
    else:
        value = torch.where(members > 0, beta * centre + (1 - beta) * others / members.clamp_min(1), centre)
    real = own.gather(1, at).flatten()
    return value.flatten(0, 1).index_select(0, (~real).byte().argsort(stable=True)[:total])


def keep_dynamic(attention: Tensor, found: Segmentation, kept: np.ndarray) -> Tensor:
    """[T, S] bool: each frame's `kept [T]` dynamic positions that receive most attention; of equal ones the first."""
    lengths = torch.from_numpy(found.bounds[:, 1] - found.bounds[:, 0] + 1).to(attention.device)
    static = found.static.repeat_interleave(lengths, 0, output_size=len(attention))
    order = attention.float().masked_fill(static, -math.inf).argsort(dim=-1, descending=True, stable=True)
    return first_of(order, torch.from_numpy(kept).to(attention.device))
