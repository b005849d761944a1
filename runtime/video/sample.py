"""Samples the frames of a video, and brings decoded frames to the model's size.

Sampling is by frame index over the whole video: with a variable frame rate, sampled frames are equally many frames
apart, not equally many seconds. A video of fewer than F frames repeats some of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from earlytom.errors import UserError
from earlytom.families import FrameSampling, FrameTimes
from runtime.video.frames import resize_frames

UNKNOWN_RATE = 24.0  # frames a second


def frames_for(source: int, frames: int | Sequence[int]) -> int:
    """The frame count for `source` frames: of several the smallest that shows all, else the largest."""
    if isinstance(frames, int | np.integer):
        return int(frames)
    return min((count for count in frames if count >= source), default=max(frames))


def sample_indices(count: int, frames: int, sampling: FrameSampling = "ends") -> NDArray[np.int64]:
    """Indices of the sampled frames among `count`: int64 [frames], ascending.

    "ends": from the first to the last frame, rounded down, exactly `np.linspace(0, n - 1, F, dtype=int)`, as in the
    released code of EarlyTom. "nearest": the same, rounded to the nearest, half to even, as in transformers' processors
    that round. "middles": the middle frame of each of F equal parts, computed in fp32, as in transformers' processors
    that shift the first. "begins": the first frame of each of F equal parts, likewise.
    """
    if sampling == "begins":
        return (count / frames * np.arange(frames)).astype(np.float32).astype(np.int64)
    if sampling == "middles":
        step = count / frames
        return np.minimum((step / 2 + step * np.arange(frames)).astype(np.float32).astype(np.int64), count - 1)
    if sampling == "nearest":
        return np.linspace(0, count - 1, frames).round().astype(np.int64)
    return np.linspace(0, count - 1, frames, dtype=np.int64)


def times_of_sample(count: int, frames: int, sampling: FrameSampling = "ends") -> FrameTimes:
    """Times of the frames of `sample_indices` where they are unknown: at 24 frames per second, as in transformers'
    processors."""
    seconds = tuple((sample_indices(count, frames, sampling) / UNKNOWN_RATE).tolist())
    return FrameTimes(seconds, seconds[-1])


def apply_display_matrix(image: NDArray[np.uint8], matrix: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Rotate and mirror `image` [h, w, 3] by a container's display matrix [9]; a view, [h, w, 3] or [w, h, 3].

    The matrix maps a pixel at (x, y) to (a*x + c*y, b*x + d*y), y downwards. Only quarter turns and mirrors exist in
    practice; any other angle is rounded to the nearest of them.
    """
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, flip_rows, flip_columns = image.transpose(1, 0, 2), b < 0, c < 0
    else:
        flip_rows, flip_columns = d < 0, a < 0
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def check_request(frames: int | Sequence[int], size: tuple[int, int]) -> None:
    """Raises UserError for an invalid number of frames or size."""
    counts = frames if isinstance(frames, tuple | list) and frames else (frames,)
    if any(isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1 for count in counts):
        raise UserError(f"frames is {frames!r}; give a whole number of frames of at least 1, or several of them")
    if len(size) != 2 or not all(isinstance(side, int | np.integer) and side >= 1 for side in size):
        raise UserError(f"size is {size!r}; give (height, width) in pixels, each at least 1")


class Sample:
    """Collects sampled frames in any order, each converted to RGB, upright and resized."""

    def __init__(self, count: int, size: tuple[int, int], device: torch.device) -> None:
        self.size = size
        self.frames = torch.empty(count, 3, *size, dtype=torch.uint8, device=device)
        self.missing = set(range(count))  # rows not written yet
        self.resize_seconds = 0.0
        self._reformatter = VideoReformatter()  # one for all frames: it keeps its tables
        self._rotation: int | None = None  # degrees
        self._matrix: NDArray[np.int32] | None = None

    def see(self, frame: av.VideoFrame) -> None:
        """Track the rotation: the frame's, or the last one given. Must be called with every decoded frame."""
        # Reading a frame's side data creates a reference cycle, which lives until the next garbage collection, so the
        # matrix is read again only if the rotation changes.
        if self._rotation is None or frame.rotation not in (0, self._rotation):
            side_data: Any = frame.side_data
            matrix = side_data.get("DISPLAYMATRIX")
            self._rotation = frame.rotation
            self._matrix = None if matrix is None else np.frombuffer(matrix, np.int32).copy()

    def put(self, row: int, frame: av.VideoFrame) -> bool:
        """Write a row; returns False, and does nothing, if it was written before."""
        if row not in self.missing:
            return False
        # Colour matrix and range are the frame's; swscale treats untagged frames as BT.601.
        rgb = self._reformatter.reformat(frame, format="rgb24")
        plane: Any = rgb.planes[0]
        shape, strides = (rgb.height, rgb.width, 3), (plane.line_size, 3, 1)
        image: NDArray[np.uint8] = np.ndarray(shape, np.uint8, buffer=plane, strides=strides)
        self.see(frame)
        if self._matrix is not None:
            image = apply_display_matrix(image, self._matrix)
        upright = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)  # [3, h, w]
        started = time.perf_counter()
        resized = resize_frames(upright[None], self.size, self.frames.device)[0]
        if resized.device.type == "cpu":
            # By numpy: torch would use threads for the copy and, on busy cores, wait longer than the copy takes.
            self.frames.numpy()[row] = resized.numpy()
        else:
            self.frames[row] = resized
        self.resize_seconds += time.perf_counter() - started
        self.missing.remove(row)
        return True

    def result(self, chosen: NDArray[np.int64]) -> Tensor:
        """The frames at the indices `chosen`, which may repeat: uint8 [F, 3, H, W]."""
        assert not self.missing  # an unwritten row could hold another video's frames
        if len(chosen) == len(self.frames):
            return self.frames
        return self.frames[torch.from_numpy(np.unique(chosen, return_inverse=True)[1]).to(self.frames.device)]
