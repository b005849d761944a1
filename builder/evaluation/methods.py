"""Every way of getting visual tokens of a clip that is compared, by the name it has on the command line.

The unit of comparison is a method at a retention ratio. The controls are given the number of tokens N that EarlyTom's
budget schedule keeps at that ratio, from counts alone:

* random: N of the clip's F * P tokens, drawn anew for every clip (seeded);
* frames: the fewest evenly spaced frames that have N tokens or more, whole, first and last among them (the middle one
  if it is one). Decided before encoding, so the other frames cost nothing; never fewer tokens than EarlyTom has;
* top-k: the N tokens of highest received attention in the whole clip, from the layer that EarlyTom decides by, nothing
  merged; EarlyTom without its merging, and without an equal share for each frame;
* pooling, pooling-space: averages over the cells of a grid with N cells or fewer, see `pooling_grid`.

Tokens always come in time order, and in raster order within a frame.

Notation: F frames, F' frames left, P = g * g tokens a frame after pooling, E width of the decoder, N tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from builder.evaluation.passes import ClipPasses
from earlytom.budget import token_count
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError

FULL, BUDGET, ADAPTIVE = "full", "budget", "adaptive"
Group = Literal["reference", "earlytom", "parts", "layers", "controls", "engine"]
# Choices of merge layers are compared at this ratio only.
LAYER_RATIOS = (0.1,)
# A pooling grid may leave this share of the tokens unused for the sake of an even reduction.
_SPARE = 0.05


@dataclass(frozen=True)
class Visual:
    """What the decoder sees of a clip, and what the tower did for it.

    Attributes:
        tokens: [N, E].
        stages: frames that the tower ran on before the first merge and after each one.
        merge_layers: after which layers the frames were merged.
    """

    tokens: Tensor
    stages: tuple[int, ...]
    merge_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Method:
    """One way.

    Attributes:
        name: on the command line; title: in tables; group: what it is compared as.
        scaled: whether the retention ratio matters.
        visual: of a clip at a ratio.
    """

    name: str
    title: str
    group: Group
    scaled: bool
    visual: Callable[[ClipPasses, float], Visual]

    def ratios(self, wanted: Sequence[float]) -> tuple[float | None, ...]:
        """At which of the wanted ratios it is measured; (None,) where the ratio does not matter."""
        if not self.scaled:
            return (None,)
        if self.group == "layers":
            return tuple(ratio for ratio in wanted if ratio in LAYER_RATIOS) or tuple(wanted)
        return tuple(wanted)


def methods(base: EarlyTomConfig, depth: int, *, seed: int = 0) -> dict[str, Method]:
    """All methods by name.

    Args:
        base: EarlyTom's settings; its ratio and schedule play no part.
        depth: of the vision tower.
        seed: of the random tokens.

    Raises:
        UserError: a merge layer that the tower does not have.
    """
    base.check_layers(depth)
    budget = base.replace(schedule="budget", retention_ratio=1.0)
    adaptive = budget.replace(schedule="adaptive")
    unmerged = _with_layers(budget, ())
    names = ",".join(map(str, base.merge_layers)) or "none"
    found = [
        Method(FULL, "full tokens", "reference", False, lambda clip, _: _all(clip, unmerged)),
        Method(BUDGET, "EarlyTom budget", "earlytom", True, _earlytom(budget)),
        Method(ADAPTIVE, "EarlyTom adaptive", "earlytom", True, _earlytom(adaptive)),
        Method("merging", "frame merging alone, budget", "parts", False, lambda clip, _: _all(clip, budget)),
        Method(
            "merging-adaptive", "frame merging alone, adaptive", "parts", False, lambda clip, _: _all(clip, adaptive)
        ),
        Method("selection", "token selection alone", "parts", True, _earlytom(unmerged)),
    ]
    for layers in layer_choices(base.merge_layers, depth):
        name = "-".join(map(str, layers))
        title = f"merging after {','.join(map(str, layers))} (not {names})"
        found.append(Method(f"layers-{name}", title, "layers", True, _earlytom(_with_layers(budget, layers))))
    found += _controls(budget, unmerged, depth, seed)
    return {method.name: method for method in found}


def chosen(known: dict[str, Method], words: Sequence[str]) -> list[Method]:
    """The methods that `words` name, each once, in the order of `known`; a word is a method, a group, or "all".

    The full tokens are always among them: everything is compared with them.

    Raises:
        UserError: no such method.
    """
    groups = {method.group for method in known.values()}
    for word in words:
        if word not in known and word not in groups and word != "all":
            raise UserError(
                f"no method named {word!r} (--methods): choose from all, {', '.join(sorted(groups))} (groups), "
                f"{', '.join(known)}"
            )
    wanted = {FULL, *words}
    return [method for method in known.values() if wanted & {method.name, method.group, "all"}]


def layer_choices(layers: tuple[int, ...], depth: int) -> list[tuple[int, ...]]:
    """Other merge layers to compare with `layers`: all one layer earlier, all one later, and every part of them."""
    shifted = [tuple(layer + step for layer in layers) for step in (-1, 1)]
    parts = [part for size in range(1, len(layers)) for part in itertools.combinations(layers, size)]
    return [choice for choice in (*shifted, *parts) if choice and min(choice) >= 0 and max(choice) < depth]


def even_frames(frames: int, count: int) -> tuple[int, ...]:
    """`count` evenly spaced ones of `frames` frames, first and last among them; the middle one if it is one."""
    if count == 1:
        return (frames // 2,)
    return tuple(round(index * (frames - 1) / (count - 1)) for index in range(count))


def pooling_grid(frames: int, side: int, tokens: int, *, keep_frames: bool = False) -> tuple[int, int, int]:
    """Into how many cells (time, rows, columns) `frames` grids of `side` x `side` are averaged, `tokens` at most.

    Rows and columns differ by one at most. Of the grids that use all but a twentieth of the most tokens possible, the
    one that shrinks time, rows and columns most evenly. With `keep_frames` time is not shrunk, unless there are fewer
    tokens than frames.
    """

    def fits() -> Iterator[tuple[int, int, int]]:
        for rows, columns in itertools.product(range(1, side + 1), repeat=2):
            times = [frames] if keep_frames and tokens >= frames else range(1, frames + 1)
            for time in times:
                if abs(rows - columns) <= 1 and time * rows * columns <= tokens:
                    yield time, rows, columns

    def evenness(grid: tuple[int, int, int]) -> float:
        shares = (grid[0] / frames, grid[1] / side, grid[2] / side)
        return min(shares) / max(shares)

    found = list(fits())
    most = max(map(_cells, found))
    return max((grid for grid in found if _cells(grid) >= (1 - _SPARE) * most), key=lambda g: (evenness(g), _cells(g)))


def _cells(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def _with_layers(config: EarlyTomConfig, layers: tuple[int, ...]) -> EarlyTomConfig:
    """The settings with other merge layers; explicit frame counts stay with their layer, or their place if it moved."""
    budget = config.frame_budget
    if isinstance(budget, tuple):
        kept = [config.merge_layers.index(layer) if layer in config.merge_layers else -1 for layer in layers]
        places = kept if -1 not in kept else range(len(layers))
        budget = tuple(budget[place] for place in places) if layers else 0.75
    return config.replace(merge_layers=layers, frame_budget=budget)


def _all(clip: ClipPasses, config: EarlyTomConfig) -> Visual:
    done = clip.run(config)
    return Visual(done.tokens, done.stages, config.merge_layers)


def _earlytom(config: EarlyTomConfig) -> Callable[[ClipPasses, float], Visual]:
    def visual(clip: ClipPasses, ratio: float) -> Visual:
        done = clip.run(config)
        return Visual(done.select(ratio, config.schedule), done.stages, config.merge_layers)

    return visual


def _controls(budget: EarlyTomConfig, unmerged: EarlyTomConfig, depth: int, seed: int) -> list[Method]:
    """The controls, with as many tokens as the settings `budget` keep."""
    # Merging after this layer that keeps every frame: the tower is untouched, and the layer's received attention noted.
    deciding = budget.merge_layers[-1] if budget.merge_layers else depth - 1
    watched = budget.replace(merge_layers=(deciding,), frame_budget=1.0)

    def count(clip: ClipPasses, ratio: float) -> int:
        merges = len(budget.merge_layers)
        return token_count(len(clip.frames), clip.side**2, ratio, merges=merges, frame_budget=budget.frame_budget)

    def random(clip: ClipPasses, ratio: float) -> Visual:
        done = clip.run(unmerged)
        wanted = count(clip, ratio)
        order = np.random.default_rng([seed, clip.number, wanted]).permutation(len(done.tokens))
        return Visual(done.tokens[torch.from_numpy(np.sort(order[:wanted]))], done.stages)

    def frames(clip: ClipPasses, ratio: float) -> Visual:
        kept = even_frames(len(clip.frames), math.ceil(count(clip, ratio) / clip.side**2))
        return Visual(clip.some_frames(kept, unmerged).flatten(0, 1), (len(kept),))

    def top_k(clip: ClipPasses, ratio: float) -> Visual:
        done = clip.run(watched)
        best = torch.argsort(done.relevance.flatten(), descending=True, stable=True)[: count(clip, ratio)]
        return Visual(done.tokens[best.sort().values], done.stages[:1])

    def pooling(keep_frames: bool) -> Callable[[ClipPasses, float], Visual]:
        def visual(clip: ClipPasses, ratio: float) -> Visual:
            done = clip.run(unmerged)
            grid = pooling_grid(len(clip.frames), clip.side, count(clip, ratio), keep_frames=keep_frames)
            return Visual(_pooled(done.features, grid), done.stages)

        return visual

    return [
        Method("random", "random tokens", "controls", True, random),
        Method("frames", "uniform frame dropping", "controls", True, frames),
        Method("top-k", "global top-k by attention", "controls", True, top_k),
        Method("pooling", "pooling in time and space", "controls", True, pooling(False)),
        Method("pooling-space", "pooling in space", "controls", True, pooling(True)),
    ]


def _pooled(features: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[F, g * g, E] averaged to a grid of cells, [time * rows * columns, E]."""
    side = round(features.shape[1] ** 0.5)
    volume = features.unflatten(1, (side, side)).permute(3, 0, 1, 2)  # [E, F, g, g]
    return torch.nn.functional.adaptive_avg_pool3d(volume, grid).flatten(1).T
