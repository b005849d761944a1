"""Batches of single-video clips, for graphs that take several videos at once.

`fill` adds clips to make whole batches, all different: a graph that confuses the videos of a batch would go unnoticed
if two were equal. `stack` makes the graph's input, `split` separates its values by video, so that all other code sees
single clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earlytom.errors import UserError
from earlytom.spans import OF_MERGES
from runtime.engine import layout


def fill(clips: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Add variants of the clips (uint8 [F, 3, H, W], by name) until they fill whole batches.

    Returns:
        the same clips, then those reversed in time, mirrored, both, and so on; no two are equal.
    """
    filled = dict(clips)
    missing = -len(clips) % batch
    for name, frames in _variants(clips):
        if missing == 0:
            break
        if not any(torch.equal(frames, other) for other in filled.values()):
            filled[name] = frames
            missing -= 1
    if missing:
        raise UserError(
            f"{len(clips)} clips and their mirror images give {len(filled)} that differ, and whole batches of {batch} "
            f"need {len(filled) + missing}: name more videos with --calibration, or use a smaller --batch"
        )
    return filled


def _variants(clips: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for shift in range(max(map(len, clips.values()))):
        moved = f", from frame {shift} on" if shift else ""
        changes = (("", ()), (", reversed in time", (0,)), (", mirrored", (3,)), (", reversed and mirrored", (0, 3)))
        for change, axes in changes:
            for name, frames in clips.items():
                if shift or axes:
                    yield f"{name}{moved}{change}", frames.roll(-shift, 0).flip(axes)


def stack(clips: Sequence[NDArray[np.uint8]], batch: int) -> list[NDArray[np.uint8]]:
    """Clips [F, 3, H, W] to batches [B, F, 3, H, W], in order; the clips must fill whole batches (`fill`)."""
    return [np.stack(clips[first : first + batch]) for first in range(0, len(clips), batch)]


def split(values: Mapping[str, NDArray[Any]], batch: int) -> list[dict[str, NDArray[Any]]]:
    """Split the values of a graph of `batch` videos into those of each video.

    Decisions and outputs have a leading B; all other values have the videos' rows one after the other.
    """
    return [{name: _of_video(name, value, batch, video) for name, value in values.items()} for video in range(batch)]


def _of_video(name: str, value: NDArray[Any], batch: int, video: int) -> NDArray[Any]:
    if name.startswith(tuple(f"{what}_" for what in OF_MERGES)) or name in ("static", *layout.OUTPUTS):
        return value[video]
    rows = len(value) // batch
    return value[video * rows : (video + 1) * rows]
