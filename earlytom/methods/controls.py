"""Controls: simple baselines that a method has to beat at equal token counts. None merges frames inside the tower.

Each is given the number of tokens or frames to keep. Tokens come in time order, and in raster order within a frame.

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
        tokens: N; all tokens of a video that has fewer.
        seed: of the random generator, together with `video` and N.
        video: the video's number, so that videos have different draws.
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
    """All tokens of evenly spaced frames, the first and last included (the middle one if it is one frame). Chosen
    before encoding, so that other frames cost nothing.

    Attributes:
        keep: number of frames; all frames of a video that has fewer.
    """

    name = "frames"
    streams = True  # reads no features
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
        tokens: N; all tokens of a video that has fewer.
        layer: the encoder layer whose received attention is used.
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
    """Adaptive average pooling over time, rows and columns, see `pooling_grid`; positions are those of the pooled
    regions' centres.

    Attributes:
        tokens: the most tokens to keep.
        keep_frames: pool rows and columns only.
    """

    name = "pooling"
    tokens: int
    keep_frames: bool = False

    def __post_init__(self) -> None:
        whole("tokens", self.tokens, 1)

    def counts(self, frames: int, tokens_per_frame: int) -> None:
        """Unknown: the pooling grid depends on a frame's rows and columns."""
        return

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        frames, (rows, columns) = len(features), state.cells
        grid = pooling_grid(frames, state.cells, self.tokens, keep_frames=self.keep_frames)
        axes = [torch.arange(cells, device=features.device) for cells in grid]
        # The centres of the regions that `adaptive_avg_pool3d` averages.
        time, row, column = (
            (axis * size // cells + ((axis + 1) * size + cells - 1) // cells - 1) // 2
            for axis, size, cells in zip(axes, (frames, rows, columns), grid, strict=True)
        )
        positions = (time[:, None, None] * rows + row[:, None]) * columns + column
        return averaged(features, state.cells, grid), positions.flatten()


def even_frames(frames: int, count: int) -> tuple[int, ...]:
    """Indices of `count` evenly spaced frames of `frames`, first and last included; of one, the middle."""
    if count == 1:
        return (frames // 2,)
    return tuple(round(index * (frames - 1) / (count - 1)) for index in range(count))


def pooling_grid(
    frames: int, cells: tuple[int, int], tokens: int, *, keep_frames: bool = False
) -> tuple[int, int, int]:
    """The pooled (time, rows, columns), of at most `tokens` cells, for `frames` frames of `cells` (rows, columns).

    Rows and columns shrink by about the same factor, to one at least. Of the grids with at least 95 % of the most cells
    possible, it is the one whose time, rows and columns shrink most evenly. With `keep_frames` time is not shrunk,
    unless there are fewer tokens than frames.
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
    """Adaptive average pooling of [F, P, E], P = rows * columns of `cells`, to `grid`: [time * rows * columns, E]."""
    volume = features.unflatten(1, cells).permute(3, 0, 1, 2)  # [E, F, rows, columns]
    return torch.nn.functional.adaptive_avg_pool3d(volume, grid).flatten(1).T
