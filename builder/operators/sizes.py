"""The sizes at which `builder.kernels` measures the operators."""

from __future__ import annotations

import math
from dataclasses import dataclass

from earlytom.families import DEFAULT_FAMILY


@dataclass(frozen=True)
class KernelSize:
    """Frames and their (rows, columns) of patches of `patch` pixels, the tower's sizes, and the LLM's width."""

    frames: int
    grid: tuple[int, int]
    patch: int
    width: int
    heads: int
    intermediate: int
    layers: int
    merge_layers: tuple[int, ...]
    llm_width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        rows, columns = self.grid
        return rows * self.patch, columns * self.patch

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def cells(self) -> int:
        """P, tokens of a frame after pooling."""
        return math.prod(DEFAULT_FAMILY.cells(self.grid))


SIZES = {
    "so400m": KernelSize(32, (27, 27), 14, 1152, 16, 4304, 26, (6, 14, 20), 3584),
    "tiny": KernelSize(8, (5, 5), 4, 32, 2, 64, 4, (0, 1, 2), 24),
}
