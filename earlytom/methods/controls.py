"""Controls: simple ways of getting as few tokens, which a method has to beat. None merges frames inside the tower.

Each is given the number of tokens or frames to keep, so that it can be compared at equal counts. Tokens come in time
order, and in raster order within a frame.

Notation: F frames, P tokens a frame, E LLM width, N tokens kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from earlytom.config import known
from earlytom.errors import UserError
from earlytom.method import Counts, Method, State
from earlytom.numbers import whole
from earlytom.transfers import to_device

# A pooling grid may leave this share of the tokens unused for the sake of an even reduction.
_SPARE = 0.05


class _Control(Method):
    """A method that is a frozen dataclass of its settings and leaves the tower as it is."""

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        return cls(**known(cls, cls.name, settings))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def tower_key(self) -> Hashable:
        return "untouched"


@dataclass(frozen=True)
class RandomTokens(_Control):
    """N of the video's F * P tokens, drawn at random.

    Attributes:
        tokens: N; of a video that has fewer, all of them.
        seed: of the draw.
        video: a number of the video, so that every one has a draw of its own.
    """

    name = "random"
    tokens: int
    seed: int = 0
    video: int = 0

    def __post_init__(self) -> None:
        whole("tokens", self.tokens, 1)

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        return Counts((frames,), min(self.tokens, frames * tokens_per_frame))

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        order = np.random.default_rng([self.seed, self.video, self.tokens]).permutation(features.shape[:2].numel())
        positions = to_device(torch.from_numpy(np.sort(order[: self.tokens])), features.device)
        return features.flatten(0, 1)[positions], positions


@dataclass(frozen=True)
class EvenFrames(_Control):
    """Evenly spaced frames, whole, first and last among them (the middle one if it is one). Decided before encoding, so
    the other frames cost nothing.

    Attributes:
        keep: how many; of a video that has fewer, all of them.
    """

    name = "frames"
    streams = True  # decides by neither
    keep: int

    def __post_init__(self) -> None:
        whole("keep", self.keep, 1)

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        kept = min(self.keep, frames)
        return Counts((kept,), kept * tokens_per_frame)

    def tower_key(self) -> Hashable:
        return self

    def frames(self, count: int) -> Sequence[int]:
        return even_frames(count, min(self.keep, count))

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        tokens = features.flatten(0, 1)
        return tokens, torch.arange(len(tokens), device=features.device)


@dataclass(frozen=True)
class TopK(_Control):
    """The N tokens of highest received attention in the whole video; ties go to the earlier token.

    Attributes:
        tokens: N; of a video that has fewer, all of them.
        layer: the encoder layer whose received attention counts.
    """

    name = "top-k"
    tokens: int
    layer: int

    def __post_init__(self) -> None:
        whole("tokens", self.tokens, 1)
        whole("layer", self.layer, 0)

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        return Counts((frames,), min(self.tokens, frames * tokens_per_frame))

    def tower_key(self) -> Hashable:
        return (self.name, self.layer)

    def check(self, depth: int) -> None:
        if self.layer >= depth:
            raise UserError(f"layer {self.layer} does not exist: the vision tower has layers 0 to {depth - 1}")

    def watched(self, depth: int) -> int:
        return self.layer

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        assert relevance is not None  # a layer is watched
        best = torch.argsort(relevance.flatten(), descending=True, stable=True)[: self.tokens]
        positions = best.sort().values
        return features.flatten(0, 1)[positions], positions


@dataclass(frozen=True)
class Pooling(_Control):
    """Averages over the cells of a grid in time and space, see `pooling_grid`; a position is that of a cell's middle.

    Attributes:
        tokens: N at most.
        keep_frames: shrink space alone.
    """

    name = "pooling"
    tokens: int
    keep_frames: bool = False

    def __post_init__(self) -> None:
        whole("tokens", self.tokens, 1)

    def counts(self, frames: int, tokens_per_frame: int) -> None:
        """How many cells fit depends on the rows and columns of a frame."""
        return

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        frames, (rows, columns) = len(features), state.cells
        grid = pooling_grid(frames, state.cells, self.tokens, keep_frames=self.keep_frames)
        axes = [torch.arange(cells, device=features.device) for cells in grid]
        # The middle of what `adaptive_avg_pool3d` averages.
        time, row, column = (
            (axis * size // cells + ((axis + 1) * size + cells - 1) // cells - 1) // 2
            for axis, size, cells in zip(axes, (frames, rows, columns), grid, strict=True)
        )
        positions = (time[:, None, None] * rows + row[:, None]) * columns + column
        return averaged(features, state.cells, grid), positions.flatten()


def even_frames(frames: int, count: int) -> tuple[int, ...]:
    """`count` evenly spaced ones of `frames` frames, first and last among them; the middle one if it is one."""
    if count == 1:
        return (frames // 2,)
    return tuple(round(index * (frames - 1) / (count - 1)) for index in range(count))


def pooling_grid(
    frames: int, cells: tuple[int, int], tokens: int, *, keep_frames: bool = False
) -> tuple[int, int, int]:
    """Into (time, rows, columns) cells `frames` grids of `cells` (rows, columns) are averaged, `tokens` at most.

    Rows and columns shrink alike, to one row or column. Of the grids that use all but a twentieth of the most tokens
    possible, the one that shrinks time, rows and columns most evenly. With `keep_frames` time is not shrunk, unless
    there are fewer tokens than frames.
    """
    high, wide = cells

    def fits() -> Iterator[tuple[int, int, int]]:
        for rows, columns in itertools.product(range(1, high + 1), range(1, wide + 1)):
            times = [frames] if keep_frames and tokens >= frames else range(1, frames + 1)
            for time in times:
                if abs(rows * wide - columns * high) <= max(cells) and time * rows * columns <= tokens:
                    yield time, rows, columns

    def evenness(grid: tuple[int, int, int]) -> float:
        shares = (grid[0] / frames, grid[1] / high, grid[2] / wide)
        return min(shares) / max(shares)

    found = list(fits())
    most = max(map(math.prod, found))
    enough = (grid for grid in found if math.prod(grid) >= (1 - _SPARE) * most)
    return max(enough, key=lambda grid: (evenness(grid), math.prod(grid)))


def averaged(features: Tensor, cells: tuple[int, int], grid: tuple[int, int, int]) -> Tensor:
    """[F, P, E], P = rows * columns of `cells`, averaged to the cells of a grid, [time * rows * columns, E]."""
    volume = features.unflatten(1, cells).permute(3, 0, 1, 2)  # [E, F, rows, columns]
    return torch.nn.functional.adaptive_avg_pool3d(volume, grid).flatten(1).T
