"""Clips of one video each, for graphs that take several at once.

`fill` makes as many clips as whole batches need, all of them different: where two videos of a batch were alike, a graph
that mixes them up would look right. `stack` puts clips together for the graph, `split` takes its values apart, so that
everything between sees single clips.
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
    """The clips, and as many others made of them as whole batches of `batch` need.

    Args:
        clips: name to uint8 frames [F, 3, H, W], at least one.

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
    """[F, 3, H, W] each to [B, F, 3, H, W] each, in order; `fill` has seen to it that they fill whole batches."""
    return [np.stack(clips[first : first + batch]) for first in range(0, len(clips), batch)]


def split(values: Mapping[str, NDArray[Any]], batch: int) -> list[dict[str, NDArray[Any]]]:
    """What a graph of `batch` videos returned, as graphs of one video each would have.

    Decisions and outputs have a leading B, everything else has the rows of one video after those of the other.
    """
    return [{name: _of_video(name, value, batch, video) for name, value in values.items()} for video in range(batch)]


def _of_video(name: str, value: NDArray[Any], batch: int, video: int) -> NDArray[Any]:
    if name.startswith(tuple(f"{what}_" for what in OF_MERGES)) or name in ("static", *layout.OUTPUTS):
        return value[video]
    rows = len(value) // batch
    return value[video * rows : (video + 1) * rows]
