"""Every way of getting visual tokens of a clip that is compared, by the name it has on the command line.

The unit of comparison is a row at a retention ratio: a method (`earlytom.methods`), or a part of one. The controls are
given the number of tokens N that EarlyTom's budget schedule keeps at that ratio, from counts alone:

* random: N of the clip's F * P tokens, drawn anew for every clip (seeded);
* frames: the fewest evenly spaced frames that have N tokens or more, whole, first and last among them (the middle one
  if it is one). Decided before encoding, so the other frames cost nothing; never fewer tokens than EarlyTom has;
* top-k: the N tokens of highest received attention in the whole clip, from the layer that EarlyTom decides by, nothing
  merged; EarlyTom without its merging, and without an equal share for each frame;
* pooling, pooling-space: averages over the cells of a grid with N cells or fewer.

Of clips that have more frames than the model was made for there is one row more, `FEWER`: as many frames as that,
evenly spaced, with all of their tokens. It is what a user does without a method.

A row also says what the decoder is told of the tokens besides themselves (`runtime.text.places.Placing`): how many of
the video's tokens each stands for (bias), and where it was.

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
    """EarlyTom's merging (budget schedule) with the selection of "cells": what that alone is worth."""

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        """As many tokens as EarlyTom, but those that are salient and unlike each other."""
        counts = self.counts(state.frames, features.shape[1])
        assert counts is not None  # the budget schedule
        tokens = features.flatten(0, 1)
        if counts.tokens == len(tokens):  # nothing to leave out
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
        base: EarlyTom's settings; its ratio and schedule play no part.
        depth: of the vision tower.
        seed: of the random tokens.
        cells: the settings of "cells", of which the ratio plays no part; default: the same layers and frames.
        budgets: other merge layers and frame counts to measure both methods with.
        bias, original: what the decoder is told of every row's tokens; None: what the row says.
        frames: of a clip.
        text_layers: of the language model; default those of the 7B model.
        faithful: the field's methods in their released form.
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
    """The methods that `words` name, each once, in the order of `known`; a word is a method, a group, or "all", which
    leaves out the field's methods: they take as long again.

    The full tokens are always among them, of all frames and of fewer: everything is compared with them.
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


def _all(config: EarlyTomConfig) -> Callable[[ClipPasses, float], Visual]:
    """All tokens of the frames that these settings leave."""
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
    """The controls, with as many tokens as the settings `budget` keep."""
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
