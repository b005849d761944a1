"""Stage I of "cells": groups consecutive frames and merges each group, with separate weights for every cell.

A group starts where a frame differs from the one before it: at the F' frames that differ most, or (adaptive schedule)
at every frame that differs by a threshold. Within a group a static cell is averaged over the members; a changing cell
takes mostly the member that differs most from the clip's mean. So a group keeps what happens in it, cell by cell, and
one matrix product per cell merges anything with one entry per frame.

Everything is decided in fp32 by a fixed tensor program: no loop over frames, and no host sync except for the adaptive
schedule's number of groups. `builder.export.cells` writes the same program in ONNX operators.

Notation: F frames in, F' groups out, T tokens a frame inside the tower, of which the last S are its cells (prefix
tokens are merged like cells, but do not count for the change), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from earlytom.errors import UserError
from earlytom.merge import SIMILARITY_STEPS

EPSILON = 1e-5  # of the layer norm
NORM_FLOOR = 1e-6  # norms are clamped to this; the ONNX optimiser deletes smaller constants
NOVELTY_FLOOR = 1e-6
NOVELTY_NOISE = 1 / SIMILARITY_STEPS  # copies of one cell differ by less, whichever kernels computed them
FIRST_CHANGE = 9.0  # of frame 0, which always starts a group: larger than any change or threshold


@dataclass(frozen=True)
class CellPlan:
    """A decision about F frames.

    Attributes:
        weights: [T, F', F] fp32, convex: the weight of each frame in each cell of each group.
        member: [F', F] fp32, 1 where the frame belongs to the group.
        taken: [F', T] int64, the member that differs most from the clip's mean; the earliest of those within
            `NOVELTY_NOISE`, so that rounding does not decide between copies.
    """

    weights: Tensor
    member: Tensor
    taken: Tensor

    def apply(self, hidden: Tensor) -> Tensor:
        """Merge `hidden [F, T, D]` to [F', T, D], in its dtype: one [F', F] x [F, D] product per cell."""
        return (self.weights.to(hidden.dtype) @ hidden.transpose(0, 1)).transpose(0, 1)


def plan_cells(
    hidden: Tensor, frames_out: int | None, power: float, prefix: int = 0, *, threshold: float = 0.0
) -> CellPlan:
    """Decide how F frames are merged to `frames_out` groups or, if that is None, to a number that the video determines.

    Args:
        hidden: [F, T, D] hidden states of one video after a merge layer, any float dtype.
        frames_out: F'; None for the adaptive schedule, which waits for the device once.
        power: preference of a cell for the member that differs from the clip's mean; 0 averages.
        prefix: number of leading tokens that are no cells.
        threshold: adaptive schedule: the least change at which a frame starts a group; 0 keeps all frames.
    """
    if hidden.dim() != 3 or hidden.shape[0] < 1 or hidden.shape[1] <= prefix:
        raise UserError(f"hidden states must be [frames, tokens, width] with a frame, got {list(hidden.shape)}")
    frames = hidden.shape[0]
    if frames_out is not None and not 1 <= frames_out <= frames:
        raise UserError(f"frames_out must be between 1 and {frames} (the frames that arrive), got {frames_out}")
    normal = normalised(hidden.float())
    direction = unit(normal)
    step = change(direction[:, prefix:])
    if frames_out is None:
        starts = changed(step, threshold)
        frames_out = int(starts.sum())  # the adaptive schedule's one wait for the device
    else:
        starts = group_starts(step, frames_out)
    member = members(starts, frames_out)
    weights, taken = member_weights(novelty(normal, direction), member, power)
    return CellPlan(weights, member, taken)


def normalised(x: Tensor) -> Tensor:
    """Layer norm without weights over the last dimension, written out: the operator's kernels sum in another order, and
    1 - cosine of very similar vectors would show the difference."""
    away = x - x.mean(-1, keepdim=True)
    return away / ((away * away).mean(-1, keepdim=True) + EPSILON).sqrt()


def unit(x: Tensor) -> Tensor:
    """`x [..., D]` in fp32, divided by its norm."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def change(direction: Tensor) -> Tensor:
    """How much each frame differs from the one before it, [F] fp32 on the grid of `SIMILARITY_STEPS`.

    Args:
        direction: [F, S, D] fp32 of unit length.
    """
    step = 1 - (direction[1:] * direction[:-1]).sum(-1).mean(-1)
    step = torch.round(step * SIMILARITY_STEPS) / SIMILARITY_STEPS
    return functional.pad(step, (1, 0), value=FIRST_CHANGE)


def group_starts(step: Tensor, frames_out: int) -> Tensor:
    """[F] bool: the `frames_out` frames of largest change `step [F]`, which start groups; ties to the earlier."""
    index = torch.arange(step.shape[0], device=step.device)
    mine, other = step, step[:, None]
    goes_first = (other > mine) | ((other == mine) & (index[:, None] < index))
    return goes_first.sum(0) < frames_out


def changed(step: Tensor, threshold: float) -> Tensor:
    """[F] bool: the frames whose change `step [F]` is at least `threshold` (in fp32), which start groups."""
    return step.clamp_min(0) >= threshold  # rounding may make 1 - 1 negative, and a threshold of 0 must keep all


def members(starts: Tensor, frames_out: int) -> Tensor:
    """[F', F] fp32: 1 where a frame belongs to a group, from the mask of frames that start one."""
    group = starts.long().cumsum(0) - 1
    return (group == torch.arange(frames_out, device=starts.device)[:, None]).float()


def novelty(normal: Tensor, direction: Tensor) -> Tensor:
    """How much each cell of each frame differs from the clip's mean there, [F, T] fp32.

    Args:
        normal: [F, T, D] fp32; direction: the same with unit length.
    """
    return (1 - (direction * unit(normal.mean(0))).sum(-1)).clamp_min(NOVELTY_FLOOR)


def member_weights(novel: Tensor, member: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """The weights of each group's members, and the member of largest weight.

    Args:
        novel: [F, T] fp32, above 0; member: [F', F] fp32.

    Returns:
        weights [T, F', F] fp32 and taken [F', T] int64, see `CellPlan`.
    """
    frames = novel.shape[0]
    own = member * novel.T[:, None, :]  # [T, F', F], 0 for non-members
    peak = own.amax(-1, keepdim=True)
    share = member * (own / peak) ** power
    index = torch.arange(frames, device=novel.device)
    most = own >= (peak - NOVELTY_NOISE).clamp_min(NOVELTY_FLOOR)  # false for non-members, whose value is 0
    taken = torch.where(most, index, frames).amin(-1)  # [T, F']
    return share / share.sum(-1, keepdim=True), taken.T


def merge_marks(plan: CellPlan, size: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the sizes and times of the cells.

    Args:
        plan: of the S cells (and of prefix tokens).
        size, time: [F, S] fp32, the number of original cells merged into each, and the frame of the video it shows.

    Returns:
        both [F', S]: sizes are summed, the time is that of the member of largest weight.
    """
    cells = size.shape[1]
    return plan.member @ size, time.gather(0, plan.taken[:, -cells:])
