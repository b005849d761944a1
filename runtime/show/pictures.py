"""An answer as a picture: the model's frames with kept cells, questions and answers, and times of the stages; as one
image, or frame by frame for a clip. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.show.colours import LIGHT
from runtime.show.figure import blank, save
from runtime.show.frames import shade
from runtime.show.kept import KeptCells

_COLUMNS = 8
_WIDE, _DPI = 9.6, 100  # width of an image in inches
_CLIP = (9.6, 5.4)  # size of a clip's frame in inches
_EDGE, _LINE = 0.2, 0.2  # inches: margin, height of a line of text
_LETTERS = 88  # characters of a line
_MOST_LINES = 6  # of a question with its answer
_STAGES = (LIGHT["soft"], LIGHT["accent"], "#d9a441", "#5b7c99")


@dataclass(frozen=True, eq=False)
class Story:
    """The content of a picture.

    Attributes:
        frames: uint8 RGB [F, 3, h, w], as the model gets them.
        kept: the kept cells of these frames.
        said: (question, answer) pairs.
        seconds: (name, seconds) of the stages, in order.
        facts: a line of text below.
    """

    frames: NDArray[np.uint8]
    kept: KeptCells
    said: tuple[tuple[str, str], ...]
    seconds: tuple[tuple[str, float], ...]
    facts: str

    def shown(self, number: int) -> NDArray[np.uint8]:
        """A frame with its kept cells, uint8 RGB [h, w, 3]."""
        frame = np.ascontiguousarray(self.frames[number].transpose(1, 2, 0))
        return shade(frame, self.kept.cells[number], self.kept.grid)

    def caption(self, number: int) -> str:
        """A frame's number, from 1, and its fate."""
        return f"{number + 1}: {self.kept.fate(number)}"


def draw_image(story: Story, path: Path) -> None:
    """Write a PNG with all frames."""
    count = len(story.frames)
    columns = min(_COLUMNS, count)
    rows, lines = math.ceil(count / columns), _lines(story)
    cell = (_WIDE - 2 * _EDGE) / columns
    high = cell * story.frames.shape[2] / story.frames.shape[3] + 0.22
    head, foot = 2 * _EDGE + _LINE * len(lines), 0.75
    size = (_WIDE, head + rows * high + foot)
    with _quiet():
        figure = blank(size, _DPI, LIGHT["paper"])
        _write(figure, _EDGE, size, lines)
        for number in range(count):
            left, top = number % columns * cell, head + number // columns * high
            place = (_EDGE + left, size[1] - top - high + 0.2, cell - 0.08, high - 0.24)
            axes = _axes(figure, place, size)
            axes.imshow(story.shown(number), aspect="auto", interpolation="bilinear")
            axes.set_title(story.caption(number), fontsize=6.5, color=LIGHT["soft"], y=-0.14, pad=0, loc="left")
        _bars(figure, story, size)
        save(figure, path)


def clip_frames(story: Story) -> Iterator[NDArray[np.uint8]]:
    """A clip's frames, one for each of the story's, uint8 RGB [540, 960, 3]."""
    with _quiet():
        figure = blank(_CLIP, _DPI, LIGHT["paper"])
        side = 3.9
        axes = _axes(figure, (0.3, _CLIP[1] - side - 0.3, side, side), _CLIP)
        image = axes.imshow(story.shown(0), aspect="auto", interpolation="bilinear")
        label = figure.text(0.3 / _CLIP[0], 1 - (side + 0.52) / _CLIP[1], "", fontsize=9, color=LIGHT["soft"])
        _write(figure, side + 0.65, _CLIP, _lines(story, 46))
        _bars(figure, story, _CLIP)
        for number in range(len(story.frames)):
            image.set_data(story.shown(number))
            label.set_text(story.caption(number))
            figure.canvas.draw()
            yield np.ascontiguousarray(np.asarray(figure.canvas.buffer_rgba())[:, :, :3])


def _lines(story: Story, letters: int = _LETTERS) -> list[tuple[str, bool]]:
    """Lines of questions and answers, pairs separated by an empty line; with each line whether it is an answer's."""
    found: list[tuple[str, bool]] = []
    for question, answer in story.said:
        lines = [(line, False) for line in textwrap.wrap(question, letters)]
        lines += [(line, True) for line in textwrap.wrap(answer or "(no text)", letters)]
        found += [("", False)] if found else []
        found += lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], ("...", True)]
    return found


def _write(figure: Any, left: float, size: tuple[float, float], lines: Sequence[tuple[str, bool]]) -> None:
    """Write lines from the top of a figure; `left` and `size` in inches."""
    for number, (line, answered) in enumerate(lines):
        y = 1 - (_EDGE + _LINE * number) / size[1]
        colour, weight = ("ink", "bold") if answered else ("soft", "normal")
        how = {"fontsize": 10, "color": LIGHT[colour], "fontweight": weight, "va": "top", "parse_math": False}
        figure.text(left / size[0], y, line, **how)


def _bars(figure: Any, story: Story, size: tuple[float, float]) -> None:
    """Draw one bar with a part for each stage, and a line of text below."""
    axes = _axes(figure, (_EDGE, 0.42, size[0] - 2 * _EDGE, 0.14), size)
    total = sum(seconds for _, seconds in story.seconds) or 1.0
    left, words = 0.0, []
    for (name, seconds), colour in zip(story.seconds, _STAGES * 2, strict=False):
        axes.barh(0, seconds / total, left=left, color=colour, height=1.0)
        words.append(f"{name} {1000 * seconds:.0f} ms")
        left += seconds / total
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, 0.5)
    text = " \u00b7 ".join([*words, story.facts])
    figure.text(_EDGE / size[0], 0.16 / size[1], text, fontsize=8, color=LIGHT["soft"], parse_math=False)


def _axes(figure: Any, place: tuple[float, float, float, float], size: tuple[float, float]) -> Any:
    """Axes at (left, bottom, width, height) in inches, without ticks or a frame."""
    left, bottom, width, height = place
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    axes.axis("off")
    return axes


class _quiet(warnings.catch_warnings):  # noqa: N801 - a block
    """A context without warnings about glyphs that the font lacks; they are drawn as boxes."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        return found
