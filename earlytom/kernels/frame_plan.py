"""Stage I's decision in a single program: from the similarity matrix to the merge weights.

Decisions are those of `earlytom.merge.plan_similarity` from the same fp32 matrix, bit for bit; weights may differ in
the last bits, where a row is summed in another order. Takes 1 to `MAX_FRAMES` frames.

A NaN similarity compares as false, as in PyTorch. If the budget removes frames, a NaN (or +inf) anywhere in the matrix
makes all weights NaN, as the reference's matrix products do, so that a broken tower shows.

Cost. It must move 4 F F + 4 R F + F bytes (F frames in, R rows out): 7.2 kB for F = 32, R = 24, which takes 4 ns at the
A100-80GB's published 2.0 TB/s (to be replaced by a measured figure). So it is bound by a chain of latencies: the matrix
from L2, then 20 to 30 exchanges between threads; some 630 instructions per warp at F = 32 and 2,650 at F = 128: an
estimated 2 us and 4 us, launch not counted. To keep the chain short, neither walk (over segments, over pairs) is
sequential in the frames, and only the ranking, the row sums and the result are F x F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom.config import TRAILINGS
from earlytom.errors import UserError
from earlytom.kernels.launch import Launch

MAX_FRAMES = 128


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _diagonal(similarity, index, k, past_end, F: tl.constexpr):
    """c(i, i + k) for every frame i of `index`; `past_end` where i or i + k is out of range."""
    return tl.load(similarity + index * (F + 1) + k, mask=(index >= 0) & (index + k < F), other=past_end)


@triton.jit
def _last_visited(jump, index, LEVELS: tl.constexpr):
    """For each frame i the last frame <= i that the walk 0 -> jump[0] -> ... visits; `jump[i] > i` everywhere.

    Binary lifting: the recursion doubles the jump, and on its return takes every jump that does not overshoot, longest
    first. LEVELS of them reach 2^LEVELS - 1 steps, which must include the last frame.
    """
    if LEVELS == 0:
        at = tl.zeros_like(index)
    else:
        # A jump past the end is continued from the last place, so it stays past the end.
        onward = tl.gather(jump, tl.minimum(jump, index.shape[0] - 1), 0)
        at = _last_visited(onward, index, LEVELS - 1)
        landing = tl.gather(jump, at, 0)
        at = tl.where(landing <= index, landing, at)
    return at


@triton.jit
def _segment_bounds(
    similarity,
    index,
    F: tl.constexpr,
    LEVELS: tl.constexpr,
    REACH: tl.constexpr,
    TAU: tl.constexpr,
    EMA: tl.constexpr,
    REST: tl.constexpr,
):
    """First and last frame of each frame's segment: segment lengths for every possible first frame, then the walk."""
    running = tl.full(index.shape, 1.0, tl.float32)
    alive = index < F
    following = index + 1
    for k in range(1, REACH):
        running = EMA * _diagonal(similarity, index, k, -2.0, F) + REST * running
        alive = alive & (running >= TAU) & (index + k < F)
        following += alive.to(tl.int32)
    first = _last_visited(following, index, LEVELS)
    return first, tl.gather(following, first, 0) - 1


@triton.jit
def _adaptive_decisions(similarity, index, first, last, F: tl.constexpr, KEEP_TRAILING: tl.constexpr):
    """Decisions of the scan over the middle frames of each segment.

    Returns `own` fp32, each frame's weight in its own row (the next frame has the rest), and `kept`, whether the
    adaptive plan has a row for the frame.
    """
    step = _diagonal(similarity, index, 1, 0.0, F)  # s_i = c(i, i + 1)
    next_step = _diagonal(similarity, index + 1, 1, 0.0, F)  # s_{i+1}
    theta = tl.load(similarity + first * F + last, mask=index < F, other=0.0)
    last_middle = last - 1
    pair_is_last = index + 1 == last_middle
    mergeable = (first < index) & (index < last_middle) & (step > theta) & (pair_is_last | (step > next_step))

    # The scan skips a frame if and only if it is paired with the frame before, which is then mergeable and not skipped.
    # So in a run of mergeable frames every other one is visited, counted from the last frame that does not follow a
    # mergeable one. (Frame 0 is not mergeable: it is no middle frame.)
    follows = tl.gather(mergeable.to(tl.int32), tl.maximum(index - 1, 0), 0)
    run = tl.associative_scan(tl.where(follows != 0, 0, index), 0, _larger)
    visited = ((index - run) & 1) == 0

    kept = visited & (index < F)
    if not KEEP_TRAILING:
        kept = kept & ~((index == last_middle) & (last_middle - first >= 2))
    near, far = tl.maximum(step, 0.0), tl.maximum(next_step, 0.0)
    share = tl.where(near > 0, tl.math.div_rn(near, tl.maximum(near + far, 1e-6)), 1.0)
    return tl.where(visited & mergeable & ~pair_is_last, share, 1.0), kept


@triton.jit
def _budget_ranking(similarity, index, kept, F: tl.constexpr, R: tl.constexpr):
    """Which R frames stay: first the adaptive plan's removals go, then frames most similar to the frame before."""
    step = _diagonal(similarity, index - 1, 1, 0.0, F)  # c(i - 1, i)
    group = tl.where(index == 0, -1, tl.where(kept, 0, 1))  # frame 0 always stays
    group = tl.where(index < F, group, -2)  # padding: goes before no frame
    group_other, group_mine = group[:, None], group[None, :]
    other, mine = step[:, None], step[None, :]
    stronger = (other > mine) | ((other == mine) & (index[:, None] < index[None, :]))
    goes_first = (group_other > group_mine) | ((group_other == group_mine) & stronger)
    return (tl.sum(goes_first.to(tl.int32), 0) >= F - R) & (index < F)


@triton.jit
def _budget_parts(similarity, index, stays, place, kept, F: tl.constexpr):
    """Each frame's weight in row `place`: its own row or, if removed, that of the nearest remaining frame before it."""
    taker = tl.associative_scan(tl.where(stays, index, 0), 0, _larger)
    folded = kept & ~stays
    likeness = tl.load(similarity + taker * F + index, mask=folded, other=0.0)
    part = tl.where(stays, 1.0, tl.maximum(likeness, 0.0))
    total = tl.sum(tl.where(place[:, None] == place[None, :], part[:, None], 0.0), 0)
    return tl.math.div_rn(part, total)


@triton.jit
def _is_sound(similarity, F: tl.constexpr, CHUNK: tl.constexpr):
    """Whether there is neither NaN nor +inf among the F x F similarities."""
    peak = tl.full([CHUNK], 0.0, tl.float32)
    for begin in tl.static_range(0, F * F, CHUNK):
        cell = begin + tl.arange(0, CHUNK)
        value = tl.load(similarity + cell, mask=cell < F * F, other=0.0)
        peak = tl.maximum(peak, value, propagate_nan=tl.PropagateNan.ALL)
    return tl.min((peak < float("inf")).to(tl.int32), 0) != 0


@triton.jit
def frame_plan_kernel(
    similarity,  # fp32 [F, F]
    weights,  # fp32 [R, F]
    static,  # bool [F]
    start,  # int64 [F], or None
    count,  # int64 [1], or None
    F: tl.constexpr,
    R: tl.constexpr,
    BUDGET: tl.constexpr,  # else R is F, and rows from `count` on are zero
    KEEP_TRAILING: tl.constexpr,
    REACH: tl.constexpr,  # frames of the longest segment
    TAU: tl.constexpr,
    EMA: tl.constexpr,
    REST: tl.constexpr,  # 1 - EMA
    BLOCK: tl.constexpr,  # power of two, F or more
    ROWS: tl.constexpr,  # power of two, R or more
    CHUNK: tl.constexpr,  # similarities that are looked at together
    LEVELS: tl.constexpr,  # of `_last_visited`
):
    index = tl.arange(0, BLOCK)
    row, column = tl.arange(0, ROWS)[:, None], index[None, :]
    if BUDGET and R < F:
        sound = _is_sound(similarity, F, CHUNK)  # first: its reads prefetch the matrix for the steps below
    first, last = _segment_bounds(similarity, index, F, LEVELS, REACH, TAU, EMA, REST)
    if BUDGET and R == F:
        out = (row == column).to(tl.float32)
    else:
        own, stays = _adaptive_decisions(similarity, index, first, last, F, KEEP_TRAILING)
        if BUDGET:
            kept = stays
            stays = _budget_ranking(similarity, index, kept, F, R)
            # A pair whose second frame the budget keeps is not merged.
            second_stays = tl.gather(stays.to(tl.int32), tl.minimum(index + 1, BLOCK - 1), 0)
            own = tl.where(second_stays != 0, 1.0, own)
        place = tl.cumsum(stays.to(tl.int32), 0) - 1
        part = _budget_parts(similarity, index, stays, place, kept, F) if BUDGET else stays.to(tl.float32)
        # The rest of a frame's weight goes to the next frame, which then has no row of its own, so it is the same row.
        # (Frame 0 receives nothing: the gather below clamps to frame 0 itself, which keeps all of its weight.)
        lent = tl.gather(part * (1.0 - own), tl.maximum(index - 1, 0), 0)
        out = tl.where(place[None, :] == row, (part * own + lent)[None, :], 0.0)
        if BUDGET:
            out = tl.where(sound, out, float("nan"))

    # All stores come last, as the compiler moves no load above a store.
    tl.store(weights + row * F + column, out, mask=(row < R) & (column < F))
    tl.store(static + index, (first < index) & (index < last), mask=index < F)
    if start is not None:
        tl.store(start + index, first.to(tl.int64), mask=index < F)
    if count is not None:
        tl.store(count, R if BUDGET else tl.sum(stays.to(tl.int32), 0))


def launch(
    frames: int, frames_out: int | None, *, tau: float, ema: float, max_window: int, trailing: str, bounds: bool
) -> Launch:
    """The kernel's launch for `frames` frames.

    Args:
        frames_out: frames to keep (budget schedule), or None for the adaptive one, whose rows are padded to `frames`.
        tau, ema, max_window, trailing: see `EarlyTomConfig`.
        bounds: whether `start` and `count` are written, too; else the tensors are similarity, weights and static.

    Raises:
        UserError: `frames` is not in 1..128, `frames_out` not in 1..frames, or an unknown `trailing`.
    """
    if not 1 <= frames <= MAX_FRAMES:
        raise UserError(f"the frame plan kernel takes 1 to {MAX_FRAMES} frames, got {frames}: choose fewer")
    if frames_out is not None and not 1 <= frames_out <= frames:
        raise UserError(f"frames_out must be between 1 and {frames} (the frames that arrive), got {frames_out}")
    if trailing not in TRAILINGS:
        raise UserError(f"trailing must be one of {', '.join(TRAILINGS)}, got {trailing!r}")
    rows = frames if frames_out is None else frames_out
    constants = {
        "F": frames,
        "R": rows,
        "BUDGET": frames_out is not None,
        "KEEP_TRAILING": trailing == "keep",
        "REACH": min(max(1, max_window - 1), frames),
        "TAU": float(tau),
        "EMA": float(ema),
        "REST": 1.0 - ema,  # in double, as in the reference, and then in fp32
        "BLOCK": triton.next_power_of_2(frames),
        "ROWS": triton.next_power_of_2(rows),
        "CHUNK": min(1024, triton.next_power_of_2(frames * frames)),
        "LEVELS": (frames - 1).bit_length(),
    }
    if not bounds:
        constants |= {"start": None, "count": None}
    return Launch(frame_plan_kernel, (1, 1, 1), constants, num_warps=4)


def frame_plan(
    similarity: Tensor, frames_out: int | None, *, tau: float, ema: float, max_window: int, trailing: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan of one video.

    Args:
        similarity: [F, F] fp32 from `frame_similarity`.
        frames_out, tau, ema, max_window, trailing: see `launch`.

    Returns:
        weights [R, F] fp32 (R is `frames_out`, or F in the adaptive schedule, where rows from `count` on are zero),
        static [F] bool (strictly inside a segment), start [F] int64 (first frame of each frame's segment) and count []
        int64.

    Raises:
        UserError: as `launch`, or `similarity` is not [F, F] fp32.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or similarity.dtype != torch.float32:
        raise UserError(f"similarity must be fp32 [frames, frames], got {similarity.dtype} {list(similarity.shape)}")
    frames, device = similarity.shape[0], similarity.device
    run = launch(frames, frames_out, tau=tau, ema=ema, max_window=max_window, trailing=trailing, bounds=True)
    weights = torch.empty(frames_out or frames, frames, dtype=torch.float32, device=device)
    static = torch.empty(frames, dtype=torch.bool, device=device)
    start = torch.empty(frames, dtype=torch.int64, device=device)
    count = torch.empty((), dtype=torch.int64, device=device)
    run(similarity.contiguous(), weights, static, start, count)
    return weights, static, start, count
