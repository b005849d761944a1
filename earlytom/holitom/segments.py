"""HoliTom's segments: the cuts that save most tokens.

A position is static in a segment if it is unchanged at every transition of the segment. Its copies become one token, so
a segment of L frames with c static positions saves c * (L - 1) tokens. The cuts maximise the sum; cuts cost nothing,
and the number of segments is free.

Static positions of all possible segments are a [T, T] table made on the device; the best cuts are found on the host,
which waits for that table once.

Notation: T frames, S positions a frame, D width, G segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from earlytom.errors import UserError

NORM_FLOOR = 1e-8
BLOCK = 2  # frames


@dataclass(frozen=True)
class Segmentation:
    """The segments of a video.

    Attributes:
        bounds: [G, 2] int64 on the host: first and last frame, inclusive.
        static_counts: [G] int64 on the host: static positions of each; 0 for a segment of one frame.
        saved: tokens saved by making each static position one token.
        static: [G, S] bool on the device: the static positions.
    """

    bounds: np.ndarray
    static_counts: np.ndarray
    saved: int
    static: Tensor


def similarity(features: Tensor, *, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """Cosine of each position with itself one frame later, `features [T, S, D]` to [T-1, S], computed in `dtype` (None:
    the features', as released)."""
    x = features if dtype is None else features.to(dtype)
    # A few frames at a time: their products stay in the cache, and a long video is read from memory once.
    blocks = list(zip(x[:-1].split(BLOCK), x[1:].split(BLOCK), strict=True))
    dot = torch.cat([(one * next_).sum(-1) for one, next_ in blocks]) if blocks else x.new_zeros(0, x.shape[1])
    length = x.norm(dim=-1)
    return dot / (length[1:] * length[:-1]).clamp_min(NORM_FLOOR if x.dtype == torch.float32 else 1e-4)


def steady_since(steady: Tensor) -> Tensor:
    """For each frame and position, the first frame since which it is unchanged, `steady [T-1, S]` bool to [T, S]
    int64."""
    frames = torch.arange(1, steady.shape[0] + 1, device=steady.device)[:, None]
    changed = torch.where(steady, 0, frames)
    first = torch.zeros_like(changed[:1]) if len(changed) else changed.new_zeros(1, steady.shape[1])
    return torch.cat([first, changed]).cummax(0).values


def static_table(since: Tensor) -> Tensor:
    """Number of positions that are static from frame a to b, `since [T, S]` to [T (b), T (a)] int64."""
    begun = torch.zeros(since.shape[0], since.shape[0], dtype=torch.int64, device=since.device)
    return begun.scatter_add(1, since, torch.ones_like(since)).cumsum(1)  # whole numbers: any order


def best_cuts(table: np.ndarray, max_window: int) -> list[tuple[int, int]]:
    """First and last frames of the segments that save most, of at most `max_window` frames; ties go to the shorter last
    segment. `table` is that of `static_table`.
    """
    frames = len(table)
    index = np.arange(frames)
    gain = table * (index[:, None] - index)  # [b, a]
    best = np.zeros(frames + 1, dtype=np.int64)  # best[i]: of the first i frames
    length = np.zeros(frames, dtype=np.int64)
    for last in range(frames):
        most = max(1, min(last + 1, max_window))
        value = (best[: last + 1] + gain[last, : last + 1])[last - most + 1 :][::-1]  # by growing window
        length[last] = value.argmax() + 1
        best[last + 1] = value[length[last] - 1]
    bounds, last = [], frames - 1
    while last >= 0:
        bounds.append((last - int(length[last]) + 1, last))
        last -= int(length[last])
    return bounds[::-1]


def segment(steady: Tensor, max_window: int = 1024) -> Segmentation:
    """The segments of T frames; `steady [T-1, S]` bool: the positions unchanged from each frame to the next."""
    if steady.dim() != 2:
        raise UserError(f"what stays the same must be [frames - 1, positions], got {list(steady.shape)}")
    since = steady_since(steady)
    table = static_table(since).cpu().numpy()
    bounds = np.array(best_cuts(table, max_window))
    first, last = bounds[:, 0], bounds[:, 1]
    counts = np.where(last > first, table[last, first], 0)
    ends, begins = (torch.from_numpy(one).to(steady.device) for one in (last, first))
    static = (since[ends] <= begins[:, None]) & (ends > begins)[:, None]
    return Segmentation(bounds, counts, int((counts * (last - first)).sum()), static)
