"""A clip: the sampled frames of a video with their times; made here from frames in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earlytom.errors import UserError
from earlytom.families import FrameSampling, FrameTimes
from runtime.video.frames import channels_first, resize_frames, stack_frames
from runtime.video.sample import check_request, frames_for, sample_indices, times_of_sample


@dataclass(frozen=True, eq=False)
class Clip:
    """The sampled and resized frames of a video, ready for an engine, and what is known of their source."""

    frames: Tensor  # uint8 [F, 3, H, W], RGB, contiguous
    timestamps: tuple[float, ...]  # [F] seconds after the source's first frame; empty if it has no times
    source_frames: int  # frames in the source; 0 if unknown
    duration: float  # seconds; 0.0 if unknown
    decode_seconds: float  # opening, reading, decoding, conversion to RGB
    preprocess_seconds: float  # resizing

    def times(self, sampling: FrameSampling = "ends") -> FrameTimes:
        """The frames' times; if they are unknown, those of `times_of_sample`."""
        if self.timestamps:
            return FrameTimes(self.timestamps, self.duration)
        return times_of_sample(max(self.source_frames, len(self.frames)), len(self.frames), sampling)


def clip_from_frames(
    pixels: Tensor | NDArray[np.uint8] | Sequence[Any],
    frames: int | Sequence[int],
    size: tuple[int, int],
    *,
    fps: float | None = None,
    device: torch.device | str | None = None,
    sampling: FrameSampling = "ends",
) -> Clip:
    """Sample and resize frames that were decoded elsewhere.

    pixels: uint8 RGB, [n, 3, h, w] or [n, h, w, 3] (channels first where both would fit), n >= 2, in time order;
        or a list of frames of one size, each uint8 [3, h, w] or [h, w, 3], or a PIL image.
    frames: number of frames; of several counts the one that suits n is used (`frames_for`).
    fps: frames per second of `pixels`; without it the clip has no timestamps and its duration is 0.0.
    device: where frames are resized and stay; default: the CPU.
    sampling: how frames are sampled, see `sample_indices`.
    Only the sampled frames are read. Raises UserError for any other input.
    """
    check_request(frames, size)
    if fps is not None and not 0 < fps < float("inf"):
        raise UserError(f"fps is {fps}; give the frames per second of the source, above 0, or leave it out")
    started = time.perf_counter()
    given: Any = stack_frames(pixels) if isinstance(pixels, list | tuple) else pixels
    planar = channels_first(given)  # [n, 3, h, w]
    chosen = sample_indices(len(planar), frames_for(len(planar), frames), sampling)
    resized = resize_frames(planar[torch.from_numpy(chosen).to(planar.device)], size, device or "cpu")
    return Clip(
        frames=resized.contiguous(),
        timestamps=() if fps is None else tuple((chosen / fps).tolist()),
        source_frames=len(planar),
        duration=0.0 if fps is None else len(planar) / fps,
        decode_seconds=0.0,
        preprocess_seconds=time.perf_counter() - started,
    )
