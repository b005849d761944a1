"""Kept cells drawn onto the pixels of a frame, as the page of a server and the report of a build draw them over one."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

PAPER, ACCENT, INK, SOFT = (251, 250, 248), (180, 73, 31), (29, 28, 26), (109, 106, 100)
_DIMMED = 0.74  # of the paper's colour over a cell that was not kept


def shade(frame: NDArray[np.uint8], cells: Collection[int], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """A copy of uint8 RGB [h, w, 3] in which cells that were not kept are dimmed, and the others framed.

    `cells`: those of `grid` (rows, columns) that were kept, numbered row by row.
    """
    rows, columns = grid
    height, width, _ = frame.shape
    row, column = (_edges(side, count) for side, count in ((height, rows), (width, columns)))
    shown = frame.astype(np.float32)
    line = max(1, round(min(height, width) / 160))
    for cell in range(rows * columns):
        top, bottom = row[cell // columns], row[cell // columns + 1]
        left, right = column[cell % columns], column[cell % columns + 1]
        part = shown[top:bottom, left:right]
        if cell not in cells:
            part += (np.asarray(PAPER, np.float32) - part) * _DIMMED
            continue
        for edge in (part[:line], part[-line:], part[:, :line], part[:, -line:]):
            edge[:] = ACCENT
    return shown.round().astype(np.uint8)


def _edges(side: int, count: int) -> list[int]:
    return [round(side * index / count) for index in range(count + 1)]
