"""The three scenes of a drawn clip (`runtime.drawing.clips`), frame by frame: hills, a room, a night sky.

Frames depend on the arguments only, so equal arguments give equal frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]  # [h, w, 3], 0 to 255
Plane = NDArray[np.floating[Any]]  # [h, w]

NOISE = 2.5  # standard deviation of the sensor noise, on the scale of 0 to 255


def each_frame(count: int, height: int, width: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield frames one by one, so that a long clip needs little memory: uint8 RGB [height, width, 3]."""
    scenes = [scene(np.random.default_rng([seed, i]), height, width) for i, scene in enumerate((_hills, _room, _night))]
    for index in range(count):
        time = 3 * (index + 0.5) / count  # in scenes
        image = scenes[int(time)](time % 1)
        image += NOISE * np.random.default_rng([seed, 3, index]).standard_normal(image.shape, dtype=np.float32)
        yield np.clip(image + 0.5, 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------ scenes
# Each prepares the static parts once, and returns a function that draws the scene at a time of 0 to 1. Coordinates are
# in units of half the picture's height, from its centre, y downwards.


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
    """x and y of every pixel's centre: [h, w] each."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (2 * x + 1 - width) / height, (2 * y + 1 - height) / height


def _noise(rng: np.random.Generator, height: int, width: int, cells: tuple[int, ...]) -> NDArray[np.float32]:
    """Smooth tileable noise of 0 to 1, [h, w]: octaves of `cells` cells per height, each half as strong as the last."""
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
    """For each pixel the knot before it and the eased (smoothstep) weight of the next one: [pixels] each."""
    place = np.arange(pixels, dtype=np.float32) * knots / pixels
    before = place.astype(np.int64)
    share = place - before
    return before, (share * share * (3 - 2 * share)).astype(np.float32)


def _blend(share: NDArray[np.float32], low: object, high: object) -> Image:
    """Interpolate from the colour `low` (share 0) to `high` (share 1): [h, w, 3]."""
    first, last = np.asarray(low, dtype=np.float32), np.asarray(high, dtype=np.float32)
    return first + (last - first) * share[..., None]


def _paint(image: Image, distance: Plane, colour: object) -> None:
    """Paint `image` where the signed `distance` to the shape's edge is negative, with an edge one pixel soft."""
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
