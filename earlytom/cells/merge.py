"""Stage I of "cells": which frames form a group, and how much of each member every cell of the group takes.

A group starts where a frame differs from the one before it: at the frames that differ most, as many as there shall be
groups, or (adaptive schedule) at every frame that differs by a threshold. Within a group a cell that stays the same is
averaged over the members; a cell that changes takes the member that differs from the clip's mean. So a group keeps what
happens in it, cell by cell, and one product a cell merges anything that has one entry a frame.

Everything is decided in fp32 by a fixed tensor program: no loop over frames and, but for the number of groups where the
video decides it, no host sync. `builder.export.cells` writes the same program in ONNX operators.

Notation: F frames in, F' groups out, T tokens a frame inside the tower, of which the last S are its cells (the others
are merged like cells of their own, and do not count for the change), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from earlytom.errors import UserError
from earlytom.merge import SIMILARITY_STEPS

EPSILON = 1e-5  # of the layer norm
NORM_FLOOR = 1e-6  # a vector shorter than this has no direction; smaller constants are deleted by the ONNX optimiser
NOVELTY_FLOOR = 1e-6
NOVELTY_NOISE = 1 / SIMILARITY_STEPS  # copies of one cell differ by less, whichever kernels made them
FIRST_CHANGE = 9.0  # of frame 0, which always starts a group: more than any change and any threshold can be


@dataclass(frozen=True)
class CellPlan:
    """A decision about F frames.

    Attributes:
        weights: [T, F', F] fp32, convex: what each cell of each group is made of.
        member: [F', F] fp32, 1 where the frame belongs to the group.
        taken: [F', T] int64, the frame that differs most from the clip's mean; of those within `NOVELTY_NOISE` of it
            the earliest, so that no rounding decides between copies.
    """

    weights: Tensor
    member: Tensor
    taken: Tensor

    def apply(self, hidden: Tensor) -> Tensor:
        """Merge `hidden [F, T, D]` to [F', T, D], in its dtype: one [F', F] x [F, D] product a cell."""
        return (self.weights.to(hidden.dtype) @ hidden.transpose(0, 1)).transpose(0, 1)


def plan_cells(
    hidden: Tensor, frames_out: int | None, power: float, prefix: int = 0, *, threshold: float = 0.0
) -> CellPlan:
    """Decide how F frames are merged to `frames_out` groups, or to as many as the video has.

    Args:
        hidden: [F, T, D] hidden states of one video after a merge layer, any float dtype.
        frames_out: F'; None lets the video decide, which waits for the device once.
        power: how far a cell prefers the member that differs; 0 averages.
        prefix: how many of the T tokens are no cells.
        threshold: the change from which on a frame starts a group, where the video decides; 0 keeps all frames.
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
    """Layer norm without weights over the last dimension, written out: the operator's kernels sum otherwise, and what
    is left of 1 - cosine of two that are much alike shows it."""
    away = x - x.mean(-1, keepdim=True)
    return away / ((away * away).mean(-1, keepdim=True) + EPSILON).sqrt()


def unit(x: Tensor) -> Tensor:
    """`x [..., D]` in fp32 over its length."""
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
    """[F] bool: the frames that start a group, those of largest change `step [F]`; of equal ones the earlier."""
    index = torch.arange(step.shape[0], device=step.device)
    mine, other = step, step[:, None]
    goes_first = (other > mine) | ((other == mine) & (index[:, None] < index))
    return goes_first.sum(0) < frames_out


def changed(step: Tensor, threshold: float) -> Tensor:
    """[F] bool: the frames that start a group, those whose change `step [F]` is at least `threshold`, taken in fp32."""
    return step.clamp_min(0) >= threshold  # what rounding left of 1 - 1 may be below 0, and 0 keeps all


def members(starts: Tensor, frames_out: int) -> Tensor:
    """[F', F] fp32: 1 where a frame belongs to a group, by who starts one."""
    group = starts.long().cumsum(0) - 1
    return (group == torch.arange(frames_out, device=starts.device)[:, None]).float()


def novelty(normal: Tensor, direction: Tensor) -> Tensor:
    """How much each cell of each frame differs from the clip's mean there, [F, T] fp32.

    Args:
        normal: [F, T, D] fp32; direction: the same with unit length.
    """
    return (1 - (direction * unit(normal.mean(0))).sum(-1)).clamp_min(NOVELTY_FLOOR)


def member_weights(novel: Tensor, member: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """The weights of each group's members, and which of them weighs most.

    Args:
        novel: [F, T] fp32, above 0; member: [F', F] fp32.

    Returns:
        weights [T, F', F] fp32 and taken [F', T] int64, see `CellPlan`.
    """
    frames = novel.shape[0]
    own = member * novel.T[:, None, :]  # [T, F', F], 0 for who is no member
    peak = own.amax(-1, keepdim=True)
    share = member * (own / peak) ** power
    index = torch.arange(frames, device=novel.device)
    most = own >= (peak - NOVELTY_NOISE).clamp_min(NOVELTY_FLOOR)  # 0 of who is no member is not
    taken = torch.where(most, index, frames).amin(-1)  # [T, F']
    return share / share.sum(-1, keepdim=True), taken.T


def merge_marks(plan: CellPlan, size: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """What becomes of the sizes and times of the cells.

    Args:
        plan: of the S cells (and of tokens before them).
        size, time: [F, S] fp32, how many original cells each is made of, and the frame of the video it shows.

    Returns:
        both [F', S]: sizes add up, a time is that of the member of largest weight.
    """
    cells = size.shape[1]
    return plan.member @ size, time.gather(0, plan.taken[:, -cells:])
