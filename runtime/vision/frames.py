"""Checks of an engine's input frames, each with one message."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from runtime.engine.dtypes import FRAMES_DTYPE
from runtime.engine.layout import FRAMES
from runtime.errors import EngineError


def check_frames(frames: Tensor, shape: Sequence[int]) -> None:
    """Raise EngineError unless frames are uint8 of `shape`: [F, 3, H, W], or [B, F, 3, H, W] for B videos."""
    expected = tuple(shape)
    if tuple(frames.shape) != expected:
        *batch, count, _, height, width = expected
        what = f"[{'B, ' * len(batch)}F, 3, H, W]"
        several = f" of each of {batch[0]} videos" if batch else ""
        raise EngineError(
            f"this engine takes {FRAMES} of shape {list(expected)} {what}, got {list(frames.shape)}: sample "
            f"{count} frames{several} at {height}x{width}, or build another engine with python -m builder.build"
        )
    if frames.dtype != FRAMES_DTYPE:
        raise EngineError(
            f"this engine takes {FRAMES} of dtype uint8 (RGB, 0 to 255; it normalises them itself), got {frames.dtype}"
        )


def batch_of(shape: Sequence[int]) -> int:
    """B of input frames [B, F, 3, H, W]; 1 for [F, 3, H, W]."""
    return shape[0] if len(shape) == 5 else 1


def check_clips(clips: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Raise EngineError unless there are 1 to B clips, each uint8 [F, 3, H, W] as in `shape`."""
    most = batch_of(shape)
    if not 1 <= len(clips) <= most:
        raise EngineError(
            f"this engine takes 1 to {most} clips at once, got {len(clips)}: give it fewer, or build one for more with "
            "python -m builder.build --batch"
        )
    for clip in clips:
        check_frames(clip, shape[-4:])
