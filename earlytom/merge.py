"""Stage I: finds redundant frames and merges them.

Decide once, apply many: the decision is a row-stochastic matrix `W [F', F]`, and merging anything with one entry per
frame (hidden states, received attention) is `W @ x`. All decisions are taken from the `F x F` similarity matrix, in
fp32, by a fixed tensor program: no loop over frames, and no host sync except for the adaptive schedule's output size,
which depends on the video. `builder.export.functions` writes the same program in ONNX operators.

Two schedules, see `plan_frames`. Notation: F frames, S tokens a frame, D width, G segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.budget import frames_per_stage
from earlytom.config import SCHEDULES, TRAILINGS
from earlytom.errors import UserError

# Similarities are rounded to this grid (2^-20, about 1e-6) before any decision. Kernels sum in different orders, so
# copies of one frame would otherwise differ in the last bits, and noise would decide which is "more similar".
SIMILARITY_STEPS = 2.0**20


@dataclass(frozen=True)
class FramePlan:
    """A decision about F frames.

    Attributes:
        weights: [F', F] fp32, rows sum to one: row i has the weights of all frames in remaining frame i. A zero column
            is a dropped frame. None is below zero: similarities that are weigh nothing; the released code extrapolates.
        segment_start: [F] int64, first frame of each frame's segment.
    """

    weights: Tensor
    segment_start: Tensor

    @property
    def segments(self) -> Tensor:
        """[G, 2] int64: first and last frame of each segment of the F frames, inclusive."""
        return segments_of(self.segment_start)

    def apply(self, x: Tensor) -> Tensor:
        """Merge `x [F, ...]` to `[F', ...]`, in the dtype of `x`."""
        return apply_weights(self.weights, x)


def apply_weights(weights: Tensor, x: Tensor) -> Tensor:
    """`W [F', F]` applied to `x [F, ...]`: one small GEMM that reads x once. Returns [F', ...] in the dtype of x.

    Of B videos: `W [B, F', F]`, `x [B * F, ...]`, returns [B * F', ...].
    """
    return (weights.to(x.dtype) @ x.reshape(*weights.shape[:-2], weights.shape[-1], -1)).reshape(-1, *x.shape[1:])


def frame_similarity(hidden: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean over tokens of the cosine between the same token of two frames.

    Args:
        hidden: [F, S, D], any float dtype.
        dtype: of the Gram product; everything after it is fp32. Half cannot tell very similar frames apart, and may
            overflow.

    Returns:
        [F, F] fp32, symmetric, on the grid of `SIMILARITY_STEPS`.

    One Gram product per token, batched over tokens: for frames flattened to [F, S*D] the result is the same, but
    TensorRT-RTX would materialise [F, S, S*D]. The norms are the diagonal of the Gram matrix, so x is read once.
    """
    x = hidden.to(dtype).transpose(0, 1)  # [S, F, D]
    gram = (x @ x.transpose(1, 2)).float()  # [S, F, F]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # 1e-6 rather than 1e-12: the ONNX exporter's optimiser deletes smaller constants.
    norm = (gram * eye).sum(-1).sqrt().clamp_min(1e-6)  # [S, F]
    similarity = (gram / (norm[:, :, None] * norm[:, None, :])).mean(0)
    return torch.round(similarity * SIMILARITY_STEPS) / SIMILARITY_STEPS


def segment_frames(hidden: Tensor, *, tau: float, max_window: int, ema: float) -> Tensor:
    """Streaming segmentation of a video.

    Args:
        hidden: [F, S, D] hidden states.
        tau, max_window, ema: see `EarlyTomConfig`.

    Returns:
        [G, 2] int64: first and last frame of each segment, inclusive, in time order.

    Raises:
        UserError: `hidden` is not [F, S, D] with F >= 1.
    """
    return plan_frames(hidden, tau=tau, max_window=max_window, ema=ema).segments


def segments_of(start: Tensor) -> Tensor:
    """[G, 2] first and last frames from `start [F]`, the first frame of each frame's segment."""
    first = torch.unique(start)
    last = torch.cat([first[1:], first.new_tensor([start.shape[0]])]) - 1
    return torch.stack([first, last], dim=1)


def static_frames(start: Tensor, end: Tensor) -> Tensor:
    """[F] bool: the frames strictly inside a segment (all but first and last of segments of three and more)."""
    index = torch.arange(start.shape[0], device=start.device)
    return (start < index) & (index < end)


def plan_frames(
    hidden: Tensor,
    *,
    tau: float,
    max_window: int,
    ema: float,
    schedule: str = "adaptive",
    frames_out: int | None = None,
    trailing: str = "released",
) -> FramePlan:
    """Decide how F frames are merged.

    Args:
        hidden: [F, S, D] hidden states of one video after a merge layer.
        tau, max_window, ema, trailing: see `EarlyTomConfig`.
        schedule: "adaptive": the number of remaining frames depends on the video. "budget": it is `frames_out`.
        frames_out: budget schedule only; default `round(0.75 * F)`.

    Raises:
        UserError: `hidden` is not [F, S, D] with F >= 1, an unknown schedule or trailing, or a `frames_out` that is not
            in 1..F or not for the budget schedule.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if trailing not in TRAILINGS:
        raise UserError(f"trailing must be one of {', '.join(TRAILINGS)}, got {trailing!r}")
    if schedule == "adaptive" and frames_out is not None:
        raise UserError(f"frames_out={frames_out} is for schedule='budget': in the adaptive one the video decides")
    if hidden.dim() != 3 or hidden.shape[0] < 1:
        raise UserError(f"hidden states must be [frames, tokens, width] with a frame, got {list(hidden.shape)}")
    similarity = frame_similarity(hidden)
    if schedule == "budget" and frames_out is None:
        frames_out = frames_per_stage(hidden.shape[0], merges=1)[-1]
    weights, start, _ = plan_similarity(
        similarity, frames_out, tau=tau, max_window=max_window, ema=ema, trailing=trailing
    )
    return FramePlan(weights, start)


def plan_similarity(
    similarity: Tensor, frames_out: int | None, *, tau: float, max_window: int, ema: float, trailing: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The plan, from the similarity matrix.

    Args:
        similarity: [F, F] fp32 from `frame_similarity`.
        frames_out: frames to keep (static shapes), or None for the adaptive schedule.

    Returns:
        weights [F', F] fp32, and start, end [F] int64: first and last frame of each frame's segment.
    """
    frames = similarity.shape[0]
    start, end = segment_bounds(similarity, tau=tau, max_window=max_window, ema=ema)
    if frames_out is not None and not 1 <= frames_out <= frames:
        raise UserError(f"frames_out must be between 1 and {frames} (the frames that arrive), got {frames_out}")
    if frames_out == frames:
        return torch.eye(frames, dtype=similarity.dtype, device=similarity.device), start, end
    pair_weight, paired, kept = _adaptive_decisions(similarity, start, end, trailing)
    if frames_out is None:
        return _pair_rows(pair_weight, paired)[kept], start, end
    return _budget_weights(similarity, pair_weight, paired, kept, frames_out), start, end


def segment_bounds(similarity: Tensor, *, tau: float, max_window: int, ema: float) -> tuple[Tensor, Tensor]:
    """First and last frame of each frame's segment, both [F] int64.

    For every possible first frame a in parallel, the recurrence `q <- ema * c(a, a+k) + (1 - ema) * q` runs over the
    few k that the window allows; the segment's length is the number of k (from 0) before the first `q < tau`. The
    actual first frames are the orbit of frame 0 under "next segment".
    """
    frames = similarity.shape[0]
    index = torch.arange(frames, device=similarity.device)
    running = torch.ones(frames, dtype=similarity.dtype, device=similarity.device)
    alive = torch.ones_like(index, dtype=torch.bool)
    length = torch.ones_like(index)
    for k in range(1, min(max(1, max_window - 1), frames)):
        ahead = similarity.diagonal(k)  # c(a, a + k) for a < F - k
        ahead = torch.nn.functional.pad(ahead, (0, k), value=-2.0)  # past the end: never alive
        running = ema * ahead + (1 - ema) * running
        alive = alive & (running >= tau) & (index + k < frames)
        length = length + alive
    first = _orbit(index + length)
    start = torch.where(first & (index <= index[:, None]), index, 0).amax(1)
    end = torch.where(first & (index > index[:, None]), index, frames).amin(1) - 1
    return start, end


def _orbit(following: Tensor) -> Tensor:
    """[F] bool: the frames that the walk 0 -> following[0] -> ... visits; `following[i] > i`, F or more ends the walk.

    Reachability by squaring the F x F matrix `I + [following(a) = j]` ceil(log2 F) times.
    """
    frames = following.shape[0]
    index = torch.arange(frames, device=following.device)
    reach = ((following[:, None] == index) | (index[:, None] == index)).float()
    for _ in range((frames - 1).bit_length()):
        reach = (reach @ reach).clamp_max(1.0)
    return reach[0] > 0


def _adaptive_decisions(similarity: Tensor, start: Tensor, end: Tensor, trailing: str) -> tuple[Tensor, Tensor, Tensor]:
    """Decisions of the scan over the middle frames of each segment.

    Returns, all [F]: `pair_weight` fp32 (weight of frame i if merged with i + 1), `paired` bool (whether it is merged),
    `kept` bool (whether frame i gives a row of the adaptive plan).
    """
    frames = similarity.shape[0]
    index = torch.arange(frames, device=similarity.device)
    step = torch.nn.functional.pad(similarity.diagonal(1), (0, 1))  # s_i = c(i, i + 1)
    next_step = torch.nn.functional.pad(step[1:], (0, 1))  # s_{i+1}
    theta = similarity.flatten()[start * frames + end]  # c(a, b) of each frame's segment
    last_middle = end - 1
    middle = (start < index) & (index < end)
    pair_is_last = index + 1 == last_middle
    mergeable = middle & (index < last_middle) & (step > theta) & (pair_is_last | (step > next_step))
    visited = _orbit(index + 1 + mergeable)
    paired = visited & mergeable
    kept = visited
    if trailing == "released":
        kept = kept & ~((index == last_middle) & (last_middle - start >= 2))
    # Negative similarities count as 0, so that a merged frame is a convex combination of its two.
    near, far = step.clamp_min(0), next_step.clamp_min(0)
    share = torch.where(near > 0, near / (near + far).clamp_min(1e-6), 1.0)
    return torch.where(pair_is_last, 1.0, share), paired, kept


def _pair_rows(pair_weight: Tensor, paired: Tensor) -> Tensor:
    """[F, F]: row i is frame i, or its mixture with frame i + 1 where the two are merged."""
    frames = paired.shape[0]
    index = torch.arange(frames, device=paired.device)
    own = torch.where(paired, pair_weight, 1.0)
    eye = (index[:, None] == index).to(pair_weight.dtype)
    beside = (index[:, None] + 1 == index).to(pair_weight.dtype)
    return own[:, None] * eye + (1 - own)[:, None] * beside


def _budget_weights(similarity: Tensor, pair_weight: Tensor, paired: Tensor, kept: Tensor, frames_out: int) -> Tensor:
    """[frames_out, F] weights of the budget schedule.

    Frames are removed in this order: first those that the adaptive plan removes, then the others, each group by falling
    similarity to the frame before, ties to the earlier frame. A removed frame that the adaptive plan keeps is folded
    into the nearest kept frame before it, with their similarity as weight against 1 for that frame itself.
    """
    frames = similarity.shape[0]
    index = torch.arange(frames, device=similarity.device)
    step = torch.nn.functional.pad(similarity.diagonal(1), (1, 0))  # c(i - 1, i)
    group = torch.where(index == 0, -1, (~kept).long())  # frame 0 always stays
    same = group[:, None] == group
    stronger = (step[:, None] > step) | ((step[:, None] == step) & (index[:, None] < index))
    rank = ((group[:, None] > group) | (same & stronger)).sum(0)  # how many frames go before frame i
    stays = rank >= frames - frames_out

    # A pair whose second frame the budget keeps is not merged.
    second_gone = torch.nn.functional.pad(~stays[1:], (0, 1))
    rows = _pair_rows(pair_weight, paired & second_gone)

    taker = torch.where(stays & (index < index[:, None]), index, 0).amax(1)  # nearest kept frame before each
    folded = ~stays & kept
    into = (folded & (taker == index[:, None])).to(similarity.dtype)  # [F, F]: column folded into row
    mix = (index[:, None] == index).to(similarity.dtype) + into * similarity.clamp_min(0)
    weights = (mix / mix.sum(1, keepdim=True)) @ rows

    place = stays.long().cumsum(0) - 1
    out = torch.arange(frames_out, device=similarity.device)
    pick = (stays & (place == out[:, None])).to(similarity.dtype)  # [F', F] one-hot rows
    return pick @ weights
