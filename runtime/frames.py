"""Frames as tensors: what callers may give, brought to one form, and resized as the model's own processor does.

Knows nothing of files: `runtime.video` decodes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from earlytom.errors import UserError
from runtime.choices import MIN_FRAMES

_WIDENED = 8  # frames that are fp32 at a time


def channels_first(pixels: Tensor | NDArray[np.uint8], least: int = MIN_FRAMES) -> Tensor:
    """Check frames from outside, at least so many, and return them as uint8 [n, 3, h, w]; a view.

    Raises UserError for anything but uint8 RGB, [n, 3, h, w] or [n, h, w, 3] (channels first where both would fit).
    """
    wanted = "give RGB frames as uint8 [n, 3, height, width] or [n, height, width, 3]"
    if not isinstance(pixels, Tensor | np.ndarray):
        raise UserError(
            f"the video is a {type(pixels).__name__}; {wanted}, as a torch tensor or a numpy array, or the path of a "
            "file, as a str or a Path"
        )
    if pixels.dtype not in (torch.uint8, np.dtype(np.uint8)):
        raise UserError(f"frames are {_kind(pixels)}; {wanted}, values 0 to 255")
    if pixels.ndim != 4 or 3 not in (pixels.shape[1], pixels.shape[3]) or 0 in pixels.shape:
        raise UserError(f"frames are {_kind(pixels)}; {wanted}")
    if len(pixels) < least:
        raise UserError(f"got {len(pixels)} frame; a video has at least {MIN_FRAMES} frames")
    planar = pixels if isinstance(pixels, Tensor) else _tensor(pixels)
    return planar if planar.shape[1] == 3 else planar.permute(0, 3, 1, 2)


def resize_frames(frames: Tensor, size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """uint8 [F, 3, h, w] -> uint8 [F, 3, H, W]: bicubic with antialias, the aspect ratio not kept.

    device: where to resize, and where the result is; default where the frames are.

    On a CPU this is torch's kernel for uint8, whose weights are whole numbers. The model's own video processor resizes
    as torchvision does, which uses the same kernel where the CPU has it and elsewhere widens to fp32, resizes, rounds
    and clamps; torch has nothing else on a GPU, so there it is done here. On the drawn clip the two differ by less than
    1/255 on average; compared were that second operation and Pillow's bicubic resizing, as the processor itself cannot
    be loaded without torchvision.

    Frames that have the size already are returned as they are. Raises UserError for another dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise UserError(f"frames are {_kind(frames)}; give RGB frames as uint8 [F, 3, height, width]")
    frames = frames if device is None else frames.to(device)
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    if frames.device.type == "cpu":
        return F.interpolate(frames, tuple(size), mode="bicubic", align_corners=False, antialias=True)
    return resize_in_float(frames, size)


def resize_in_float(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """What `resize_frames` does where torch has no kernel for uint8, on any device; a few frames at a time, being four
    times as large meanwhile."""
    resized = (
        F.interpolate(some.float(), tuple(size), mode="bicubic", align_corners=False, antialias=True)
        for some in frames.split(_WIDENED)
    )
    return torch.cat([some.round_().clamp_(0, 255).to(torch.uint8) for some in resized])


def _tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """An array as a tensor: a view, or a copy where torch knows no such thing (negative strides, read-only memory)."""
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))


def _kind(pixels: Tensor | NDArray[Any]) -> str:
    return f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}"
