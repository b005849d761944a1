"""Draws a video clip, for demonstrations and tests where no video is at hand, and knows nothing of who looks at it.

Three scenes with hard cuts between them, each a third of the clip, made to be to a video model what real ones are:
something moves everywhere (a camera passing over hills behind moving shapes), almost nothing moves (a room with a
pendulum), and something turns and grows (a night sky). Sensor noise lies over everything, so that no two frames are
equal and frames of the still scene are nearly so.

    python -m runtime.clip OUT.mp4 [--seconds 6] [--fps 24] [--size 320x240] [--seed 0]

With `--test-clip N` it writes clip N of the bundled model's test set instead, four times as large, and prints what one
can ask about it and the right answers.

The frames are a function of the arguments alone; the file is one of those and of the encoder.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from earlytom.errors import UserError
from earlytom.micro.data import Question, labelled_clip
from runtime.cli import Parser, run
from runtime.errors import VideoError
from runtime.partial import partial

Image = NDArray[np.float32]  # [h, w, 3], 0 to 255
Plane = NDArray[np.floating[Any]]  # [h, w]

NOISE = 2.5  # standard deviation of the sensor noise, of 255
_ENLARGED, _REPEATED = 4, 3  # sides and frames of a test clip
_LARGEST = 8192  # pixels a side
EXAMPLES = """
examples:
  python -m runtime.clip clip.mp4
      three scenes, to try any model on
  python -m runtime.clip engines/demo.mp4 --test-clip 3
      a clip that the bundled model understands, with questions and their right answers

The exit status is 0 when the file is there, 2 when it cannot be written, 130 after Ctrl-C.
"""
# The first of these that is there. x264's macroblock tree gives other bits each time even on one thread, so it is off.
_ENCODERS = {
    "libx264": {"crf": "20", "preset": "veryfast", "x264-params": "mbtree=0"},
    "mpeg4": {"b": "4000000"},
}


def draw_frames(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """`count` frames that sample the whole clip evenly: uint8 RGB [count, 3, height, width].

    Equal arguments give equal frames; another seed gives other hills, colours, places and directions.
    Raises UserError for a count or a side below 1, or a negative seed.
    """
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

    H.264 where this FFmpeg can encode it, else MPEG-4. The file appears when it is complete: until then it has another
    name in the same folder, and if anything goes wrong (Ctrl-C included) that one is removed.
    Raises UserError for a length, rate or size that cannot be drawn, VideoError when the folder is missing or FFmpeg
    cannot write, and OSError as it comes (no permission, disk full).
    """
    height, width = size
    if not 0 < seconds < float("inf") or fps < 1 or round(seconds * fps) < 2:
        raise UserError(f"{seconds} seconds at {fps} frames per second is no clip; give at least 2 frames in all")
    if not (16 <= height <= _LARGEST and 16 <= width <= _LARGEST) or height % 2 or width % 2:
        raise UserError(f"size is {width}x{height}; give an even width and height of 16 to {_LARGEST} pixels")
    return write_clip(path, _frames(round(seconds * fps), height, width, seed), fps, size)


def write_test_clip(path: str | os.PathLike[str], index: int) -> tuple[Path, tuple[Question, ...]]:
    """Write clip `index` of the bundled model's test set to `path` as mp4; returns the path and the clip's questions.

    Each of its frames is written several times and each pixel as a square, so that encoding takes little away and 16
    frames sampled evenly are its 16 frames. Raises as `draw_clip`, and UserError for a negative index.
    """
    clip = labelled_clip("test", index)
    large = clip.frames.repeat(_ENLARGED, 2).repeat(_ENLARGED, 3).transpose(0, 2, 3, 1)  # [F, h, w, 3]
    frames = (np.ascontiguousarray(frame) for frame in large for _ in range(_REPEATED))
    return write_clip(path, frames, 8 * _REPEATED, large.shape[1:3]), clip.questions


def write_clip(
    path: str | os.PathLike[str], frames: Iterator[NDArray[np.uint8]], fps: int, size: tuple[int, int]
) -> Path:
    """Write frames [height, width, 3] uint8 RGB of `size` = (height, width) to `path`, as `draw_clip` does."""
    target = Path(path)
    # a device or a pipe would be replaced by the finished file: /dev/null too, for whoever may
    if (target.exists() and not target.is_file()) or not target.parent.is_dir():
        there = "is a folder" if target.is_dir() else "is a device or a pipe"
        what = there if target.exists() else "is in a folder that does not exist"
        raise VideoError(f"{str(target)!r} {what}; give the path of the mp4 file to write")
    try:
        with partial(target) as path:
            _encode(path, frames, fps, size)
    except OSError as error:  # about the name that the caller knows
        raise OSError(error.errno, error.strerror, str(target)) from error
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{str(target)!r} cannot be written ({error.strerror}); try another --size or --fps"
        ) from error
    return target


def _encode(path: Path, frames: Iterator[NDArray[np.uint8]], fps: int, size: tuple[int, int]) -> None:
    name = next((name for name in _ENCODERS if name in av.codecs_available), None)
    if name is None:
        known = " nor ".join(_ENCODERS)
        raise VideoError(
            f"FFmpeg was built without an encoder for mp4 (neither {known}); install PyAV's own: pip install av"
        )
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream: Any = container.add_stream(name, rate=fps, options=_ENCODERS[name])
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"  # what every player knows
        stream.gop_size = 2 * fps
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _frames(count: int, height: int, width: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """One frame after another, so that a long clip needs no memory: uint8 [height, width, 3]."""
    if count < 1 or height < 1 or width < 1:
        raise UserError(f"got {count} frames of {width}x{height}; give a count and a size of at least 1")
    if seed < 0:
        raise UserError(f"seed is {seed}; give a whole number of at least 0")
    scenes = [scene(np.random.default_rng([seed, i]), height, width) for i, scene in enumerate((_hills, _room, _night))]
    for index in range(count):
        time = 3 * (index + 0.5) / count  # scenes passed
        image = scenes[int(time)](time % 1)
        image += NOISE * np.random.default_rng([seed, 3, index]).standard_normal(image.shape, dtype=np.float32)
        yield np.clip(image + 0.5, 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------ scenes
# Each prepares once what stays and returns the function that draws the scene at a time of 0 to 1. Places are in units
# of half the height of the picture, from its middle, y downwards.


def _hills(rng: np.random.Generator, height: int, width: int) -> Callable[[float], Image]:
    """The camera passes over textured ground; a ball flies an arc, a box and a triangle cross the picture."""
    x, y = _grid(height, width)
    ground = _noise(rng, height, 2 * width, cells=(3, 6, 12, 24, 48))
    world = _blend(ground, rng.uniform((20, 70, 20), (60, 110, 60)), rng.uniform((150, 160, 80), (220, 210, 130)))
    pan = _either(rng) * rng.uniform(0.5, 0.8) * width
    reach, lift, lane = width / height, rng.uniform(0.8, 1.2), rng.uniform(0.3, 0.6)
    ball, box, wedge = _colour(rng, 0), _colour(rng, 2), _colour(rng, 1)

    def draw(time: float) -> Image:
        image = np.take(world, np.arange(width) + round(pan * time), axis=1, mode="wrap")
        along = (2 * time - 1) * reach
        _paint(image, _box(x + along, y - lane, 0.3, 0.2, 0), box)
        _paint(image, _triangle(x - 0.6 * along, y + 0.5 - 0.5 * time, 0.22, 4 * time), wedge)
        arc = 0.4 - lift * (1 - (2 * time - 1) ** 2)
        _paint(image, _disc(x - along, y - arc, 0.25), ball)
        _paint(image, _disc(x - along + 0.08, y - arc + 0.08, 0.06), (255, 255, 255))  # a highlight
        return image

    return draw


def _room(rng: np.random.Generator, height: int, width: int) -> Callable[[float], Image]:
    """A room in which only a small pendulum swings."""
    x, y = _grid(height, width)
    wall = _blend(_noise(rng, height, width, cells=(40, 80)), (196, 178, 150), (214, 196, 168))
    wall *= (1.05 - 0.25 * np.hypot(x, y) / np.hypot(width / height, 1))[..., None]  # the corners are darker
    table = _blend(_noise(rng, height, width, cells=(2, 30)), (96, 58, 30), (130, 84, 48))
    _paint(wall, 0.45 - y, table)
    side = _either(rng)
    _paint(wall, _box(x - 0.55 * side, y + 0.35, 0.42, 0.42, 0), (250, 250, 245))
    _paint(wall, _box(x - 0.55 * side, y + 0.35, 0.36, 0.36, 0), (120, 176, 226))
    _paint(wall, _box(x - 0.55 * side, y + 0.35, 0.02, 0.36, 0), (250, 250, 245))
    _paint(wall, _disc(x + 0.15 * side, y - 0.38, 0.18), _colour(rng, 1))
    _paint(wall, _box(x + 0.75 * side, y - 0.3, 0.14, 0.24, 0), _colour(rng, 2))

    def draw(time: float) -> Image:
        image = wall.copy()
        angle = 0.35 * math.sin(4 * math.pi * time)
        tip_x, tip_y = -0.55 * side + 0.4 * math.sin(angle), -0.75 + 0.4 * math.cos(angle)
        _paint(image, _box(x - (tip_x - 0.55 * side) / 2, y - (tip_y - 0.75) / 2, 0.008, 0.2, -angle), (40, 30, 25))
        _paint(image, _disc(x - tip_x, y - tip_y, 0.06), (190, 150, 40))
        return image

    return draw


def _night(rng: np.random.Generator, height: int, width: int) -> Callable[[float], Image]:
    """Stars over dark clouds that rise; a square turns and a ring grows."""
    x, y = _grid(height, width)
    clouds = _blend(_noise(rng, 2 * height, width, cells=(2, 4, 8, 16)), (8, 10, 34), (58, 40, 96))
    stars = rng.random(clouds.shape[:2], dtype=np.float32) > 0.997
    clouds[stars] = 235
    rise, spin = rng.uniform(0.3, 0.6) * height, _either(rng) * rng.uniform(2, 4)
    square, ring, place = _colour(rng, 0), _colour(rng, 3), rng.uniform(0.35, 0.6)

    def draw(time: float) -> Image:
        image = np.take(clouds, np.arange(height) + round(rise * time), axis=0, mode="wrap")
        radius = 0.15 + 0.6 * time
        _paint(image, np.abs(_disc(x + place, y, radius)) - 0.05, ring)
        _paint(image, _box(x - place, y - 0.1, 0.3, 0.3, spin * time), square)
        return image

    return draw


# ----------------------------------------------------------------------------------------------------- drawing tools


def _grid(height: int, width: int) -> tuple[Plane, Plane]:
    """x and y of every pixel's middle: [h, w] each."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (2 * x + 1 - width) / height, (2 * y + 1 - height) / height


def _noise(rng: np.random.Generator, height: int, width: int, cells: tuple[int, ...]) -> NDArray[np.float32]:
    """Smooth noise of 0 to 1 that goes on where it ends: [h, w]. Each of `cells` per height is half as strong."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave, rows in enumerate(cells):
        columns = max(1, round(rows * width / height))
        knots = rng.random((rows, columns), dtype=np.float32)
        upper, row_share = _between(height, rows)
        left, column_share = _between(width, columns)
        across = knots[:, left] * (1 - column_share) + knots[:, (left + 1) % columns] * column_share  # [rows, w]
        share = row_share[:, None]
        total += (across[upper] * (1 - share) + across[(upper + 1) % rows] * share) / 2**octave
    low, high = total.min(), total.max()
    return ((total - low) / max(high - low, 1e-6)).astype(np.float32)


def _between(pixels: int, knots: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each pixel the knot before it and how near the next one is, eased: [pixels] each."""
    place = np.arange(pixels, dtype=np.float32) * knots / pixels
    before = place.astype(np.int64)
    share = place - before
    return before, (share * share * (3 - 2 * share)).astype(np.float32)


def _blend(share: NDArray[np.float32], low: object, high: object) -> Image:
    """From the colour `low` (share 0) to `high` (share 1): [h, w, 3]."""
    first, last = np.asarray(low, dtype=np.float32), np.asarray(high, dtype=np.float32)
    return first + (last - first) * share[..., None]


def _paint(image: Image, distance: Plane, colour: object) -> None:
    """Cover `image` where `distance` from the shape's edge is negative, with an edge one pixel soft."""
    cover = np.clip(0.5 - distance * image.shape[0] / 2, 0, 1)[..., None]
    image += (np.asarray(colour, dtype=np.float32) - image) * cover


def _disc(x: Plane, y: Plane, radius: float) -> Plane:
    return np.hypot(x, y) - radius


def _box(x: Plane, y: Plane, half_width: float, half_height: float, angle: float) -> Plane:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.maximum(np.abs(x * cos + y * sin) - half_width, np.abs(y * cos - x * sin) - half_height)


def _triangle(x: Plane, y: Plane, inner_radius: float, angle: float) -> Plane:
    sides = (angle + turn * 2 * math.pi / 3 for turn in range(3))
    return np.maximum.reduce([x * math.cos(a) + y * math.sin(a) - inner_radius for a in sides])


def _either(rng: np.random.Generator) -> int:
    return int(rng.choice([-1, 1]))


def _colour(rng: np.random.Generator, kind: int) -> NDArray[np.float32]:
    """A strong colour near red, green, blue or yellow (kind 0 to 3): [3]."""
    base = ((225, 40, 40), (40, 180, 70), (45, 80, 225), (240, 210, 50))[kind]
    return np.clip(base + rng.uniform(-25, 25, 3), 0, 255).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ command line


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.lower().partition("x")
    if not separator or not width.isdecimal() or not height.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give WIDTHxHEIGHT, as in 320x240")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    result = Parser(
        prog="python -m runtime.clip",
        description="Draw a video clip of three scenes, or one of the bundled model's world to ask about.",
        epilog=EXAMPLES,
    )
    result.add_argument("out", metavar="OUT.mp4", help="file to write; one that exists is replaced")
    result.add_argument("--seconds", type=float, default=6.0, metavar="S", help="length (default: 6)")
    result.add_argument("--fps", type=int, default=24, metavar="N", help="frames per second (default: 24)")
    result.add_argument("--size", type=_size, default=(240, 320), metavar="WxH", help="even sides (default: 320x240)")
    result.add_argument("--seed", type=int, default=0, metavar="N", help="other seeds draw other clips (default: 0)")
    result.add_argument(
        "--test-clip",
        type=int,
        metavar="N",
        help="write clip N of the bundled model's test set instead, and print its questions with their answers",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    args = parser().parse_args(argv)
    if args.test_clip is not None:
        path, asked = write_test_clip(args.out, args.test_clip)
        print(f"{path}: clip {args.test_clip} of the test set; one can ask, and right is:")
        for question in asked:
            print(f"  {question.text}  {question.answer}")
        return 0
    path = draw_clip(args.out, args.seconds, args.fps, args.size, args.seed)
    print(f"{path}: {args.seconds:g} s, {args.size[1]}x{args.size[0]} at {args.fps} frames per second")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
