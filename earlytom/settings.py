"""The settings of methods that can be built into an engine, by the name of the method. Needs no PyTorch.

The interface that an engine and its builder need of every method's settings: `method`, its name; `retention_ratio`,
`merge_layers`, `frame_budget`, `schedule`; `check_layers`; `watches`, whether it uses received attention; `inner_layer`
and `merges_inside`; `bias` and `original_positions`, whether by default the decoder gets a bias for the number of
tokens that each stands for, and positions in the video; `replace`, `to_dict`, `from_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.untouched import UNTOUCHED, UntouchedConfig

MethodSettings = EarlyTomConfig | CellsConfig | UntouchedConfig
Kind = type[EarlyTomConfig] | type[CellsConfig] | type[UntouchedConfig]
_KINDS: tuple[Kind, ...] = (EarlyTomConfig, CellsConfig, *UNTOUCHED)
SETTINGS: dict[str, Kind] = {kind.method: kind for kind in _KINDS}
_OF_THE_VIDEO = "how many tokens it keeps is for the video to say, and an engine has static shapes"
NOT_BUILT: dict[str, str] = {
    "holitom": _OF_THE_VIDEO,
    "fastvid": _OF_THE_VIDEO,
    "flashvid": _OF_THE_VIDEO,
    "unicomp": _OF_THE_VIDEO,
    "bvllm-style": _OF_THE_VIDEO,
    "unified": "it accepts tokens one after the other, thousands of steps that wait for each other",
    "vqtoken": "its seeds are drawn by sums in double precision, which TensorRT does not have",
    "fastv": "it acts inside the language model, and an engine holds the vision part",
}
"""Published methods that run in PyTorch only, and why they cannot be built into an engine."""
FIELD = (*(kind.method for kind in UNTOUCHED), *NOT_BUILT)
"""The names of all published comparison methods."""


def settings_of(method: str, values: Mapping[str, Any]) -> MethodSettings:
    """The settings of a method from plain values. Raises UserError for an unknown method or setting."""
    if method not in SETTINGS:
        raise UserError(f"method must be one of {', '.join(SETTINGS)}, got {method!r} (--method)")
    return SETTINGS[method].from_dict(values)
