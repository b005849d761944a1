"""EarlyTom: early token compression for video language models (training-free), in PyTorch.

    from earlytom import EarlyTomConfig, apply_earlytom
    with apply_earlytom(model, EarlyTomConfig.preset("videomme", 0.20)):
        model.generate(**inputs)

The method: *EarlyTom: Early Token Compression Completes Fast Video Understanding* (CVPR 2026, arXiv 2605.30010).

Names are imported at first use: settings and errors need no PyTorch, whose import takes over a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from earlytom.budget import frames_per_stage, token_count
    from earlytom.cells.config import CellsConfig
    from earlytom.config import EarlyTomConfig
    from earlytom.encoder import VisualTokens
    from earlytom.errors import UserError
    from earlytom.inner_decoder import apply_inner
    from earlytom.merge import FramePlan, plan_frames, segment_frames
    from earlytom.model import apply_earlytom, encode_video
    from earlytom.select import select_tokens

__all__ = [
    "CellsConfig",
    "EarlyTomConfig",
    "FramePlan",
    "UserError",
    "VisualTokens",
    "apply_earlytom",
    "apply_inner",
    "encode_video",
    "frames_per_stage",
    "plan_frames",
    "segment_frames",
    "select_tokens",
    "token_count",
]

_HOMES = {
    "CellsConfig": "cells.config",
    "EarlyTomConfig": "config",
    "FramePlan": "merge",
    "UserError": "errors",
    "VisualTokens": "encoder",
    "apply_earlytom": "model",
    "apply_inner": "inner_decoder",
    "encode_video": "model",
    "frames_per_stage": "budget",
    "plan_frames": "merge",
    "segment_frames": "merge",
    "select_tokens": "select",
    "token_count": "budget",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
