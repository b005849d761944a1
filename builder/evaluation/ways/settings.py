"""The settings of EarlyTom and "cells" from the command's options."""

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
    """EarlyTom's settings: the defaults for a tower of `depth` layers, changed by the options.

    Args:
        depth: None while unknown: checks that depend on it are skipped.
        frames: of a video; default: the task's.
        full: as in `EarlyTomConfig.layers_for`.
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
    if depth is not None or not asked.coverage:  # coverage's default number of frames is the model's
        frames_per_stage(frames or FRAMES, merges=len(config.merge_layers), frame_budget=config.frame_budget)
    return config


def cells_of(asked: EvaluationSettings, config: EarlyTomConfig) -> CellsConfig:
    """The settings of "cells": EarlyTom's merge layers and frame budget, and the options of its own."""
    given = choices.given_settings(asked, "power", "rounds", "threshold")
    return CellsConfig(merge_layers=config.merge_layers, frame_budget=config.frame_budget, **given)


def merging_of(words: str, frames: int | None = None) -> Merging:
    """One value of `--budgets`, checked for clips of `frames` frames (None: the task's)."""
    layers, _, kept = words.partition(":")
    try:
        found = Merging(choices.layers(layers), choices.budget(kept))
    except ValueError as error:
        example = "merge layers and frames such as 2,4,6:8,6,4 or 2,4:0.5"
        raise UserError(f"--budgets {words!r}: give {example}") from error
    CellsConfig(merge_layers=found.layers, frame_budget=found.frames)
    frames_per_stage(frames or FRAMES, merges=len(found.layers), frame_budget=found.frames)
    return found
