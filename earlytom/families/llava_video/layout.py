"""How a frame's patches become the cells of its grid, half as many a side, and where newlines are among them.

Notation: F' frames, g patches a side, S = g * g patches, P cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from earlytom.families.closings import Closes
from earlytom.families.llava_next_video import average_pool
from earlytom.families.llava_onevision import grid_side, pool, pooled_side

if TYPE_CHECKING:
    from torch import Tensor

POOLINGS = ("bilinear", "average", "max")
CLOSES: dict[str, Closes | None] = {"grid": "row", "frame": "frame", "one_token": "video", "no_token": None}
"""What a newline closes, by `mm_newline_position`."""
_STRIDE = 2


def pooled(values: Tensor, how: str) -> Tensor:
    """[F', S, n] to [F', P, n]: "bilinear" (27 patches a side become 14), "average" or "max" (13)."""
    if how == "bilinear":
        return pool(values)
    return average_pool(values) if how == "average" else _max_pool(values)


def side_of(patches: int, how: str) -> int:
    """Cells a side, of so many patches."""
    return pooled_side(patches) if how == "bilinear" else patches // _STRIDE


def _max_pool(values: Tensor) -> Tensor:
    """The largest of 2 x 2 patches, an odd row or column left out."""
    from torch.nn import functional

    side = grid_side(values.shape[1])
    grid: Any = values.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return functional.max_pool2d(grid, _STRIDE, _STRIDE).flatten(2).transpose(1, 2).contiguous()
