"""Frames of Qwen3-VL: pictures of a frame, patches of a token, and the grid of patches."""

from __future__ import annotations

from typing import Any

from earlytom.errors import UserError
from earlytom.numbers import shown

SIZE = (448, 448)
"""Default height and width of frames, in pixels."""
SIDE, STEP = 2, 2  # in every published model a token is SIDE x SIDE patches, and a frame STEP pictures


def grid_of(vision: Any) -> tuple[int, int]:
    """(rows, columns) of patches of a vision configuration. Raises UserError for a size that tokens do not fill."""
    if not isinstance(patch := vision.patch_size, int) or vision.temporal_patch_size != STEP:
        raise UserError(f"patches must be square and {STEP} pictures deep, got patch_size {shown(patch)}")
    height, width = getattr(vision, "image_size", SIZE)
    if height % (SIDE * patch) or width % (SIDE * patch) or not (height and width):
        raise UserError(
            f"frames are {height}x{width}, expected multiples of {SIDE * patch} pixels, as patches of {patch} are "
            f"joined {SIDE} by {SIDE}: give such a --size, or image_size in vision_config"
        )
    return height // patch, width // patch


def streams_of(vision: Any) -> tuple[int, ...]:
    """The layers of a vision configuration whose states also go to the language model; none for models without
    deepstack."""
    return tuple(getattr(vision, "deepstack_visual_indexes", ()))
