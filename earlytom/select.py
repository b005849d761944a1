"""Stage II: selects the tokens of each frame that reach the LLM.

A changing ("dynamic") frame keeps its tokens of highest received attention; a frame inside a static segment keeps the
best token of each of n windows of the raster order, because a few attention sinks would otherwise take all places.
Tokens stay in raster order, frames in time order.

Both rules are one: a token's rank is the number of its rivals (all tokens of its frame, or of its window) that beat it;
it stays if the rank is below the number of places (k, or 1). Ties go to the lower index on every backend, since nothing
here relies on the order in which a top-k operator returns equal values.

Notation: F' frames (after merging), P tokens a frame, D width, N tokens kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlytom.budget import dynamic_tokens, effective_ratio, static_tokens
from earlytom.config import SCHEDULES
from earlytom.errors import UserError


def select_tokens(
    features: Tensor,
    received: Tensor,
    segments: Tensor,
    *,
    frames_in: int,
    ratio: float,
    schedule: str = "adaptive",
) -> tuple[Tensor, Tensor]:
    """Select the tokens of highest received attention.


    Args:
        features: [F', P, D] after projector and pooling.
        received: [F', P] received attention after the same pooling.
        segments: [G, 2] final segments of the F' frames (inclusive).
        frames_in: frames of the input video, before any merging.
        ratio: retention ratio in (0, 1].
        schedule: "adaptive": static frames keep `round(P * r')` tokens (at least 1), the others `ceil(P * r')`;
            "budget": all frames keep `ceil(P * r')`, so N is known beforehand. r' is `budget.effective_ratio`.

    Returns:
        tokens [N, D] in the dtype of the features, and positions [N] int64, `frame * P + cell`.

    Raises:
        UserError: shapes that do not belong together, no frames, a ratio outside (0, 1], or an unknown schedule.
    """
    if features.dim() != 3 or 0 in features.shape[:2] or received.shape != features.shape[:2]:
        raise UserError(
            f"features must be [frames, tokens, width] and received attention [frames, tokens], got "
            f"{list(features.shape)} and {list(received.shape)}"
        )
    if not 0 < ratio <= 1:
        raise UserError(f"the retention ratio must be in (0, 1], got {ratio}")
    if frames_in < 1:
        raise UserError(f"frames_in must be at least 1 (the frames of the input video), got {frames_in}")
    if schedule not in SCHEDULES:
        raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    frames, per_frame, _ = features.shape
    effective = effective_ratio(ratio, frames_in, frames)
    places = dynamic_tokens(per_frame, effective)
    index = torch.arange(frames, device=features.device)
    first, last = segments.to(features.device).unbind(1)
    static = ((first[:, None] < index) & (index < last[:, None])).any(0)
    if schedule == "budget":
        return select_fixed(features, received, static, places)
    return select_varying(features, received, static, places, static_tokens(per_frame, effective))


def select_fixed(features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Keep exactly `places` tokens of every frame: static shapes, no host sync.

    Args:
        features: [F', P, D]; received: [F', P]; static: [F'] bool.

    Returns:
        tokens [F' * places, D] and positions [F' * places] int64.
    """
    frames, per_frame, _ = features.shape
    mask = keep_mask(received, static, places, places)
    cells = torch.argsort(~mask, dim=1, stable=True)[:, :places]  # raster order: kept cells first
    offset = torch.arange(frames, device=features.device)[:, None] * per_frame
    positions = (cells + offset).flatten()
    return features.flatten(0, 1)[positions], positions


def select_varying(
    features: Tensor, received: Tensor, static: Tensor, places: int, windows: int
) -> tuple[Tensor, Tensor]:
    """Keep `places` tokens of a dynamic frame and `windows` of a static one; on a GPU the host waits for their number.

    Args:
        features: [F', P, D]; received: [F', P]; static: [F'] bool.

    Returns:
        tokens [N, D] and positions [N] int64.
    """
    positions = keep_mask(received, static, places, windows).flatten().nonzero().squeeze(1)
    return features.flatten(0, 1)[positions], positions


def keep_mask(received: Tensor, static: Tensor, places: int, windows: int) -> Tensor:
    """[F', P] bool: which tokens stay.

    Args:
        received: [F', P]; static: [F'] bool.
        places: tokens a dynamic frame keeps; windows: windows of a static frame, one token each.
    """
    per_frame = received.shape[1]
    index = torch.arange(per_frame, device=received.device)
    earlier = index[:, None] < index  # [P, P]: row q is before column p
    mine, other = received[:, None, :], received[:, :, None]
    beats = (other > mine) | ((other == mine) & earlier)  # [F', P, P]: q beats p
    window = window_of_cell(per_frame, windows, received.device)
    rivals = (window[:, None] == window) | ~static[:, None, None]
    rank = (beats & rivals).sum(1)
    return rank < torch.where(static, 1, places)[:, None]


def window_of_cell(per_frame: int, windows: int, device: torch.device | None = None) -> Tensor:
    """[P] int64: the window of each cell. Windows are contiguous in raster order and as even as possible; the first
    `P mod windows` are one longer. Computed on `device`: a CUDA graph allows no copy from the host."""
    size, longer = divmod(per_frame, windows)
    cell = torch.arange(per_frame, device=device)
    in_longer = longer * (size + 1)  # cells that lie in the longer windows
    return torch.where(cell < in_longer, cell // (size + 1), longer + (cell - in_longer) // size)
