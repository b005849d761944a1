"""From what a command was asked for to the settings of both methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from builder.evaluation.options import Merging
from earlytom.budget import frames_per_stage
from earlytom.cells.config import CellsConfig
from earlytom.config import RELEASED_LAYERS, EarlyTomConfig
from earlytom.errors import UserError
from earlytom.micro.data.scene import FRAMES

if TYPE_CHECKING:
    from builder.evaluation.arguments import EvaluationSettings


def settings_of(asked: EvaluationSettings, depth: int | None, frames: int | None = None) -> EarlyTomConfig:
    """EarlyTom's settings for videos of some frames: the defaults for a tower of this depth, changed by what was given.

    Where the depth is not known, None, what hangs on it is not checked; frames are by default those of the task's
    clips.
    """
    layers = EarlyTomConfig.layers_for(RELEASED_LAYERS if depth is None else depth)
    changes: dict[str, Any] = {"merge_layers": layers, "schedule": "budget"}
    if asked.merge_layers is not None:
        changes["merge_layers"] = tuple(_numbers(asked.merge_layers, "--merge-layers", "layer numbers such as 2,4,6"))
    if asked.frame_budget is not None:
        budget = _frames(asked.frame_budget, "--frame-budget")
        changes["frame_budget"] = budget
        if depth is None and isinstance(budget, tuple) and asked.merge_layers is None:
            changes["merge_layers"] = tuple(range(len(budget)))  # a small tower has fewer layers to merge after
    if asked.tau is not None:
        changes["tau"] = asked.tau
    config = EarlyTomConfig(**changes)
    if depth is not None:
        config.check_layers(depth)
    if depth is not None or not asked.coverage:  # what a model is meant for is known with its depth
        frames_per_stage(frames or FRAMES, merges=len(config.merge_layers), frame_budget=config.frame_budget)
    return config


def cells_of(asked: EvaluationSettings, config: EarlyTomConfig) -> CellsConfig:
    """The settings of "cells": the same merge layers and frames as EarlyTom, changed by what was given."""
    changes = {name: value for name in ("power", "rounds", "threshold") if (value := getattr(asked, name)) is not None}
    return CellsConfig(merge_layers=config.merge_layers, frame_budget=config.frame_budget, **changes)


def merging_of(words: str, frames: int | None = None) -> Merging:
    """One of `--budgets`. Raises UserError for what is none, or has more frames than a clip (None: the task's)."""
    example = "merge layers and frames such as 2,4,6:8,6,4 or 2,4:0.5"
    layers, colon, kept = words.partition(":")
    if not colon:
        raise UserError(f"--budgets {words!r}: give {example}")
    found = Merging(tuple(_numbers(layers, "--budgets", example)), _frames(kept, "--budgets"))
    CellsConfig(merge_layers=found.layers, frame_budget=found.frames)
    frames_per_stage(frames or FRAMES, merges=len(found.layers), frame_budget=found.frames)
    return found


def _frames(text: str, option: str) -> float | tuple[int, ...]:
    counts = "," in text or (text.isdecimal() and int(text) > 1)  # 13 is no share
    budget = _numbers(text, option, "a share such as 0.75, or one count a merge", whole=counts)
    return tuple(budget) if counts else budget[0]


def _numbers(text: str, option: str, example: str, *, whole: bool = True) -> list[Any]:
    try:
        return [(int if whole else float)(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text!r}: give {example}") from error
