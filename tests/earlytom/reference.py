"""The method as slow, obvious, sequential Python: what the vectorised code is held against.

Written from the description of the method (scan a segment, merge, rank, fold), one frame after the other, with no
tensor programs and no code shared with `earlytom`. Similarities are fp32 numbers, and the one recurrence (the running
similarity of a segment) is computed in fp32 as well, so that decisions can be compared exactly.

A row of a plan is `{frame: weight}`; its first key is the frame that the row keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = Sequence[Sequence[float]]
Row = dict[int, float]


def similarity(hidden: NDArray[np.floating]) -> NDArray[np.float64]:
    """[F, S, D] to [F, F]: mean over tokens of the cosine, in double precision. A token of zeros is like nothing."""
    frames, tokens, _ = hidden.shape
    out = np.zeros((frames, frames))
    for i in range(frames):
        for j in range(frames):
            for s in range(tokens):
                a, b = hidden[i, s].astype(np.float64), hidden[j, s].astype(np.float64)
                norm = math.sqrt(a @ a) * math.sqrt(b @ b)
                out[i, j] += a @ b / norm / tokens if norm > 0 else 0.0
    return out


def segments(c: Matrix, *, tau: float, max_window: int, ema: float) -> list[tuple[int, int]]:
    """First and last frame of each segment, streaming."""
    one = np.float32(1)
    first, start, running = [0], 0, one
    for i in range(1, len(c)):
        running = np.float32(ema) * np.float32(c[start][i]) + np.float32(1 - ema) * running
        if running < np.float32(tau) or i - start + 1 >= max_window:
            first.append(i)
            start, running = i, one
    return list(zip(first, [f - 1 for f in first[1:]] + [len(c) - 1], strict=True))


def share(s_i: float, s_next: float) -> float:
    """Weight of frame i when it is merged with i + 1. A similarity below zero carries no weight."""
    near, far = max(s_i, 0.0), max(s_next, 0.0)
    return near / (near + far) if near > 0 else 1.0


def merge_segment(c: Matrix, a: int, b: int, trailing: str) -> list[Row]:
    """The rows that one segment is merged to."""
    if b - a + 1 <= 2:
        return [{i: 1.0} for i in range(a, b + 1)]
    first, last = a + 1, b - 1
    rows: list[Row] = [{a: 1.0}]
    if first == last:
        rows.append({first: 1.0})
    else:
        theta = c[a][b]
        i = first
        while i < last:
            s_i = c[i][i + 1]
            if s_i > theta and (i + 1 == last or s_i > c[i + 1][i + 2]):
                w = 1.0 if i + 1 == last else share(s_i, c[i + 1][i + 2])
                rows.append({i: w, i + 1: 1.0 - w})
                i += 2
            else:
                rows.append({i: 1.0})
                i += 1
        if i == last and trailing == "keep":
            rows.append({last: 1.0})
    rows.append({b: 1.0})
    return rows


def adaptive_plan(c: Matrix, *, tau: float, max_window: int, ema: float, trailing: str) -> list[Row]:
    rows: list[Row] = []
    for a, b in segments(c, tau=tau, max_window=max_window, ema=ema):
        rows += merge_segment(c, a, b, trailing)
    return rows


def budget_plan(c: Matrix, frames_out: int, *, tau: float, max_window: int, ema: float, trailing: str) -> list[Row]:
    """Exactly `frames_out` rows: the adaptive plan says who goes first, where those go, and who is whole."""
    frames = len(c)
    adaptive = adaptive_plan(c, tau=tau, max_window=max_window, ema=ema, trailing=trailing)
    emitted = {next(iter(row)): row for row in adaptive}
    candidates = range(1, frames)  # frame 0 always stays
    # Removed by the adaptive plan first, then the more similar to the frame before, then the earlier.
    order = sorted(candidates, key=lambda i: (i in emitted, -c[i - 1][i], i))
    gone = set(order[: frames - frames_out])
    stay = [i for i in range(frames) if i not in gone]

    def content(i: int) -> Row:
        """What frame i stands for: its pair, if the adaptive plan merged one into it and that one is really gone."""
        row = emitted.get(i, {i: 1.0})
        return row if all(j == i or j in gone for j in row) else {i: 1.0}

    rows = []
    for place, keeper in enumerate(stay):
        end = stay[place + 1] if place + 1 < len(stay) else frames
        folded = [j for j in range(keeper + 1, end) if j in emitted]  # whom the adaptive plan would have kept
        parts = [(1.0, content(keeper))] + [(max(c[keeper][j], 0.0), content(j)) for j in folded]
        total = sum(weight for weight, _ in parts)
        row: Row = {}
        for weight, inner in parts:
            for j, w in inner.items():
                row[j] = row.get(j, 0.0) + weight / total * w
        rows.append(row)
    return rows


def dense(rows: Sequence[Row], frames: int) -> NDArray[np.float64]:
    """[F', F] weights."""
    out = np.zeros((len(rows), frames))
    for i, row in enumerate(rows):
        for j, w in row.items():
            out[i, j] = w
    return out


def token_counts(per_frame: int, ratio: float, frames_in: int, frames_out: int) -> tuple[int, int]:
    """Tokens that a dynamic and a static frame keep in the adaptive schedule."""
    effective = min(ratio / (frames_out / frames_in), 1.0)  # two divisions, as released
    return math.ceil(per_frame * effective), max(1, round(per_frame * effective))


def windows(per_frame: int, count: int) -> list[list[int]]:
    """Contiguous windows of the raster order, as even as possible, the longer ones first."""
    size, longer = divmod(per_frame, count)
    out, cell = [], 0
    for window in range(count):
        length = size + (window < longer)
        out.append(list(range(cell, cell + length)))
        cell += length
    return out


def best(values: Sequence[float], cells: Sequence[int], count: int) -> list[int]:
    """The `count` cells of highest value, in raster order; of equal ones the earlier."""
    return sorted(sorted(cells, key=lambda cell: (-values[cell], cell))[:count])


def select_positions(
    received: Matrix, segments: Sequence[Sequence[int]], *, frames_in: int, ratio: float, schedule: str
) -> list[int]:
    """Positions `frame * P + cell` of the tokens that stay."""
    per_frame = len(received[0])
    places, static_places = token_counts(per_frame, ratio, frames_in, len(received))
    if schedule == "budget":
        static_places = places
    positions = []
    for first, last in segments:
        for f in range(first, last + 1):
            if first < f < last:  # static
                cells = [best(received[f], window, 1)[0] for window in windows(per_frame, static_places)]
            else:
                cells = best(received[f], range(per_frame), places)
            positions += [f * per_frame + cell for cell in cells]
    return positions
