"""Windows of Qwen2.5-VL's tower: which patches of a frame attend to each other in a layer that does not see all of it.

Windows lie in a raster over the cells of a frame (patches joined m by m) and never reach beyond it, so frames may be
merged between any two layers. Those at the right and the lower edge hold what is left of the grid. In window order the
patches of a window follow one another, window by window; a frame is then up to two bands of rows of windows, each of
whole windows and one at the right edge, so that windows of one size are a view and nothing is masked.

Notation: S patch tokens a frame, n whole windows in a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from earlytom.families.qwen3_vl.grid import SIDE

if TYPE_CHECKING:
    from torch import Tensor


class Band(NamedTuple):
    """Rows of windows that are alike: `rows` of them, each with `whole` windows of `size` patches, and behind these one
    of `rest` patches (0: none)."""

    rows: int
    whole: int
    size: int
    rest: int

    @property
    def patches(self) -> int:
        """Of all its rows."""
        return self.rows * (self.whole * self.size + self.rest)

    @property
    def pairs(self) -> int:
        """Queries times keys in its windows."""
        return self.rows * (self.whole * self.size**2 + self.rest**2)


def bands(grid: tuple[int, int], side: int) -> tuple[Band, ...]:
    """Those of a grid of (rows, columns) of patches, in windows of `side` x `side` cells, from the top."""
    rows, columns = (count // SIDE for count in grid)
    (full, below), (whole, right) = divmod(rows, side), divmod(columns, side)
    high = [(full, side), (1, below)]
    cells = SIDE**2
    return tuple(Band(n, whole, height * side * cells, height * right * cells) for n, height in high if n and height)


def order(grid: tuple[int, int], side: int) -> Tensor:
    """int64 [S / m^2]: the cell, row by row, that stands at each place of the window order."""
    import torch

    rows, columns = (count // SIDE for count in grid)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    window = row // side * (-(-columns // side)) + column // side
    return window.flatten().argsort(stable=True)  # within a window cells stay row by row


def pairs(grid: tuple[int, int], side: int) -> int:
    """Queries times keys of a frame of `grid` patches in windows of `side` x `side` cells."""
    return sum(band.pairs for band in bands(grid, side))
