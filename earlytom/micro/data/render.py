"""Draws a scene: textured moving background, antialiased shapes, digits, changing brightness, sensor noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from earlytom.micro.data.scene import COLOURS, DOT_RADIUS, SIDE, Scene, Shape

Array = NDArray[np.float32]

DOT, NOBODY = -1, -2
"""Owners of pixels that belong to no shape."""

_GLYPHS = {
    1: ("..#..", ".##..", "..#..", "..#..", "..#..", "..#..", ".###."),
    2: (".###.", "#...#", "....#", "...#.", "..#..", ".#...", "#####"),
    3: ("####.", "....#", "....#", ".###.", "....#", "....#", "####."),
    4: ("#..#.", "#..#.", "#..#.", "#####", "...#.", "...#.", "...#."),
    5: ("#####", "#....", "####.", "....#", "....#", "#...#", ".###."),
    6: (".###.", "#....", "#....", "####.", "#...#", "#...#", ".###."),
}
_DARK = ("red", "blue", "purple", "green")  # colours that a white digit is read on; black on the others
_GRATINGS = 3
_WINDOW = 12  # half the side of the square in which an object is drawn: its radius, times root two, and a margin


def render(scene: Scene, random: Generator, times: NDArray[np.intp]) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Frames [F', 3, 72, 72] uint8 RGB and owners of their pixels [F', 72, 72] int8, at the frame numbers `times`."""
    picture = _background(scene, random, times)  # [F', 72, 72, 3]
    owner = np.full(picture.shape[:3], NOBODY, np.int8)
    for index, shape in enumerate(scene.shapes):
        _draw_shape(picture, owner, scene, shape, index, times)
    if scene.dot is not None:
        dot = scene.dot
        for at, time in enumerate(times):
            if dot.first <= time < dot.last:
                _blit(picture[at], owner[at], dot.x, dot.y, _disc, DOT_RADIUS, COLOURS[dot.colour], DOT)
    gain = 1 + random.uniform(-0.12, 0.12) * np.linspace(-1, 1, scene.frames)[times] + random.uniform(-0.08, 0.08)
    picture *= gain[:, None, None, None].astype(np.float32)
    noise = random.standard_normal(picture.shape, np.float32)
    picture += noise * np.float32(random.uniform(2, 7))
    frames = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2)), owner


def _background(scene: Scene, random: Generator, times: NDArray[np.intp]) -> Array:
    """Muted gratings that move with the camera and a little on their own; others after the cut."""
    picture = np.empty((len(times), SIDE, SIDE, 3), np.float32)
    for after in (False, True):
        base = random.uniform(55, 135, 3)
        angle = random.uniform(0, 2 * np.pi, _GRATINGS)
        wave = 2 * np.pi / random.uniform(9, 40, _GRATINGS)
        phase = random.uniform(0, 2 * np.pi, _GRATINGS)
        strength = random.uniform(-14, 14, (_GRATINGS, 3))
        velocity = random.uniform(-0.4, 0.4, 2)
        chosen = np.flatnonzero(scene.after_cut(times) == after)
        kx, ky = wave * np.cos(angle), wave * np.sin(angle)
        moved = times[chosen, None] * (velocity + scene.drift)  # [F'', 2]
        shift = phase - kx * moved[:, :1] - ky * moved[:, 1:]  # [F'', G]
        along = np.arange(SIDE, dtype=np.float32)
        # sin(a + b) from tables of a row and a column, for each grating
        row, column = ky[None, :, None] * along + shift[:, :, None], kx[:, None] * along
        waves = np.sin(row)[..., None] * np.cos(column)[None, :, None] + (
            np.cos(row)[..., None] * np.sin(column)[None, :, None]
        )  # [F'', G, 72, 72]
        tinted = np.einsum("fgyx,gc->fyxc", waves.astype(np.float32), strength.astype(np.float32), optimize=True)
        picture[chosen] = tinted + base.astype(np.float32)
    return picture


def _draw_shape(
    picture: Array, owner: NDArray[np.int8], scene: Scene, shape: Shape, index: int, times: NDArray[np.intp]
) -> None:
    x, y = scene.centre(shape, times)
    after = scene.after_cut(times)
    for at, time in enumerate(times):
        if not shape.first <= time < shape.last:
            continue
        colour = shape.later_colour if after[at] else shape.colour
        _blit(picture[at], owner[at], x[at], y[at], _SILHOUETTES[shape.shape], shape.radius, COLOURS[colour], index)
        if shape.digit is not None and shape.digit_first <= time < shape.digit_last:
            _write(picture[at], x[at], y[at], shape.digit, (250.0 if colour in _DARK else 10.0))


def _blit(
    picture: Array,
    owner: NDArray[np.int8],
    x: float,
    y: float,
    silhouette: Callable[[Array, Array, float], Array],
    radius: float,
    colour: tuple[int, int, int],
    index: int,
) -> None:
    """Paint one object into a frame [72, 72, 3], edges blended."""
    left, top = round(x) - _WINDOW, round(y) - _WINDOW
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + 2 * _WINDOW, SIDE), min(top + 2 * _WINDOW, SIDE)
    dx = (np.arange(x0, x1) - x).astype(np.float32)[None, :]
    dy = (np.arange(y0, y1) - y).astype(np.float32)[:, None]
    cover = np.clip(0.5 - silhouette(dx, dy, radius), 0, 1)
    patch = picture[y0:y1, x0:x1]
    patch += cover[..., None] * (np.asarray(colour, np.float32) - patch)
    owner[y0:y1, x0:x1][cover > 0.5] = index


def _write(picture: Array, x: float, y: float, digit: int, value: float) -> None:
    """Write a digit of 5 x 7 pixels with its middle at (x, y)."""
    left, top = round(x) - 2, round(y) - 3
    picture[top : top + 7, left : left + 5][_MASKS[digit]] = value


_MASKS = {digit: np.array([[cell == "#" for cell in line] for line in lines]) for digit, lines in _GLYPHS.items()}


# Signed distances, negative inside, of a shape of the given radius around the origin.


def _disc(dx: Array, dy: Array, radius: float) -> Array:
    return np.hypot(dx, dy) - np.float32(radius)


def _square(dx: Array, dy: Array, radius: float) -> Array:
    return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(0.9 * radius)


def _triangle(dx: Array, dy: Array, radius: float) -> Array:
    # the tip at the top, the base at the bottom
    sides = np.abs(dx) * np.float32(0.866) - (dy + np.float32(radius)) * np.float32(0.5)
    return np.maximum(sides, dy - np.float32(0.7 * radius))


def _cross(dx: Array, dy: Array, radius: float) -> Array:
    long, wide = np.float32(radius), np.float32(0.36 * radius)
    ax, ay = np.abs(dx), np.abs(dy)
    return np.minimum(np.maximum(ax - long, ay - wide), np.maximum(ax - wide, ay - long))


def _ring(dx: Array, dy: Array, radius: float) -> Array:
    width = np.float32(0.2 * radius)
    return np.abs(np.hypot(dx, dy) - np.float32(0.8 * radius)) - width


_SILHOUETTES = {"circle": _disc, "square": _square, "triangle": _triangle, "cross": _cross, "ring": _ring}
