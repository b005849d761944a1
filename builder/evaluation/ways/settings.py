"""From what a command was asked for to the settings of both methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from builder.evaluation.options import Merging
from earlytom.budget import frames_per_stage
from earlytom.cells.config import CellsConfig
from earlytom.config import RELEASED_LAYERS, EarlyTomConfig
from earlytom.errors import UserError
from earlytom.micro.data.scene import FRAMES
from earlytom.spans import check_watched
from runtime import choices

if TYPE_CHECKING:
    from builder.evaluation.arguments import EvaluationSettings


def settings_of(
    asked: EvaluationSettings, depth: int | None, frames: int | None = None, full: Sequence[int] | None = None
) -> EarlyTomConfig:
    """EarlyTom's settings for videos of some frames: the defaults for a tower of this depth, changed by what was given.

    Where the depth is not known, None, what hangs on it is not checked; frames are by default those of the task's
    clips; `full` as in `EarlyTomConfig.layers_for`.
    """
    layers = EarlyTomConfig.layers_for(RELEASED_LAYERS if depth is None else depth, full)
    given = choices.given_settings(asked, "tau", "merge_layers", "frame_budget")
    budget = given.get("frame_budget")
    if depth is None and isinstance(budget, tuple):
        layers = tuple(range(len(budget)))  # a small tower has fewer layers to merge after
    config = EarlyTomConfig(**{"merge_layers": layers, "schedule": "budget", **given})
    if depth is not None:
        config.check_layers(depth)
        check_watched(config.merge_layers[-1] if config.merge_layers else depth - 1, full)
    if depth is not None or not asked.coverage:  # what a model is meant for is known with its depth
        frames_per_stage(frames or FRAMES, merges=len(config.merge_layers), frame_budget=config.frame_budget)
    return config


def cells_of(asked: EvaluationSettings, config: EarlyTomConfig) -> CellsConfig:
    """The settings of "cells": the same merge layers and frames as EarlyTom, changed by what was given."""
    given = choices.given_settings(asked, "power", "rounds", "threshold")
    return CellsConfig(merge_layers=config.merge_layers, frame_budget=config.frame_budget, **given)


def merging_of(words: str, frames: int | None = None) -> Merging:
    """One of `--budgets`. Raises UserError for what is none, or has more frames than a clip (None: the task's)."""
    layers, _, kept = words.partition(":")
    try:
        found = Merging(choices.layers(layers), choices.budget(kept))
    except ValueError as error:
        example = "merge layers and frames such as 2,4,6:8,6,4 or 2,4:0.5"
        raise UserError(f"--budgets {words!r}: give {example}") from error
    CellsConfig(merge_layers=found.layers, frame_budget=found.frames)
    frames_per_stage(frames or FRAMES, merges=len(found.layers), frame_budget=found.frames)
    return found
