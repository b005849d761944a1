"""The settings of methods that can be built into an engine, by the name of the method. Needs no PyTorch.

What an engine and its builder ask of settings, whatever the method: `method`, its name; `retention_ratio`,
`merge_layers`, `frame_budget`, `schedule`; `check_layers`; `inner_layer` and `merges_inside`; `bias` and
`original_positions`, whether the decoder is told, unless its user says otherwise, how much a token stands for and where
it was; `replace`, `to_dict`, `from_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError

MethodSettings = EarlyTomConfig | CellsConfig
SETTINGS: dict[str, type[EarlyTomConfig] | type[CellsConfig]] = {
    kind.method: kind for kind in (EarlyTomConfig, CellsConfig)
}


def settings_of(method: str, values: Mapping[str, Any]) -> MethodSettings:
    """The settings of a method from plain values. Raises UserError for a method or a setting that there is not."""
    if method not in SETTINGS:
        raise UserError(f"method must be one of {', '.join(SETTINGS)}, got {method!r} (--method)")
    return SETTINGS[method].from_dict(values)
