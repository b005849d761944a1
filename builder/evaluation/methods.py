"""Every way of getting visual tokens of a clip that is compared, by the name it has on the command line.

The unit of comparison is a row at a retention ratio: a method (`earlytom.methods`), or a part of one. The controls are
given the number of tokens N that EarlyTom's budget schedule keeps at that ratio, from counts alone:

* random: N of the clip's F * P tokens, drawn anew for every clip (seeded);
* frames: the fewest evenly spaced frames that have N tokens or more, whole, first and last among them (the middle one
  if it is one). Decided before encoding, so the other frames cost nothing; never fewer tokens than EarlyTom has;
* top-k: the N tokens of highest received attention in the whole clip, from the layer that EarlyTom decides by, nothing
  merged; EarlyTom without its merging, and without an equal share for each frame;
* pooling, pooling-space: averages over the cells of a grid with N cells or fewer.

Notation: F frames, P tokens a frame after pooling, E width of the decoder, N tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from builder.evaluation.passes import ClipPasses
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.method import Method
from earlytom.methods.controls import EvenFrames, Pooling, RandomTokens, TopK
from earlytom.methods.earlytom import EarlyTom

FULL, BUDGET, ADAPTIVE = "full", "budget", "adaptive"
Group = Literal["reference", "earlytom", "parts", "layers", "controls", "engine"]
# Choices of merge layers are compared at this ratio only.
LAYER_RATIOS = (0.1,)


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
class Row:
    """One way, as a row of the table.

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


def methods(base: EarlyTomConfig, depth: int, *, seed: int = 0) -> dict[str, Row]:
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
        Row(FULL, "full tokens", "reference", False, lambda clip, _: _all(clip, unmerged)),
        Row(BUDGET, "EarlyTom budget", "earlytom", True, _earlytom(budget)),
        Row(ADAPTIVE, "EarlyTom adaptive", "earlytom", True, _earlytom(adaptive)),
        Row("merging", "frame merging alone, budget", "parts", False, lambda clip, _: _all(clip, budget)),
        Row("merging-adaptive", "frame merging alone, adaptive", "parts", False, lambda clip, _: _all(clip, adaptive)),
        Row("selection", "token selection alone", "parts", True, _earlytom(unmerged)),
    ]
    for layers in layer_choices(base.merge_layers, depth):
        name = "-".join(map(str, layers))
        title = f"merging after {','.join(map(str, layers))} (not {names})"
        found.append(Row(f"layers-{name}", title, "layers", True, _earlytom(_with_layers(budget, layers))))
    found += _controls(budget, unmerged, depth, seed)
    return {method.name: method for method in found}


def chosen(known: dict[str, Row], words: Sequence[str]) -> list[Row]:
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


def _with_layers(config: EarlyTomConfig, layers: tuple[int, ...]) -> EarlyTomConfig:
    """The settings with other merge layers; explicit frame counts stay with their layer, or their place if it moved."""
    budget = config.frame_budget
    if isinstance(budget, tuple):
        kept = [config.merge_layers.index(layer) if layer in config.merge_layers else -1 for layer in layers]
        places = kept if -1 not in kept else range(len(layers))
        budget = tuple(budget[place] for place in places) if layers else 0.75
    return config.replace(merge_layers=layers, frame_budget=budget)


def _all(clip: ClipPasses, config: EarlyTomConfig) -> Visual:
    done = clip.run(EarlyTom(config))
    return Visual(done.tokens, done.stages, config.merge_layers)


def _earlytom(config: EarlyTomConfig) -> Callable[[ClipPasses, float], Visual]:
    def visual(clip: ClipPasses, ratio: float) -> Visual:
        return _chosen(clip, EarlyTom(config.replace(retention_ratio=ratio)))

    return visual


def _chosen(clip: ClipPasses, method: Method, of: Method | None = None) -> Visual:
    """What `method` keeps of its own pass, or of that of another method that leaves the tower as it does."""
    done = clip.run(of or method)
    return Visual(done.choose(method), done.stages, method.layers)


def _controls(budget: EarlyTomConfig, unmerged: EarlyTomConfig, depth: int, seed: int) -> list[Row]:
    """The controls, with as many tokens as the settings `budget` keep."""
    whole, deciding = EarlyTom(unmerged), EarlyTom(budget).watched(depth)

    def count(clip: ClipPasses, ratio: float) -> int:
        counts = EarlyTom(budget.replace(retention_ratio=ratio)).counts(len(clip.frames), clip.cells)
        assert counts is not None  # the budget schedule
        return counts.tokens

    def random(clip: ClipPasses, ratio: float) -> Visual:
        return _chosen(clip, RandomTokens(count(clip, ratio), seed, clip.number), whole)

    def frames(clip: ClipPasses, ratio: float) -> Visual:
        kept = EvenFrames(math.ceil(count(clip, ratio) / clip.cells)).frames(len(clip.frames))
        return Visual(clip.some_frames(kept, whole).flatten(0, 1), (len(kept),))

    def top_k(clip: ClipPasses, ratio: float) -> Visual:
        return _chosen(clip, TopK(count(clip, ratio), deciding))

    def pooling(keep_frames: bool) -> Callable[[ClipPasses, float], Visual]:
        def visual(clip: ClipPasses, ratio: float) -> Visual:
            return _chosen(clip, Pooling(count(clip, ratio), keep_frames), whole)

        return visual

    return [
        Row("random", "random tokens", "controls", True, random),
        Row("frames", "uniform frame dropping", "controls", True, frames),
        Row("top-k", "global top-k by attention", "controls", True, top_k),
        Row("pooling", "pooling in time and space", "controls", True, pooling(False)),
        Row("pooling-space", "pooling in space", "controls", True, pooling(True)),
    ]
