"""A frame with what was kept of it: cells that were not kept are dimmed, the others framed. As an element of a page,
which follows a light or a dark paper, or as pixels. The page of a server does the same in its browser."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from runtime.show.colours import DIMMED, rgb
from runtime.show.html import Html, element
from runtime.show.kept import KeptCells


def kept_frame(picture: str, kept: KeptCells, frame: int, caption: str) -> Html:
    """A figure of a page. `picture`: address of the frame's pixels."""
    rows, columns = kept.grid
    there = kept.cells[frame]
    cells = [_cell(cell % columns, cell // columns, cell in there) for cell in range(rows * columns)]
    over = element("svg", *cells, viewBox=f"0 0 {columns} {rows}", preserveAspectRatio="none", aria_hidden="true")
    image = element("img", src=picture, alt=f"Frame {frame + 1}, {len(there)} of {rows * columns} cells kept")
    return element(
        "figure", element("div", image, over, class_="frame"), element("figcaption", caption), data_kept=len(there)
    )


def _cell(column: int, row: int, kept: bool) -> Html:
    """One cell: its line stays inside it, what dims it leaves no seam."""
    edge = 0.02 if kept else 0.0
    x, y, side = f"{column + edge:g}", f"{row + edge:g}", f"{1 - 2 * edge:g}"
    return element("rect", x=x, y=y, width=side, height=side, class_="kept" if kept else "gone")


def shade(frame: NDArray[np.uint8], cells: Collection[int], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """A copy of uint8 RGB [h, w, 3] with cells dimmed and framed.

    `cells`: those of `grid` (rows, columns) that were kept, numbered row by row.
    """
    rows, columns = grid
    height, width, _ = frame.shape
    row, column = (_edges(side, count) for side, count in ((height, rows), (width, columns)))
    shown = frame.astype(np.float32)
    paper, accent = np.asarray(rgb("paper"), np.float32), rgb("accent")
    line = max(1, round(min(height, width) / 160))
    for cell in range(rows * columns):
        top, bottom = row[cell // columns], row[cell // columns + 1]
        left, right = column[cell % columns], column[cell % columns + 1]
        part = shown[top:bottom, left:right]
        if cell not in cells:
            part += (paper - part) * DIMMED
            continue
        for edge in (part[:line], part[-line:], part[:, :line], part[:, -line:]):
            edge[:] = accent
    return shown.round().astype(np.uint8)


def _edges(side: int, count: int) -> list[int]:
    return [round(side * index / count) for index in range(count + 1)]
