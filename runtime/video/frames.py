"""Frames as tensors: checks callers' frames, brings them to one form, and resizes them as the model's processor does.

Knows nothing of files: the other modules of `runtime.video` decode them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from earlytom.errors import UserError
from earlytom.numbers import shown
from runtime.choices import MIN_FRAMES

_ORIENTATION = 0x0112  # tag of EXIF: how a camera was held; what follows is PIL's number of the turn that undoes it
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_WIDENED = 8  # frames converted to fp32 at a time


_WANTED = "give RGB frames as uint8 [n, 3, height, width] or [n, height, width, 3]"
_WANTED_FRAME = "give each frame as a uint8 array or tensor [height, width, 3] or [3, height, width], or as a PIL image"


def channels_first(pixels: Tensor | NDArray[np.uint8], least: int = MIN_FRAMES) -> Tensor:
    """Check a caller's frames, at least `least` of them, and return them as uint8 [n, 3, h, w]; a view.

    Raises UserError for anything but uint8 RGB, [n, 3, h, w] or [n, h, w, 3] (channels first where both would fit),
    in a tensor or array that has every value in memory.
    """
    if not isinstance(pixels, Tensor | np.ndarray):
        raise UserError(
            f"the video is a {type(pixels).__name__}; {_WANTED}, as a torch tensor or a numpy array, or the path of a "
            "file, as a str or a Path"
        )
    _check_plain(pixels)
    if pixels.dtype not in (torch.uint8, np.dtype(np.uint8)):
        raise UserError(f"frames are {_kind(pixels)}; {_WANTED}, values 0 to 255")
    if pixels.ndim != 4 or 3 not in (pixels.shape[1], pixels.shape[3]) or 0 in pixels.shape:
        raise UserError(f"frames are {_kind(pixels)}; {_WANTED}")
    if len(pixels) < least:
        raise UserError(f"got {len(pixels)} frame; a video has at least {MIN_FRAMES} frames")
    planar = pixels.as_subclass(Tensor) if isinstance(pixels, Tensor) else _tensor(pixels)
    return planar if planar.shape[1] == 3 else planar.permute(0, 3, 1, 2)


def stack_frames(frames: Sequence[Any]) -> Tensor:
    """A list of single frames as one tensor, uint8 [n, 3, h, w], on the device of the first: a copy.

    Frames are uint8 [h, w, 3] or [3, h, w] (channels first where both would fit), arrays or tensors, or PIL images.
    Raises UserError for anything else, an empty list, and frames of different sizes.
    """
    if not frames:
        raise UserError(f"got an empty {type(frames).__name__} of frames; a video has at least {MIN_FRAMES} frames")
    planar = [_single(frame, index) for index, frame in enumerate(frames)]
    for index, frame in enumerate(planar):
        if frame.shape != planar[0].shape:
            first, other = ("x".join(map(str, size.shape[:0:-1])) for size in (planar[0], frame))
            raise UserError(f"frame 0 is {first} and frame {index} is {other}; give frames of one size")
        if frame.device != planar[0].device:
            raise UserError(f"frame 0 is on {planar[0].device} and frame {index} on {frame.device}; move them together")
    return torch.stack(planar)


def resize_frames(frames: Tensor, size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """uint8 [F, 3, h, w] -> uint8 [F, 3, H, W]: bicubic with antialias, the aspect ratio not kept.

    device: where to resize, and of the result; default: the frames' device.

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
    """`resize_frames` where torch has no kernel for uint8, on any device; a few frames at a time, as fp32 takes four
    times the memory."""
    resized = (
        F.interpolate(some.float(), tuple(size), mode="bicubic", align_corners=False, antialias=True)
        for some in frames.split(_WIDENED)
    )
    return torch.cat([some.round_().clamp_(0, 255).to(torch.uint8) for some in resized])


def _single(frame: Any, index: int) -> Tensor:
    """One frame of a list as uint8 [3, h, w]."""
    if isinstance(frame, Tensor | np.ndarray):
        _check_plain(frame)
        if frame.ndim != 3 or 3 not in (frame.shape[0], frame.shape[2]) or 0 in frame.shape:
            raise UserError(f"frame {index} is {_kind(frame)}; {_WANTED_FRAME}")
        return channels_first(frame[None], 1)[0]
    if not hasattr(frame, "convert") or not hasattr(frame, "getexif"):  # of PIL, which need not be installed
        raise UserError(f"frame {index} is {shown(frame)} ({type(frame).__name__}); {_WANTED_FRAME}")
    if frame.mode[0] in "IF":  # PIL would clip their values at 255
        raise UserError(f"frame {index} is an image of mode {frame.mode}, values not 0 to 255; convert it to RGB")
    try:
        turn = _TURNS.get(frame.getexif().get(_ORIENTATION))
        image = np.array((frame if turn is None else frame.transpose(turn)).convert("RGB"))  # [h, w, 3]
    except (OSError, ValueError) as error:  # PIL decodes lazily
        raise UserError(f"frame {index} cannot be decoded ({shown(error)}); {_WANTED_FRAME}") from error
    return torch.from_numpy(image).permute(2, 0, 1)


def _check_plain(pixels: Tensor | NDArray[Any]) -> None:
    """Raises UserError for tensors and arrays without ordinary values in memory."""
    odd = _odd_tensor(pixels) if isinstance(pixels, Tensor) else _odd_array(pixels)
    if odd:
        raise UserError(f"frames are {odd}; {_WANTED}, as an ordinary tensor or array with its values in memory")


def _odd_tensor(pixels: Tensor) -> str:
    if pixels.is_nested:
        return "a nested tensor"
    if pixels.layout != torch.strided:
        return f"a sparse tensor ({str(pixels.layout).removeprefix('torch.')})"
    if pixels.is_meta:
        return "a meta tensor, which has no values"
    if pixels.is_quantized:
        return "a quantised tensor"
    if pixels.is_conj() or pixels.is_neg():
        return "a view that conjugates or negates"
    if type(pixels).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(pixels).__name__}, which only stands for a tensor"
    return "a tensor with named dimensions" if any(getattr(pixels, "names", ())) else ""


def _odd_array(pixels: NDArray[Any]) -> str:
    if isinstance(pixels, np.ma.MaskedArray):
        return "a masked array"
    return f"an array of {pixels.dtype}" if pixels.dtype.hasobject or pixels.dtype.fields else ""


def _tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """An array as a tensor: a view, or a copy where torch knows no such thing (negative strides, read-only memory)."""
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))


def _kind(pixels: Tensor | NDArray[Any]) -> str:
    return f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}"
