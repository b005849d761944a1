"""Dense labels of frames: what every patch, and every cell after pooling, shows.

The generator knows each pixel's object, so a frame gives hundreds of labels. A patch or cell shows an object if enough
of its area is covered, none if almost nothing is; in between it is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from earlytom.micro.data.render import DOT, NOBODY
from earlytom.micro.data.scene import COLOURS, DIGITS, DOT_RADIUS, FRAMES, SHAPES, SIDE, Scene

COLOUR_NAMES = tuple(COLOURS)
LOOKS = (*SHAPES, "dot")
"""The looks of objects: kinds of shapes, and the dot."""
CELL_WORDS = (*COLOUR_NAMES, *LOOKS, *(str(digit) for digit in DIGITS))
"""The words whose embeddings a cell's token is trained to align with, in the order of `FrameLabels.words`."""
IGNORE = -100
PATCH = 8
GRID = SIDE // PATCH

_SHOWN = 8 / PATCH**2  # share of a patch that an object must cover to be shown
_GONE = 2.5 / PATCH**2
_CELL_SHOWN, _CELL_GONE = 0.09, 0.025


MOTION = ("time", "x", "y", "moving", "recoloured", "recent x", "recent y")
"""The columns of `cell_motion`."""


@dataclass(frozen=True)
class FrameLabels:
    """Labels of F frames with S = 81 patches and P = 25 cells.

    Attributes:
        colour: [F, S] int64, index into `COLOUR_NAMES`, `len(COLOUR_NAMES)` for none, `IGNORE` if unclear.
        look: [F, S] int64, index into `LOOKS`, `len(LOOKS)` for none.
        digit: [F, S] int64, index into `DIGITS`, `len(DIGITS)` for none.
        offset: [F, S, 3] float32, from the patch to the centre of its object (x, y) and its radius, in units of 16
            pixels; meaningful where `look` names one.
        words: [F, P, len(CELL_WORDS)] float32, 1 shown, 0 not, NaN unclear.
        place: [F, P, 3] float32, centre (x, y) and radius of the cell's largest object as a part of the frame's side;
            NaN where there is none.
        present: [F, len(COLOUR_NAMES) * len(LOOKS)] float32, 1 for each pair of colour and look in the frame.
    """

    colour: NDArray[np.int64]
    look: NDArray[np.int64]
    digit: NDArray[np.int64]
    offset: NDArray[np.float32]
    words: NDArray[np.float32]
    place: NDArray[np.float32]
    present: NDArray[np.float32]


def pooling_matrix() -> NDArray[np.floating]:
    """[P, S]: the model's bilinear pooling from 9 x 9 patches to 5 x 5 cells, as a matrix."""
    side = -(-GRID // 2)
    source = (np.arange(side) + 0.5) * GRID / side - 0.5
    low = np.floor(source).astype(int)
    one = np.zeros((side, GRID))
    one[np.arange(side), low] = 1 - (source - low)
    one[np.arange(side), np.minimum(low + 1, GRID - 1)] += source - low
    return np.kron(one, one)


_POOLING = pooling_matrix()


def object_cells(owner_of_pixel: NDArray[np.int8]) -> NDArray[np.bool_]:
    """[F, P] bool: whether a cell shows an object, that is, objects cover 9 % of it or more.

    Args:
        owner_of_pixel: [F, 72, 72], as `LabelledClip.owner`.
    """
    covered = (owner_of_pixel != NOBODY).reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4))  # [F, grid, grid]
    return covered.reshape(len(covered), -1) @ _POOLING.T >= _CELL_SHOWN


def frame_labels(scene: Scene, owner_of_pixel: NDArray[np.int8], times: NDArray[np.intp]) -> FrameLabels:
    """The labels of a scene at the frame numbers `times` [F]; `owner_of_pixel` [F, 72, 72] is from `render`."""
    frames = len(times)
    members = _members(scene, times)  # [F, K, 6]
    ids = np.array([*range(len(scene.shapes)), DOT])
    owned = (owner_of_pixel[:, None] == ids[None, :, None, None]).reshape(frames, len(ids), GRID, PATCH, GRID, PATCH)
    covered = owned.mean((3, 5)).reshape(frames, len(ids), GRID * GRID)  # [F, K, S]
    largest = covered.argmax(1)  # [F, S]
    total = covered.sum(1)
    owner = np.where(covered.max(1) >= _SHOWN, largest, np.where(total <= _GONE, -1, -2))  # -1 none, -2 unclear
    member = np.take_along_axis(members, np.maximum(owner, 0)[..., None], 1)  # [F, S, 6]

    def of_owner(column: int, none: int) -> NDArray[np.int64]:
        return np.where(owner >= 0, member[..., column], np.where(owner == -1, none, IGNORE)).astype(np.int64)

    written = _written(members)  # [F, K, S], part of the digit's box
    box = np.take_along_axis(written, np.maximum(owner, 0)[:, None], 1)[:, 0]
    digit = of_owner(2, len(DIGITS))
    digit = np.where((owner >= 0) & (member[..., 2] < len(DIGITS)) & (box < 0.2), IGNORE, digit)
    centre = (np.arange(GRID) + 0.5) * PATCH - 0.5
    patch = np.stack(np.meshgrid(centre, centre), -1).reshape(-1, 2)  # [S, (x, y)]
    offset = np.concatenate([(member[..., 3:5] - patch) / 16, member[..., 5:] / 16], -1)
    words, place = _cells(members, covered, written)
    present = np.zeros((frames, len(COLOUR_NAMES), len(LOOKS)), np.float32)
    frame, who = np.nonzero(covered.sum(2) > 0.4)
    present[frame, members[frame, who, 0].astype(int), members[frame, who, 1].astype(int)] = 1
    return FrameLabels(
        of_owner(0, len(COLOUR_NAMES)),
        of_owner(1, len(LOOKS)),
        digit,
        offset.astype(np.float32),
        words,
        place,
        present.reshape(frames, -1),
    )


def cell_motion(scene: Scene, owner_of_pixel: NDArray[np.int8], times: NDArray[np.intp]) -> NDArray[np.float32]:
    """[F, P, 7] fp32: a cell's time and its object's motion until then, by the columns of `MOTION`.

    The frame's number as a share of the clip; the object's displacement (x, y) since it was first seen, in quarters of
    the frame's side; whether it has moved since the last frame; whether its colour has changed; its displacement in the
    last quarter of a clip. All but the time are NaN if the cell shows no shape, or the shape was not there before.
    """
    frames, count = len(times), len(scene.shapes)
    ids = np.arange(count)
    owned = owner_of_pixel[:, None] == ids[None, :, None, None]
    covered = owned.reshape(frames, count, GRID, PATCH, GRID, PATCH).mean((3, 5)).reshape(frames, count, GRID * GRID)
    part = covered @ _POOLING.T  # [F, K, P]
    largest, shown = part.argmax(1), part.max(1) >= _CELL_SHOWN
    done = np.full((frames, count, len(MOTION) - 1), np.nan)
    for index, shape in enumerate(scene.shapes):
        seen = np.flatnonzero((shape.first <= times) & (times < shape.last))
        place = np.stack((shape.x[times[seen]], shape.y[times[seen]]), -1)
        done[seen, index, :2] = (place - place[:1]) / (SIDE / 4)
        done[seen[1:], index, 2] = np.abs(np.diff(place, axis=0)).sum(-1) > 0.5
        done[seen, index, 3] = scene.after_cut(times[seen]) & (shape.later_colour != shape.colour)
        before = times[seen] - FRAMES // 4
        known = before >= shape.first
        then = np.stack((shape.x[before[known]], shape.y[before[known]]), -1)
        done[seen[known], index, 4:] = (place[known] - then) / (SIDE / 4)
    told = np.take_along_axis(done, largest[..., None], 1)
    told = np.where(shown[..., None], told, np.nan)
    when = np.broadcast_to((times / FRAMES)[:, None, None], (*told.shape[:2], 1))
    return np.concatenate((when, told), -1).astype(np.float32)


def _members(scene: Scene, times: NDArray[np.intp]) -> NDArray[np.float64]:
    """[F, K, 6]: colour, look, digit (as indices), x, y, radius of the shapes and, last, of the dot."""
    members = np.zeros((len(times), len(scene.shapes) + 1, 6))
    members[..., 2] = len(DIGITS)
    for index, shape in enumerate(scene.shapes):
        colours = COLOUR_NAMES.index(shape.colour), COLOUR_NAMES.index(shape.later_colour)
        written = (shape.digit_first <= times) & (times < shape.digit_last)
        members[:, index, 0] = np.where(scene.after_cut(times), colours[1], colours[0])
        members[:, index, 1] = LOOKS.index(shape.shape)
        members[:, index, 2] = np.where(written, DIGITS.index(shape.digit) if shape.digit else 0, len(DIGITS))
        members[:, index, 3], members[:, index, 4] = scene.centre(shape, times)
        members[:, index, 5] = shape.radius
    if scene.dot is not None:
        dot = scene.dot
        members[:, -1] = (COLOUR_NAMES.index(dot.colour), LOOKS.index("dot"), len(DIGITS), dot.x, dot.y, DOT_RADIUS)
    return members


def _written(members: NDArray[np.float64]) -> NDArray[np.float64]:
    """[F, K, S]: the share of a digit's box (5 x 7 pixels) in each patch; 0 without digit."""
    start = np.arange(GRID) * PATCH - 0.5

    def overlap(centre: NDArray[np.float64], half: float) -> NDArray[np.float64]:
        low, high = centre[..., None] - half, centre[..., None] + half
        return np.clip(np.minimum(high, start + PATCH) - np.maximum(low, start), 0, None) / (2 * half)

    across, down = overlap(members[..., 3], 2.5), overlap(members[..., 4], 3.5)  # [F, K, 9]
    box = (down[..., :, None] * across[..., None, :]).reshape(*members.shape[:2], GRID * GRID)
    return box * (members[..., 2] < len(DIGITS))[..., None]


def _cells(
    members: NDArray[np.float64], covered: NDArray[np.float64], written: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`FrameLabels.words` and `place`."""
    part = covered @ _POOLING.T  # [F, K, P]
    frames, count, cells = part.shape
    strongest = np.zeros((frames, cells, len(CELL_WORDS)))
    digits = (written @ _POOLING.T) * 0.7  # a box of 35 pixels fills about half a patch
    for who in range(count):
        for frame in range(frames):
            colour, look, digit = members[frame, who, :3].astype(int)
            columns = [colour, len(COLOUR_NAMES) + look]
            strongest[frame, :, columns] = np.maximum(strongest[frame, :, columns], part[frame, who])
            if digit < len(DIGITS):
                column = len(COLOUR_NAMES) + len(LOOKS) + digit
                strongest[frame, :, column] = np.maximum(strongest[frame, :, column], digits[frame, who])
    words = np.where(strongest >= _CELL_SHOWN, 1.0, np.where(strongest <= _CELL_GONE, 0.0, np.nan))
    largest = part.argmax(1)
    place = np.take_along_axis(members[..., 3:], largest[..., None], 1) / SIDE
    place = np.where((part.max(1) >= _CELL_SHOWN)[..., None], place, np.nan)
    return words.astype(np.float32), place.astype(np.float32)
