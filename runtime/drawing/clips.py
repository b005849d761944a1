"""Draws synthetic video clips for demonstrations and tests.

A clip has three scenes of equal length with hard cuts, which are to resemble real videos: everything moves (a camera
passing over hills behind moving shapes), almost nothing moves (a room with a pendulum), and something turns and grows
(a night sky). Sensor noise makes all frames different, in the still scene only slightly.

Frames depend on the arguments only (`runtime.drawing.scenes`); the file also depends on the encoder. Drawing and
encoding libraries are imported when a clip is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlytom.errors import UserError
from runtime.errors import VideoError
from runtime.files.partial import partial

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from earlytom.micro.data import Question

_ENLARGED, _REPEATED = 4, 3  # a test clip's factors of height and width, and of frames
_FASTEST, _LONGEST = 1000, 2_000_000  # the most frames per second, and in all
_LARGEST = 8192  # the most pixels a side
# The first available is used. x264's macroblock tree is not deterministic, even on one thread, so it is off.
_ENCODERS = {
    "libx264": {"crf": "20", "preset": "veryfast", "x264-params": "mbtree=0"},
    "mpeg4": {"b": "4000000"},
}


def draw_frames(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """`count` evenly spaced frames of a whole clip: uint8 RGB [count, 3, height, width].

    Equal arguments give equal frames; the seed determines hills, colours, places and directions. Raises UserError for a
    count or side below 1, or a negative seed.
    """
    import numpy as np

    frames = np.empty((count if count > 0 else 0, 3, max(height, 0), max(width, 0)), dtype=np.uint8)
    for index, frame in enumerate(_frames(count, height, width, seed)):
        frames[index] = frame.transpose(2, 0, 1)
    return frames


def draw_clip(
    path: str | os.PathLike[str],
    seconds: float = 6.0,
    fps: int = 24,
    size: tuple[int, int] = (240, 320),
    seed: int = 0,
) -> Path:
    """Draw a clip of `size` = (height, width) and write it to `path` as mp4; returns the path.

    H.264 if this FFmpeg can encode it, else MPEG-4. The file appears when complete; until then it has another name in
    the same folder, and is removed after an error or Ctrl-C.

    Raises UserError for an invalid length, rate or size, VideoError if the folder is missing or FFmpeg cannot write,
    and OSError (no permission, disk full).
    """
    height, width = size
    if not 0 < seconds < float("inf") or not 1 <= fps <= _FASTEST or not 2 <= round(seconds * fps) <= _LONGEST:
        raise UserError(
            f"{seconds} seconds at {fps} frames per second is no clip; give at least 2 frames in all, and at most "
            f"{_LONGEST}, {_FASTEST} per second"
        )
    if not (16 <= height <= _LARGEST and 16 <= width <= _LARGEST) or height % 2 or width % 2:
        raise UserError(f"size is {width}x{height}; give an even width and height of 16 to {_LARGEST} pixels")
    return write_clip(path, _frames(round(seconds * fps), height, width, seed), fps, size)


def write_test_clip(path: str | os.PathLike[str], index: int) -> tuple[Path, tuple[Question, ...]]:
    """Write clip `index` of the bundled model's test set to `path` as mp4; returns the path and the clip's questions.

    Frames are repeated and pixels enlarged to squares, so that encoding loses little and 16 evenly sampled frames are
    the clip's 16. Raises as `draw_clip`, and UserError for a negative index.
    """
    import numpy as np

    from earlytom.micro.data import labelled_clip

    clip = labelled_clip("test", index)
    large = clip.frames.repeat(_ENLARGED, 2).repeat(_ENLARGED, 3).transpose(0, 2, 3, 1)  # [F, h, w, 3]
    frames = (np.ascontiguousarray(frame) for frame in large for _ in range(_REPEATED))
    return write_clip(path, frames, 8 * _REPEATED, large.shape[1:3]), clip.questions


def write_clip(
    path: str | os.PathLike[str], frames: Iterator[NDArray[np.uint8]], fps: int, size: tuple[int, int]
) -> Path:
    """Write frames [height, width, 3] uint8 RGB of `size` = (height, width) to `path`, as `draw_clip` does."""
    target = Path(path)
    # the move would replace a device or a pipe, even /dev/null for root
    if (target.exists() and not target.is_file()) or not target.parent.is_dir():
        there = "is a folder" if target.is_dir() else "is a device or a pipe"
        what = there if target.exists() else "is in a folder that does not exist"
        raise VideoError(f"{str(target)!r} {what}; give the path of the mp4 file to write")
    import av

    try:
        with partial(target) as path:
            _encode(path, frames, fps, size)
    except OSError as error:  # name the caller's path, not the partial file's
        raise OSError(error.errno, error.strerror, str(target)) from error
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{str(target)!r} cannot be written ({error.strerror}); try another --size or --fps"
        ) from error
    return target


def _encode(path: Path, frames: Iterator[NDArray[np.uint8]], fps: int, size: tuple[int, int]) -> None:
    import av

    name = next((name for name in _ENCODERS if name in av.codecs_available), None)
    if name is None:
        known = " nor ".join(_ENCODERS)
        raise VideoError(
            f"FFmpeg was built without an encoder for mp4 (neither {known}); install PyAV's own: pip install av"
        )
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream: Any = container.add_stream(name, rate=fps, options=_ENCODERS[name])
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"  # every player supports it
        stream.gop_size = 2 * fps
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _frames(count: int, height: int, width: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield frames one by one, so that a long clip needs little memory: uint8 [height, width, 3]."""
    if count < 1 or height < 1 or width < 1:
        raise UserError(f"got {count} frames of {width}x{height}; give a count and a size of at least 1")
    if seed < 0:
        raise UserError(f"seed is {seed}; give a whole number of at least 0")
    from runtime.drawing.scenes import each_frame

    return each_frame(count, height, width, seed)
