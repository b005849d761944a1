"""LLaVA-Video's poolings of a frame's patches to cells, by 2 x 2, and its places of newlines.

Notation: F' frames of g x g patches, S = g * g, P cells.
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
"""What ends with a newline, by `mm_newline_position`."""
_STRIDE = 2


def pooled(values: Tensor, how: str) -> Tensor:
    """[F', S, n] to [F', P, n] by pooling "bilinear" (g = 27 gives 14 x 14 cells), "average" or "max" (13 x 13)."""
    if how == "bilinear":
        return pool(values)
    return average_pool(values) if how == "average" else _max_pool(values)


def side_of(patches: int, how: str) -> int:
    """Rows (or columns) of cells from those of patches."""
    return pooled_side(patches) if how == "bilinear" else patches // _STRIDE


def _max_pool(values: Tensor) -> Tensor:
    """The maximum of 2 x 2 patches; an odd last row or column is left out."""
    from torch.nn import functional

    side = grid_side(values.shape[1])
    grid: Any = values.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return functional.max_pool2d(grid, _STRIDE, _STRIDE).flatten(2).transpose(1, 2).contiguous()
