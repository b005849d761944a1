"""Questions about a scene, with their answers of one or two words.

Each kind is asked at most once of a clip, where its answer is certain. The answers of a kind are equally likely given
the words of the question, so a model that sees no video stays at chance (`Kind.chance`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from numpy.random import Generator

from earlytom.micro.data.scene import COLOURS, DIGITS, MAX_SHAPES, SHAPES, SIDE, Scene, Shape

_NUMBERS = ("one", "two", "three", "four")
_MIDDLE = (SIDE - 1) / 2
_CLEAR = 7.0  # pixels from the middle from which "left" and "top" are certain
_APART = 3  # frames between two arrivals of which one clearly comes first


@dataclass(frozen=True)
class Question:
    """One question: its kind (a key of `KINDS`), its text, its answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Kind:
    """One kind of question.

    Attributes:
        needs: what answering takes: "detail" (a small thing in a few frames), "time", "both", or "content".
        chance: accuracy of the best answer without the video.
        ask: text and answer for a scene, or None where the kind does not apply.
    """

    needs: str
    chance: float
    ask: Callable[[Scene, Generator], tuple[str, str] | None]


def questions(scene: Scene, random: Generator) -> tuple[Question, ...]:
    """One question of every kind that applies to the scene, in the order of `KINDS`."""
    asked = []
    for name, kind in KINDS.items():
        found = kind.ask(scene, random)
        if found is not None:
            asked.append(Question(name, *found))
    return tuple(asked)


def _pick(shapes: list[Shape], random: Generator) -> Shape | None:
    return shapes[int(random.integers(len(shapes)))] if shapes else None


def _steady(scene: Scene) -> list[Shape]:
    """The shapes that keep their colour, which can be named by it."""
    return [shape for shape in scene.shapes if shape.colour == shape.later_colour]


def _only_ones(scene: Scene) -> list[Shape]:
    """The shapes that are the only ones of their kind."""
    kinds = [shape.shape for shape in scene.shapes]
    return [shape for shape in scene.shapes if kinds.count(shape.shape) == 1]


def _colour(scene: Scene, random: Generator) -> tuple[str, str] | None:
    shape = _pick([shape for shape in _only_ones(scene) if shape.colour == shape.later_colour], random)
    return None if shape is None else (f"What color is the {shape.shape}?", shape.colour)


def _shape(scene: Scene, random: Generator) -> tuple[str, str] | None:
    shape = _pick(_steady(scene), random)
    return None if shape is None else (f"What shape is the {shape.colour} object?", shape.shape)


def _digit(scene: Scene, random: Generator) -> tuple[str, str] | None:
    shape = _pick([shape for shape in scene.shapes if shape.digit is not None], random)
    return None if shape is None else (f"Which digit is on the {shape.shape}?", str(shape.digit))


def _dot(scene: Scene, random: Generator) -> tuple[str, str] | None:
    return None if scene.dot is None else ("What color is the dot?", scene.dot.colour)


def _exists(scene: Scene, random: Generator) -> tuple[str, str] | None:
    shape = _pick(_steady(scene), random)
    if shape is None:
        return None
    if random.random() < 0.5:
        return f"Is there a {shape.colour} {shape.shape}?", "yes"
    # The wrong shape is one of another object where there is one: colour and shape are both in the clip, not together.
    others = sorted({other.shape for other in scene.shapes} - {shape.shape}) or [
        other for other in SHAPES if other != shape.shape
    ]
    return f"Is there a {shape.colour} {others[int(random.integers(len(others)))]}?", "no"


def _count(scene: Scene, random: Generator) -> tuple[str, str] | None:
    if len(_steady(scene)) < len(scene.shapes):
        return None
    return "How many shapes appeared?", _NUMBERS[len(scene.shapes) - 1]


def _direction(scene: Scene, random: Generator) -> tuple[str, str] | None:
    shape = _pick([shape for shape in scene.shapes if shape.direction is not None], random)
    return None if shape is None else (f"In which direction does the {shape.colour} object move?", str(shape.direction))


def _order(scene: Scene, random: Generator) -> tuple[str, str] | None:
    shapes = _steady(scene)
    pairs = [(one, two) for one in shapes for two in shapes if two.first - one.first >= _APART]
    if not pairs:
        return None
    first, second = pairs[int(random.integers(len(pairs)))]
    named = (first, second) if random.random() < 0.5 else (second, first)
    return f"Which came first, the {named[0].colour} or the {named[1].colour} object?", first.colour


def _where(scene: Scene, random: Generator) -> tuple[str, str] | None:
    def clear(shape: Shape) -> bool:
        return min(abs(shape.x[-1] - _MIDDLE), abs(shape.y[-1] - _MIDDLE)) >= _CLEAR

    shape = _pick([shape for shape in _steady(scene) if shape.last == scene.frames and clear(shape)], random)
    if shape is None:
        return None
    rows, columns = ("top", "bottom"), ("left", "right")
    place = f"{rows[int(shape.y[-1] > _MIDDLE)]} {columns[int(shape.x[-1] > _MIDDLE)]}"
    return f"Where is the {shape.colour} object at the end?", place


def _returning(scene: Scene) -> list[Shape]:
    """The shape on both sides of the cut, if it can be named by its kind."""
    if scene.cut is None:
        return []
    return [shape for shape in _only_ones(scene) if shape.first < scene.cut < shape.last]


def _after(scene: Scene, random: Generator) -> tuple[str, str] | None:
    shape = _pick(_returning(scene), random)
    return None if shape is None else (f"What color is the {shape.shape} after the cut?", shape.later_colour)


def _changed(scene: Scene, random: Generator) -> tuple[str, str] | None:
    shape = _pick(_returning(scene), random)
    if shape is None:
        return None
    return f"Did the {shape.shape} change after the cut?", "no" if shape.colour == shape.later_colour else "yes"


KINDS = {
    "colour": Kind("content", 1 / len(COLOURS), _colour),
    "shape": Kind("content", 1 / len(SHAPES), _shape),
    "digit": Kind("detail", 1 / len(DIGITS), _digit),
    "dot": Kind("detail", 1 / len(COLOURS), _dot),
    "exists": Kind("content", 1 / 2, _exists),
    "count": Kind("time", 1 / MAX_SHAPES, _count),
    "direction": Kind("time", 1 / 4, _direction),
    "order": Kind("time", 1 / 2, _order),
    "where": Kind("both", 1 / 4, _where),
    "after": Kind("both", 1 / len(COLOURS), _after),
    "changed": Kind("both", 1 / 2, _changed),
}
"""The kinds of questions by name."""
