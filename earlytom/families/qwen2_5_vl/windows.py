"""The attention windows of Qwen2.5-VL's tower.

Windows tile a frame's cells (m x m patches each); none spans two frames, so frames can be merged between any two
layers. Windows at the right and lower edges may be smaller. In window order a window's patches are consecutive. A frame
is then one or two bands of equal rows of windows, each row being whole windows and at most one smaller one: windows of
one size are a view, and no mask is needed.

Notation: S patch tokens a frame, n whole windows in a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from earlytom.families.qwen3_vl.grid import SIDE

if TYPE_CHECKING:
    from torch import Tensor


class Band(NamedTuple):
    """`rows` equal rows of windows: in each `whole` windows of `size` patches, then one of `rest` patches (0: none)."""

    rows: int
    whole: int
    size: int
    rest: int

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.rows * (self.whole * self.size + self.rest)

    @property
    def pairs(self) -> int:
        """Query-key pairs in its windows."""
        return self.rows * (self.whole * self.size**2 + self.rest**2)


def bands(grid: tuple[int, int], side: int) -> tuple[Band, ...]:
    """The bands, from the top, of a grid of (rows, columns) of patches in windows of `side` x `side` cells."""
    rows, columns = (count // SIDE for count in grid)
    (full, below), (whole, right) = divmod(rows, side), divmod(columns, side)
    high = [(full, side), (1, below)]
    cells = SIDE**2
    return tuple(Band(n, whole, height * side * cells, height * right * cells) for n, height in high if n and height)


def order(grid: tuple[int, int], side: int) -> Tensor:
    """The raster index of the cell at each place of the window order, [S / m^2] int64."""
    import torch

    rows, columns = (count // SIDE for count in grid)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    window = row // side * (-(-columns // side)) + column // side
    return window.flatten().argsort(stable=True)  # stable: cells of a window stay in raster order


def pairs(grid: tuple[int, int], side: int) -> int:
    """Query-key pairs of a frame of `grid` patches in windows of `side` x `side` cells."""
    return sum(band.pairs for band in bands(grid, side))
