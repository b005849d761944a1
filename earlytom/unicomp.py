"""UniComp: similar neighbouring frames are averaged, frames less similar to the others get more tokens, and of similar
tokens in a frame only one is kept.

After its description; the published method also appends a newline to every kept frame, outside the budget. N depends on
the video and can be below the budget, so the host waits.

Notation: F frames, G groups of frames, P tokens a frame, E width, N tokens kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class UniCompSettings:
    """Settings of UniComp.

    Attributes:
        ratio: the budget, as share of the F * P tokens; each group's part of it is rounded, to one token at least.
        same: neighbouring frames are averaged if 1 - cosine of their mean tokens is at most this.
        near: tokens of a frame are similar if 1 - cosine is below this.
        most: a frame's largest budget, in equal shares.
        own: weight of a kept token against the mean of those similar to it.
    """

    ratio: float
    same: float = 0.005
    near: float = 0.2
    most: float = 2.0
    own: float = 0.5


def unicomp(features: Tensor, settings: UniCompSettings) -> tuple[Tensor, Tensor]:
    """Tokens [N, E] and positions `frame * P + place` [N], ascending; a group has the place of its first frame.

    Args:
        features: [F, P, E].
    """
    frames, per_frame, _ = features.shape
    fused, first = fuse_frames(features.float(), settings.same)
    shares = frame_budgets(fused, settings.ratio * frames * per_frame, settings.most)
    unit = normalize(fused, dim=-1)
    alike = unit @ unit.transpose(1, 2)  # [G, P, P]
    kept = distinct(alike, shares, settings.near)
    near = (1 - alike < settings.near).float()
    near.diagonal(dim1=1, dim2=2).zero_()
    members = near.sum(-1, keepdim=True)
    means = torch.where(members > 0, near @ fused / members.clamp_min(1), fused)
    values = settings.own * fused + (1 - settings.own) * means
    group, place = kept.nonzero().unbind(1)
    return values[group, place].to(features.dtype), first[group] * per_frame + place


def fuse_frames(features: Tensor, same: float) -> tuple[Tensor, Tensor]:
    """Means of groups of frames [G, P, E] fp32, and the first frame of each [G] int64; each frame of a group is similar
    to the one before."""
    means = normalize(features.mean(1), dim=-1)
    starts = torch.ones(len(features), dtype=torch.bool, device=features.device)
    starts[1:] = 1 - (means[1:] * means[:-1]).sum(-1) > same
    group = starts.long().cumsum(0) - 1
    first = starts.nonzero().flatten()
    member = (group == torch.arange(len(first), device=group.device)[:, None]).float()
    fused = (member / member.sum(1, keepdim=True)) @ features.flatten(1)
    return fused.unflatten(1, features.shape[1:]), first


def frame_budgets(fused: Tensor, tokens: float, most: float) -> Tensor:
    """The token budget of each of G frames, [G] int64: larger for frames less similar to the others."""
    groups, per_frame = fused.shape[:2]
    means = normalize(fused.mean(1), dim=-1)
    alike = (means @ means.T).mean(1)
    share = torch.softmax(math.sqrt(groups) * (alike.mean() - alike), 0)
    budget = (share * tokens).clamp_max(most * tokens / groups)
    return budget.round().long().clamp(1, per_frame)


def distinct(alike: Tensor, counts: Tensor, near: float) -> Tensor:
    """[G, P] bool: up to `counts [G]` tokens of each frame, visited from the least similar to the others of its frame
    on; a token similar to a kept one is skipped.

    Args:
        alike: [G, P, P] cosines.
    """
    groups, per_frame, _ = alike.shape
    rank = alike.mean(-1).argsort(dim=-1, stable=True).argsort(dim=-1)  # [G, P], order of visits
    free = torch.ones(groups, per_frame, dtype=torch.bool, device=alike.device)
    kept = torch.zeros_like(free)
    index = torch.arange(groups, device=alike.device)
    for step in range(int(counts.max())):
        best = torch.where(free, rank, per_frame).argmin(-1)
        takes = free[index, best] & (step < counts)
        kept[index, best] |= takes
        free &= ~takes[:, None] | (1 - alike[index, best] >= near)
        free[index, best] &= ~takes
    return kept
