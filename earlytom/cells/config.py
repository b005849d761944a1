"""The settings of "cells". Like `earlytom.config` it knows no tensors and no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from earlytom.config import SCHEDULES, Schedule, budget_counts, check_layers, known, layer_numbers, one_of
from earlytom.numbers import real, whole

MOST_CHANGE = 3.0  # of thresholds: a change is at most 2, so this one merges all frames into one


@dataclass(frozen=True)
class CellsConfig:
    """Settings of the method.

    Attributes:
        retention_ratio: share of the `F * P` visual tokens that should reach the LLM, in (0, 1]; 1 keeps all.
        merge_layers: 0-based encoder layers after which frames are merged, ascending; empty turns merging off.
        frame_budget: budget schedule only: the share of frames that stays at each merge layer, in (0, 1], or one number
            of frames per merge layer.
        power: how far a cell of a merged frame prefers the member that differs from the clip's mean, in [0, 64]; 0
            averages.
        rounds: in how many rounds the tokens are taken, from 1 on; None takes one after the other. See
            `earlytom.cells.select`; 7 was as accurate as one after the other, and is what an engine without plugins
            can run.
        schedule: "budget" fixes the number of frames beforehand, so that every shape is static; "adaptive" lets the
            video decide how many stay.
        threshold: adaptive schedule only: the change to the frame before from which on a frame starts a group, in
            [0, 3]: 0 keeps all frames, more than 2 one.

    `method`, `bias`, `original_positions` and `inner_layer` are no settings: see `earlytom.settings`.
    """

    method: ClassVar[str] = "cells"
    bias: ClassVar[bool] = True
    original_positions: ClassVar[bool] = True
    inner_layer: ClassVar[None] = None
    merges_inside: ClassVar[bool] = False
    watches: ClassVar[bool] = False

    retention_ratio: float = 0.1
    merge_layers: tuple[int, ...] = (6, 14, 20)
    frame_budget: float | tuple[int, ...] = 0.75
    power: float = 4.0
    rounds: int | None = 7
    schedule: Schedule = "budget"
    threshold: float = 0.035

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the class is frozen; values are normalised once, here
        set_(self, "retention_ratio", real("retention_ratio", self.retention_ratio, 0, 1, low_open=True))
        set_(self, "merge_layers", layer_numbers(self.merge_layers))
        set_(self, "frame_budget", budget_counts(self.frame_budget, len(self.merge_layers)))
        set_(self, "power", real("power", self.power, 0, 64))
        if self.rounds is not None:
            set_(self, "rounds", whole("rounds", self.rounds, 1))
        one_of("schedule", self.schedule, SCHEDULES)
        set_(self, "threshold", real("threshold", self.threshold, 0, MOST_CHANGE))

    def check_layers(self, depth: int) -> None:
        """Raise UserError if a merge layer is not one of the tower's `depth` layers."""
        check_layers(self.merge_layers, depth)

    def replace(self, **changes: Any) -> CellsConfig:
        """A copy with some values changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse.

        Where it is not asked for, the usual threshold is left out, so that what was recorded before there was one is
        still what is written.
        """
        values = dataclasses.asdict(self)
        if self.schedule == "budget" and self.threshold == type(self).threshold:
            del values["threshold"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellsConfig:
        """Inverse of `to_dict`. Raises UserError on a key that is not a setting."""
        return cls(**known(cls, cls.method, values))
