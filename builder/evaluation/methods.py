"""The compared methods by their names on the command line.

The unit of comparison is a row at a retention ratio: a method (`earlytom.methods`), or a part of one. The controls get
the number of tokens N that EarlyTom's budget schedule keeps at that ratio, which follows from counts:

* random: N of the clip's F * P tokens, drawn anew for every clip (seeded);
* frames: all tokens of the fewest evenly spaced frames with N tokens or more, including the first and the last frame
  (one frame: the middle one). Chosen before encoding, so that the other frames cost nothing;
* top-k: the N tokens of highest received attention in the unmerged clip, from the layer by which EarlyTom selects:
  EarlyTom without merging and without an equal share for each frame;
* pooling, pooling-space: averages over the cells of a grid with N cells or fewer.

Clips of more frames than the model was trained with have a further row `FEWER`: all tokens of that many evenly spaced
frames, which needs no method.

A row also has the decoder's side information (`runtime.text.places.Placing`): whether it is told how many of the
video's tokens each token stands for (bias), and its original position.

Notation: F frames, P tokens a frame after pooling, E width of the decoder, N tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from builder.evaluation.options import FEWER, FULL, Merging
from builder.evaluation.passes import ClipPasses
from builder.evaluation.ways.compared import compared_rows, refuse_untrained
from builder.evaluation.ways.row import BOTH, Row, Visual, seen
from earlytom.cells.config import CellsConfig
from earlytom.cells.select import affinity, likeness, saliency, select_rounds
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.method import State
from earlytom.methods.cells import Cells
from earlytom.methods.controls import EvenFrames, Pooling, RandomTokens, TopK
from earlytom.methods.earlytom import EarlyTom
from earlytom.micro.data.scene import FRAMES
from earlytom.standing import frame_times
from runtime.text.places import Placing

BUDGET, ADAPTIVE, CELLS = "budget", "adaptive", "cells-rounds"


class DiverseEarlyTom(EarlyTom):
    """EarlyTom's merging (budget schedule) with the selection of "cells", an ablation."""

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        """As many tokens as EarlyTom keeps, salient and diverse ones."""
        counts = self.counts(state.frames, features.shape[1])
        assert counts is not None  # the budget schedule
        tokens = features.flatten(0, 1)
        if counts.tokens == len(tokens):  # nothing to drop
            return tokens, torch.arange(len(tokens), device=tokens.device)
        time = frame_times(state.sources)[0].float().repeat_interleave(features.shape[1])
        alike = likeness(affinity(tokens, time, state.frames))
        taken = select_rounds(saliency(tokens), alike, counts.tokens, CellsConfig.rounds or 1)
        return tokens.index_select(0, taken), taken


def methods(
    base: EarlyTomConfig,
    depth: int,
    *,
    seed: int = 0,
    cells: CellsConfig | None = None,
    budgets: Sequence[Merging] = (),
    bias: bool | None = None,
    original: bool | None = None,
    frames: int = FRAMES,
    text_layers: int = 28,
    faithful: bool = False,
) -> dict[str, Row]:
    """All methods by name.

    Args:
        base: EarlyTom's settings; ratio and schedule are ignored.
        depth: of the vision tower.
        seed: of the random tokens.
        cells: the settings of "cells", ratio ignored; default: merge layers and frame budget of `base`.
        budgets: other merge layers and frame counts to measure both methods with.
        bias, original: override every row's side information; None: the row's own.
        frames: of a clip.
        text_layers: of the language model; default: the 7B model's.
        faithful: published methods in their released form.
    """
    base.check_layers(depth)
    if cells is None:
        cells = CellsConfig(merge_layers=base.merge_layers, frame_budget=base.frame_budget)
    budget = base.replace(schedule="budget", retention_ratio=1.0)
    adaptive = budget.replace(schedule="adaptive")
    unmerged = _with_layers(budget, ())
    found = [
        Row(FULL, "full tokens", "reference", False, _all(unmerged)),
        *([_fewer_frames(unmerged)] if frames > FRAMES else []),
        Row(BUDGET, "EarlyTom budget", "earlytom", True, _earlytom(budget)),
        Row(ADAPTIVE, "EarlyTom adaptive", "earlytom", True, _earlytom(adaptive)),
        Row("budget-bias", "EarlyTom budget, bias", "earlytom", True, _earlytom(budget), Placing(bias=True)),
        *_cells_rows(cells),
        Row("merging", "frame merging alone, budget", "parts", False, _all(budget)),
        Row("merging-adaptive", "frame merging alone, adaptive", "parts", False, _all(adaptive)),
        Row("selection", "token selection alone", "parts", True, _earlytom(unmerged)),
        Row("diverse", "EarlyTom merging, diverse tokens", "parts", True, _diverse(budget), BOTH),
        Row("selection-diverse", "diverse tokens alone", "parts", True, _diverse(unmerged), BOTH),
        *_layer_rows(budget, depth),
        *_budget_rows(budget, cells, depth, budgets),
        *_controls(budget, unmerged, depth, seed),
        *compared_rows(depth, text_layers, faithful=faithful),
    ]
    told = {name: value for name, value in (("bias", bias), ("original", original)) if value is not None}
    return {row.name: replace(row, told=replace(row.told, **told)) for row in found}


def chosen(known: dict[str, Row], words: Sequence[str]) -> list[Row]:
    """The methods named by `words`, each once, in the order of `known`.

    A word is a method, a group, or "all", which leaves out the published methods, as they take as long again. `FULL`
    and `FEWER` are always included, as all others are compared with them.
    """
    groups = {method.group for method in known.values()}
    for word in words:
        refuse_untrained(word)
        if word not in known and word not in groups and word != "all":
            raise UserError(
                f"no method named {word!r} (--methods): choose from all, {', '.join(sorted(groups))} (groups), "
                f"{', '.join(known)}"
            )
    wanted = {FULL, FEWER, *words}
    return [
        method
        for method in known.values()
        if wanted & {method.name, method.group} or ("all" in wanted and method.group != "compared")
    ]


def layer_choices(layers: tuple[int, ...], depth: int) -> list[tuple[int, ...]]:
    """Alternatives to the merge layers: all one layer earlier, all one later, and every proper subset."""
    shifted = [tuple(layer + step for layer in layers) for step in (-1, 1)]
    parts = [part for size in range(1, len(layers)) for part in itertools.combinations(layers, size)]
    return [choice for choice in (*shifted, *parts) if choice and min(choice) >= 0 and max(choice) < depth]


def _with_layers(config: EarlyTomConfig, layers: tuple[int, ...]) -> EarlyTomConfig:
    """The settings with other merge layers; frame counts follow their layers, or their order if layers moved."""
    budget = config.frame_budget
    if isinstance(budget, tuple):
        kept = [config.merge_layers.index(layer) if layer in config.merge_layers else -1 for layer in layers]
        places = kept if -1 not in kept else range(len(layers))
        budget = tuple(budget[place] for place in places) if layers else 0.75
    return config.replace(merge_layers=layers, frame_budget=budget)


def _all(config: EarlyTomConfig) -> Callable[[ClipPasses, float], Visual]:
    """All tokens of the frames left by these settings."""
    method = EarlyTom(config.replace(retention_ratio=1.0))
    return lambda clip, _: seen(clip, method)


def _fewer_frames(unmerged: EarlyTomConfig) -> Row:
    """All tokens of `FRAMES` evenly spaced frames; the others are never encoded."""
    method, some = EarlyTom(unmerged), EvenFrames(FRAMES)

    def visual(clip: ClipPasses, _: float) -> Visual:
        kept = some.frames(len(clip.frames))
        return Visual(clip.some_frames(kept, method).flatten(0, 1), (len(kept),))

    return Row(FEWER, f"full tokens, {FRAMES} frames", "reference", False, visual)


def _earlytom(config: EarlyTomConfig) -> Callable[[ClipPasses, float], Visual]:
    return lambda clip, ratio: seen(clip, EarlyTom(config.replace(retention_ratio=ratio)))


def _diverse(config: EarlyTomConfig) -> Callable[[ClipPasses, float], Visual]:
    return lambda clip, ratio: seen(clip, DiverseEarlyTom(config.replace(retention_ratio=ratio)))


def _cells(config: CellsConfig) -> Callable[[ClipPasses, float], Visual]:
    return lambda clip, ratio: seen(clip, Cells(config.replace(retention_ratio=ratio)))


def _cells_rows(config: CellsConfig) -> list[Row]:
    rounds = "greedy" if config.rounds is None else f"{config.rounds} rounds"
    return [
        Row(CELLS, f"cells, {rounds}", "cells", True, _cells(config), BOTH),
        Row("cells-greedy", "cells, greedy", "cells", True, _cells(config.replace(rounds=None)), BOTH),
        Row("cells-plain", "cells, no bias, no positions", "cells", True, _cells(config)),
        Row("cells-adaptive", "cells, adaptive", "cells", True, _cells(config.replace(schedule="adaptive")), BOTH),
    ]


def _layer_rows(budget: EarlyTomConfig, depth: int) -> list[Row]:
    """EarlyTom with other merge layers."""
    names = ",".join(map(str, budget.merge_layers)) or "none"
    found = []
    for layers in layer_choices(budget.merge_layers, depth):
        listed = ",".join(map(str, layers))
        name, title = "layers-" + listed.replace(",", "-"), f"merging after {listed} (not {names})"
        found.append(Row(name, title, "layers", True, _earlytom(_with_layers(budget, layers))))
    return found


def _budget_rows(budget: EarlyTomConfig, cells: CellsConfig, depth: int, budgets: Sequence[Merging]) -> list[Row]:
    """Both methods with other merge layers and frame counts, named METHOD@LAYERS:FRAMES."""
    found = []
    for merging in budgets:
        changes = {"merge_layers": merging.layers, "frame_budget": merging.frames}
        theirs, ours = budget.replace(**changes), cells.replace(**changes)
        theirs.check_layers(depth)
        found += [
            Row(f"cells@{merging}", f"cells, {merging}", "budgets", True, _cells(ours), BOTH),
            Row(f"{BUDGET}@{merging}", f"EarlyTom, {merging}", "budgets", True, _earlytom(theirs)),
        ]
    return found


def _controls(budget: EarlyTomConfig, unmerged: EarlyTomConfig, depth: int, seed: int) -> list[Row]:
    """The controls, with as many tokens as `budget` keeps."""
    whole, deciding = EarlyTom(unmerged), EarlyTom(budget).watched(depth)

    def count(clip: ClipPasses, ratio: float) -> int:
        counts = EarlyTom(budget.replace(retention_ratio=ratio)).counts(len(clip.frames), clip.cells)
        assert counts is not None  # the budget schedule
        return counts.tokens

    def random(clip: ClipPasses, ratio: float) -> Visual:
        return seen(clip, RandomTokens(count(clip, ratio), seed, clip.number), whole)

    def frames(clip: ClipPasses, ratio: float) -> Visual:
        kept = EvenFrames(math.ceil(count(clip, ratio) / clip.cells)).frames(len(clip.frames))
        place = torch.tensor(kept)[:, None] * clip.cells + torch.arange(clip.cells)
        return Visual(clip.some_frames(kept, whole).flatten(0, 1), (len(kept),), place=place.flatten())

    def top_k(clip: ClipPasses, ratio: float) -> Visual:
        return seen(clip, TopK(count(clip, ratio), deciding))

    def pooling(keep_frames: bool) -> Callable[[ClipPasses, float], Visual]:
        def visual(clip: ClipPasses, ratio: float) -> Visual:
            return seen(clip, Pooling(count(clip, ratio), keep_frames), whole)

        return visual

    return [
        Row("random", "random tokens", "controls", True, random),
        Row("frames", "uniform frame dropping", "controls", True, frames),
        Row("top-k", "global top-k by attention", "controls", True, top_k),
        Row("pooling", "pooling in time and space", "controls", True, pooling(False)),
        Row("pooling-space", "pooling in space", "controls", True, pooling(True)),
    ]
