"""The kept cells and merged frames of a clip, to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_NOTHING = 0.005  # weights up to this are not drawn


@dataclass(frozen=True)
class KeptCells:
    """The kept cells of each frame, and how frames were merged.

    Attributes:
        grid: (rows, columns) of the P cells of a frame.
        cells: raster indices of the kept cells of each of the clip's F frames.
        sources: [F'][F], weight of each input frame in each remaining frame.
    """

    grid: tuple[int, int]
    cells: tuple[frozenset[int], ...]
    sources: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, place: Sequence[int], sources: Sequence[Sequence[float]], grid: tuple[int, int]) -> KeptCells:
        """From what an engine returns (`runtime.engine.layout`): place [N], frame * P + cell, and sources [F', F].

        Raises:
            ValueError: they do not fit each other, or the grid.
        """
        frames, each = len(sources[0]) if sources else 0, grid[0] * grid[1]
        if any(len(row) != frames for row in sources) or not all(0 <= one < frames * each for one in place):
            raise ValueError(f"places up to {max(place, default=0)} of {frames} frames with {each} cells")
        found: list[set[int]] = [set() for _ in range(frames)]
        for one in place:
            found[one // each].add(one % each)
        return cls(grid, tuple(map(frozenset, found)), tuple(tuple(map(float, row)) for row in sources))

    @property
    def tokens(self) -> int:
        """Number of kept cells; tokens at the same place count once."""
        return sum(map(len, self.cells))

    def became(self, frame: int) -> tuple[int, ...]:
        """The remaining frames in which this one has a weight, the largest weight first."""
        shares = [(row[frame], -slot) for slot, row in enumerate(self.sources) if row[frame] > _NOTHING]
        return tuple(-slot for _, slot in sorted(shares, reverse=True))

    def fate(self, frame: int) -> str:
        """A frame's fate in words: its number of kept cells, or "merged" or "dropped"."""
        cells = len(self.cells[frame])
        return f"{cells} cell{'' if cells == 1 else 's'}" if cells else "merged" if self.became(frame) else "dropped"

    def links(self) -> tuple[tuple[int, int, float], ...]:
        """(input frame, remaining frame, weight) for every weight that is drawn."""
        return tuple(
            (frame, slot, share)
            for slot, row in enumerate(self.sources)
            for frame, share in enumerate(row)
            if share > _NOTHING
        )


def grid_of(cells: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) with rows * columns == `cells` whose cells are the most square in frames of `size` (height,
    width)."""
    height, width = size
    pairs = [(rows, cells // rows) for rows in range(1, cells + 1) if cells % rows == 0]

    def stretched(pair: tuple[int, int]) -> float:
        side = (height / pair[0]) / (width / pair[1])
        return max(side, 1 / side)

    return min(pairs, key=stretched)
