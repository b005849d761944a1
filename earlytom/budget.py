"""Frame and token counts: the only code that derives them from frames and a retention ratio.

Integer and double arithmetic on Python numbers. `F` are the frames of the input video, `F'` the frames left after
merging, `P` the tokens of a frame after projector and pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import SupportsIndex

from earlytom.errors import UserError


def frames_per_stage(frames: int, *, merges: int = 3, frame_budget: float | Sequence[int] = 0.75) -> tuple[int, ...]:
    """Budget schedule: frames before the first merge and after each one, for example (32, 24, 18, 14).

    A share keeps `max(1, round(share * frames))` at each merge layer; explicit counts are used as given and must not
    exceed the frames that arrive.

    Raises:
        UserError: fewer than one frame, a share outside (0, 1], not one count per merge, or a count outside 1 to the
            frames that arrive.
    """
    _at_least_one("the number of frames", frames, "--frames")
    counts = [frames]
    if isinstance(frame_budget, (int, float)):
        if not 0 < frame_budget <= 1:
            raise UserError(f"the frame budget must be a share in (0, 1], got {frame_budget}: see --frame-budget")
        for _ in range(merges):
            counts.append(max(1, round(frame_budget * counts[-1])))
        return tuple(counts)
    if len(frame_budget) != merges:
        raise UserError(
            f"the frame budget names {len(frame_budget)} frame counts for {merges} merge layers: give one per merge "
            "layer, or one share, with --frame-budget"
        )
    for stage, kept in enumerate(frame_budget, start=1):
        _at_least_one(f"the frame budget at merge {stage}", kept, "--frame-budget")
        if kept > counts[-1]:
            raise UserError(
                f"frame budget {kept} at merge {stage} is more than the {counts[-1]} frames that arrive "
                "there: lower it with --frame-budget or raise --frames"
            )
        counts.append(kept)
    return tuple(counts)


def effective_ratio(ratio: float, frames_in: int, frames_out: int) -> float:
    """Share r' of a remaining frame's tokens so that `ratio` r of the whole video's tokens stays: `min(r F / F', 1)`.

    Divided twice, as in the release: if P * r' is a whole number, rounding in double decides whether one more token is
    kept. And without merging the result must be `ratio` itself: 0.2 * 12 / 12 is more than 0.2.
    """
    return min(ratio / (frames_out / frames_in), 1.0)


def dynamic_tokens(tokens_per_frame: int, effective: float) -> int:
    """Tokens kept of a changing frame: `ceil(P * r')`, at most P."""
    return min(tokens_per_frame, math.ceil(tokens_per_frame * effective))


def static_tokens(tokens_per_frame: int, effective: float) -> int:
    """Tokens kept of a frame inside a static segment, adaptive schedule: one per window, `round(P * r')`, half-even, at
    least 1."""
    return max(1, round(tokens_per_frame * effective))


def token_count(
    frames: int,
    tokens_per_frame: int,
    ratio: float,
    schedule: str = "budget",
    *,
    merges: int = 3,
    frame_budget: float | Sequence[int] = 0.75,
    frames_out: int | None = None,
    static_frames: int | None = None,
) -> int:
    """Number of visual tokens `N` that reach the LLM (without the closing newline).

    Args:
        frames: frames of the input video.
        tokens_per_frame: `P`.
        ratio: retention ratio in (0, 1].
        schedule: "budget" (a pure function of the arguments) or "adaptive".
        merges, frame_budget: budget schedule: number of merge layers and share (or counts) kept at each.
        frames_out: frames left after merging. Adaptive schedule: required, and known only once the video has been seen.
            Budget schedule: default from `merges` and `frame_budget`.
        static_frames: adaptive schedule: how many of those are static; required.

    Raises:
        UserError: a ratio outside (0, 1], an invalid count, or the adaptive schedule without the two required counts.
    """
    _at_least_one("the number of frames", frames, "--frames")
    _at_least_one("the number of tokens a frame has", tokens_per_frame)
    if frames_out is not None and not 1 <= frames_out <= frames:
        raise UserError(f"frames_out must be between 1 and {frames} (the frames of the video), got {frames_out}")
    if not 0 < ratio <= 1:
        raise UserError(f"the retention ratio must be in (0, 1], got {ratio}: set it with --ratio")
    if schedule == "budget":
        kept = frames_out
        if kept is None:
            kept = frames_per_stage(frames, merges=merges, frame_budget=frame_budget)[-1]
        return kept * dynamic_tokens(tokens_per_frame, effective_ratio(ratio, frames, kept))
    if schedule != "adaptive":
        raise UserError(f"schedule must be adaptive or budget, got {schedule!r}")
    if frames_out is None or static_frames is None:
        raise UserError(
            "the adaptive schedule's token count depends on the video: give frames_out and static_frames, "
            "or use schedule='budget'"
        )
    if not 0 <= static_frames <= frames_out:
        raise UserError(f"static_frames must be between 0 and {frames_out} (frames_out), got {static_frames}")
    effective = effective_ratio(ratio, frames, frames_out)
    dynamic = (frames_out - static_frames) * dynamic_tokens(tokens_per_frame, effective)
    return dynamic + static_frames * static_tokens(tokens_per_frame, effective)


def most_tokens(frames: int, tokens_per_frame: int, ratio: float, *, merges: int = 3) -> int:
    """The most tokens that the adaptive schedule gives for any video of `frames` frames; arguments as in `token_count`.

    A changing frame keeps at least as many tokens as a static one, so the worst case has no static frame.
    """
    left = range(1, frames + 1) if merges else [frames]
    return max(token_count(frames, tokens_per_frame, ratio, "adaptive", frames_out=n, static_frames=0) for n in left)


def kept_tokens(tokens: int, inner_ratio: float) -> int:
    """Inner merging: how many of `tokens` visual tokens stay, `round(L * (1 - ratio))`, half-even, and at least one."""
    return min(tokens, max(1, round(tokens * (1 - inner_ratio))))


def _at_least_one(what: str, count: int, flag: str = "") -> None:
    if isinstance(count, bool) or not isinstance(count, SupportsIndex) or count < 1:
        remedy = f": set it with {flag}" if flag else ""
        raise UserError(f"{what} must be a whole number of at least 1, got {count!r}{remedy}")
