"""What happens in a clip: which objects, where and when. Numbers only; `render` draws them.

A clip shows one to four *shapes* before a moving background. No two of them have the same colour. They rest, or move
in one of four directions for the whole of their time, or move and then stop; they may appear late, vanish early, and
pass before one another. One of them may carry a *digit* for two to five frames. A tiny *dot* in a colour of its own
may flash for one or two frames. In half of the clips there is a *cut*: another background, other shapes, and one
shape that is seen on both sides of it, in another place and perhaps in another colour.

Lengths are in pixels of the 72 x 72 frame, times in frames. A clip has `FRAMES` of them, or more: then shapes stay as
many times longer, and what is brief, a digit, a dot, is as brief as before and a smaller part of the clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

FRAMES = 16
SIDE = 72

COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 180, 50),
    "blue": (45, 70, 230),
    "yellow": (240, 225, 50),
    "orange": (245, 135, 25),
    "purple": (150, 45, 190),
    "cyan": (60, 215, 225),
    "white": (248, 248, 248),
}
"""The colours by name, as RGB."""
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIGIT_SHAPES = ("circle", "square")
"""The shapes that are wide enough for a digit."""
DIGITS = (1, 2, 3, 4, 5, 6)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""The directions of motion, as (x, y) steps; y grows downwards."""
MAX_SHAPES = 4
DOT_RADIUS = 3.5
SMALL, LARGE = 6.5, 9.5  # radii

_CUT = 0.5
_DOT = 0.6
_DIGIT = 0.75
_RECOLOUR = 0.5
_TRIES = 40


@dataclass(frozen=True)
class Cast:
    """Who is in a clip: what decides to which split the clip belongs."""

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    dot: str | None
    digit: int | None

    def key(self) -> str:
        """The cast as a text in which the order of the shapes does not matter."""
        shapes = " ".join(sorted(f"{colour}-{shape}" for colour, shape in zip(self.colours, self.shapes, strict=True)))
        return f"{shapes} dot={self.dot} digit={self.digit}"


@dataclass(frozen=True)
class Shape:
    """One object of a clip.

    Attributes:
        colour, shape, radius: how it looks until the cut.
        later_colour: how it looks after it; differs from `colour` only for the shape on both sides of a cut.
        x, y: [F] float64, its centre in every frame.
        first, last: it is seen in the frames first <= t < last.
        direction: None at rest; half of the shapes that move stop about halfway.
        digit, digit_first, digit_last: the digit on it and the frames first <= t < last that show it.
    """

    colour: str
    later_colour: str
    shape: str
    radius: float
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    first: int
    last: int
    direction: str | None
    digit: int | None
    digit_first: int
    digit_last: int


@dataclass(frozen=True)
class Dot:
    """The tiny dot, at rest in the frames first <= t < last."""

    colour: str
    x: float
    y: float
    first: int
    last: int


@dataclass(frozen=True)
class Scene:
    """A whole clip: shapes from back to front, the dot, the first frame after the cut, the camera's drift a frame."""

    shapes: tuple[Shape, ...]
    dot: Dot | None
    cut: int | None
    drift: tuple[float, float]
    frames: int = FRAMES

    def after_cut(self, times: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of the frames `times` come after the cut; none, if there is no cut."""
        return times >= (self.frames if self.cut is None else self.cut)

    def centre(self, shape: Shape, times: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where a shape is seen at the frames `times`, x and y: in its place, moved by the camera."""
        since = times - (self.frames - 1) / 2
        return shape.x[times] + self.drift[0] * since, shape.y[times] + self.drift[1] * since


def draw_cast(random: Generator, accepted: Callable[[Cast], bool]) -> Cast:
    """An accepted cast. Every count, colour, shape and digit is as likely as any other, as far as `accepted` allows.

    The number of shapes is drawn first and stays; the dot and the digit are drawn again before the shapes are. Drawing
    everything again instead would fill a split with the few single shapes that it accepts without dot and digit.
    """
    count = int(random.integers(1, MAX_SHAPES + 1))
    while True:
        colours = [str(name) for name in random.permutation(list(COLOURS))]
        shapes = tuple(str(name) for name in random.choice(SHAPES, count))
        carriers = any(shape in DIGIT_SHAPES for shape in shapes)
        for _ in range(_TRIES):
            dot = str(random.choice(colours[count:])) if random.random() < _DOT else None
            digit = int(random.choice(DIGITS)) if carriers and random.random() < _DIGIT else None
            cast = Cast(tuple(colours[:count]), shapes, dot, digit)
            if accepted(cast):
                return cast


def casts_of(scene: Scene) -> list[Cast]:
    """The casts that a scene shows: one for each digit in it, or the one without."""
    colours, shapes = tuple(shape.colour for shape in scene.shapes), tuple(shape.shape for shape in scene.shapes)
    digits = {shape.digit for shape in scene.shapes}
    dot = scene.dot.colour if scene.dot else None
    return [Cast(colours, shapes, dot, digit) for digit in digits if digit is not None or len(digits) == 1]


def draw_scene(cast: Cast, random: Generator, frames: int = FRAMES) -> Scene:
    """A clip with this cast, of that many frames, `FRAMES` or more."""
    while True:  # a crowded attempt is thrown away whole, so that no kind of shape is rarer in crowds
        scene = _attempt(cast, random, frames)
        if scene is not None:
            return scene


def _attempt(cast: Cast, random: Generator, frames: int) -> Scene | None:
    count = len(cast.colours)
    cut = int(random.integers(_scaled(6, frames), _scaled(11, frames))) if random.random() < _CUT else None
    drift = random.uniform(-0.25, 0.25, 2) * FRAMES / frames
    returning = int(random.integers(count)) if cut is not None else -1
    carriers = [i for i, shape in enumerate(cast.shapes) if shape in DIGIT_SHAPES]
    carrier = int(random.choice(carriers)) if cast.digit is not None else -1
    unused = [name for name in COLOURS if name not in cast.colours and name != cast.dot]
    shapes: list[Shape] = []
    for index, (colour, kind) in enumerate(zip(cast.colours, cast.shapes, strict=True)):
        radius = float(random.choice((SMALL, LARGE)))
        later = str(random.choice(unused)) if index == returning and random.random() < _RECOLOUR else colour
        digit = cast.digit if index == carrier else None

        def draw(
            colour: str = colour,
            later: str = later,
            kind: str = kind,
            radius: float = radius,
            digit: int | None = digit,
            returns: bool = index == returning,
        ) -> Shape:
            first, last = _lifetime(random, None if returns else cut, frames)
            x, y, direction = _path(random, radius, first, last, cut if returns else None, frames)
            length = int(random.integers(2, 6)) if digit is not None else 0
            begin = int(random.integers(first, last - length + 1))
            return Shape(colour, later, kind, radius, x, y, first, last, direction, digit, begin, begin + length)

        found = _fitting(draw, shapes)
        if found is None:
            return None
        shapes.append(found)
    dot = None
    if cast.dot is not None:
        dot = _place_dot(cast.dot, shapes, random, frames)
        if dot is None:
            return None
    return Scene(tuple(shapes), dot, cut, (float(drift[0]), float(drift[1])), frames)


def _fitting(draw: Callable[[], Shape], others: list[Shape]) -> Shape | None:
    """The first of some drawn shapes that does not hide too much of the others, or None."""
    for _ in range(_TRIES):
        candidate = draw()
        if all(_crossing(candidate, other) for other in others):
            return candidate
    return None


def _crossing(one: Shape, other: Shape) -> bool:
    """Whether two shapes overlap in a quarter of the shorter one's time at most, and in no frame with a digit."""
    times = np.arange(max(one.first, other.first), min(one.last, other.last))
    distance = np.hypot(one.x[times] - other.x[times], one.y[times] - other.y[times])
    touching = distance < 0.95 * (one.radius + other.radius) + 1
    shorter = min(one.last - one.first, other.last - other.first)
    if touching.sum() > shorter // 4:
        return False
    shown = [(shape.digit_first <= times) & (times < shape.digit_last) for shape in (one, other)]
    return not (touching & (shown[0] | shown[1])).any()


def _scaled(time: int, frames: int) -> int:
    """A time of a clip of `FRAMES` frames, in one that is longer."""
    return time * frames // FRAMES


def _lifetime(random: Generator, cut: int | None, frames: int) -> tuple[int, int]:
    """First and last (exclusive) frame; on one side of the cut if there is one."""
    if cut is not None:
        return (0, cut) if random.random() < 0.5 else (cut, frames)
    first = 0 if random.random() < 0.5 else int(random.integers(1, _scaled(9, frames)))
    last = frames if random.random() < 0.7 else int(random.integers(first + _scaled(6, frames), frames + 1))
    return first, last


def _path(
    random: Generator, radius: float, first: int, last: int, cut: int | None, frames: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], str | None]:
    """Centres in all frames, and direction. At a cut the shape jumps elsewhere, and rests."""
    low, high = radius + 1.5, SIDE - 2.5 - radius
    if cut is not None:
        places = random.uniform(low, high, (2, 2))
        side = (np.arange(frames) >= cut).astype(int)
        return places[side, 0], places[side, 1], None
    x, y = np.full(frames, random.uniform(low, high)), np.full(frames, random.uniform(low, high))
    if random.random() < 0.25:
        return x, y, None
    direction = str(random.choice(list(DIRECTIONS)))
    stops = bool(random.random() < 0.5)
    lifetime = last - first
    moving = lifetime - 1 if not stops else max(2, round(lifetime * random.uniform(0.35, 0.5)))
    length = min(random.uniform(20, 44), high - low)
    step = np.clip(np.arange(frames) - first, 0, moving) / moving * length
    dx, dy = DIRECTIONS[direction]
    start = random.uniform(low, high - length)
    along = start + step if dx + dy > 0 else SIDE - 1 - start - step
    return (along, y, direction) if dx else (x, along, direction)


def _place_dot(colour: str, shapes: list[Shape], random: Generator, frames: int) -> Dot | None:
    """A place and a time at which no shape touches the dot."""
    for _ in range(_TRIES):
        x, y = random.uniform(DOT_RADIUS + 1, SIDE - 2 - DOT_RADIUS, 2)
        length = int(random.integers(1, 3))
        first = int(random.integers(0, frames - length + 1))
        times = np.arange(first, first + length)
        clear = True
        for shape in shapes:
            distance = np.hypot(shape.x[times] - x, shape.y[times] - y)
            seen = (shape.first <= times) & (times < shape.last)
            clear = clear and not (seen & (distance < 1.3 * shape.radius + DOT_RADIUS + 2)).any()
        if clear:
            return Dot(colour, float(x), float(y), first, first + length)
    return None
