"""A frame with its kept cells outlined and the others dimmed, as an HTML element or as pixels. The server's web page
draws the same in the browser."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from runtime.show.colours import DIMMED, rgb
from runtime.show.html import Html, element
from runtime.show.kept import KeptCells


def kept_frame(picture: str, kept: KeptCells, frame: int, caption: str) -> Html:
    """An HTML figure. `picture`: URL of the frame's image."""
    rows, columns = kept.grid
    there = kept.cells[frame]
    cells = [_cell(cell % columns, cell // columns, cell in there) for cell in range(rows * columns)]
    over = element("svg", *cells, viewBox=f"0 0 {columns} {rows}", preserveAspectRatio="none", aria_hidden="true")
    image = element("img", src=picture, alt=f"Frame {frame + 1}, {len(there)} of {rows * columns} cells kept")
    return element(
        "figure", element("div", image, over, class_="frame"), element("figcaption", caption), data_kept=len(there)
    )


def _cell(column: int, row: int, kept: bool) -> Html:
    """One cell: an outline is inside its cell, and dimmed neighbours touch without a seam."""
    edge = 0.02 if kept else 0.0
    x, y, side = f"{column + edge:g}", f"{row + edge:g}", f"{1 - 2 * edge:g}"
    return element("rect", x=x, y=y, width=side, height=side, class_="kept" if kept else "gone")


def shade(frame: NDArray[np.uint8], cells: Collection[int], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """A copy of uint8 RGB [h, w, 3] with kept cells outlined and the others dimmed.

    `cells`: raster indices in `grid` (rows, columns) of the kept cells.
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
