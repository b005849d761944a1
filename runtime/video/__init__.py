"""Turns a video in any form into the engine's input: uint8 RGB frames at its resolution.

The only package that uses FFmpeg (through PyAV); knows sampling, but no models, tokens or engines.

`source` checks what callers give, `opening` opens containers, `packets` reads the packets and plans the decoding,
`cuts` finds truncated files, `decode` decodes, `clock` computes times, `sample` samples and resizes, `frames` has
frames as tensors, `clip` the result, `load` all steps.

Names are imported at first use: a command line knows the limits without loading FFmpeg and PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.video.clip import Clip, clip_from_frames
    from runtime.video.frames import MIN_FRAMES, channels_first, resize_frames
    from runtime.video.limits import Limits
    from runtime.video.load import load_clip
    from runtime.video.sample import apply_display_matrix, frames_for, sample_indices
    from runtime.video.source import Spooled, take_video

__all__ = [
    "MIN_FRAMES",
    "Clip",
    "Limits",
    "Spooled",
    "apply_display_matrix",
    "channels_first",
    "clip_from_frames",
    "frames_for",
    "load_clip",
    "resize_frames",
    "sample_indices",
    "take_video",
]

_HOMES = {
    "MIN_FRAMES": "frames",
    "Clip": "clip",
    "Limits": "limits",
    "Spooled": "source",
    "apply_display_matrix": "sample",
    "channels_first": "frames",
    "clip_from_frames": "clip",
    "frames_for": "sample",
    "load_clip": "load",
    "resize_frames": "frames",
    "sample_indices": "sample",
    "take_video": "source",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
