"""B-VLLM's merging: candidates made of frames are merged where they are made of the same frames, and the tokens of each
are merged to what is left of a budget. Needs no training.

Two forms of temporal merging. In the released one (`faithful`) a candidate that others are merged into may itself be
merged away, and takes what it was given with it into nothing. The default follows such chains to a candidate that
survives.

Notation: k candidates, T frames, S tokens a frame, C width, L survivors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.bipartite import Reduced, reduce
from earlytom.errors import UserError

THRESHOLD = 0.75
BUDGET = 18  # frames of 32 tokens each, at most, in all
PER_FRAME = 32


@dataclass(frozen=True)
class CandidateMerge:
    """Which of k candidates survive.

    Attributes:
        survives: [k] bool.
        into: [k] int64, the candidate that each goes into, itself if it survives.
    """

    survives: Tensor
    into: Tensor

    def merge(self, candidates: Tensor, *, faithful: bool = False) -> Tensor:
        """`candidates [k, ...]` to [L, ...]: means of each survivor and what goes into it. Waits for how many there
        are."""
        padded, survives = self.padded(candidates, faithful=faithful)
        return padded[survives]

    def padded(self, candidates: Tensor, *, faithful: bool = False) -> tuple[Tensor, Tensor]:
        """The same of static shape: [k, ...] with the survivors first, and [k] bool, which are."""
        into = self.into if faithful else self.ends()
        index = torch.arange(len(into), device=into.device)
        member = (into == index[:, None]).to(candidates.dtype)  # [to, from]
        means = (member / member.sum(1, keepdim=True).clamp_min(1)) @ candidates.flatten(1)
        order = (~self.survives).byte().argsort(stable=True)
        return means.index_select(0, order).unflatten(1, candidates.shape[1:]), self.survives.index_select(0, order)

    def ends(self) -> Tensor:
        """Where each candidate ends up, when chains are followed: an earlier one each time, so k - 1 steps suffice."""
        into, steps = self.into, 1
        while steps < len(into):
            into, steps = into.index_select(0, into), 2 * steps
        return into


def merge_candidates(rows: Tensor, threshold: float = THRESHOLD) -> CandidateMerge:
    """Decide by `rows [k, T]`, how much of each frame each candidate is made of: one that resembles an earlier one more
    than `threshold` (half of one more than the cosine) goes into the one that it resembles most, the first of equals.
    """
    if rows.dim() != 2 or not len(rows):
        raise UserError(f"candidates must be [candidates, frames] with a candidate, got {list(rows.shape)}")
    x = rows.float()
    x = x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    alike = (x @ x.T + 1) / 2
    index = torch.arange(len(x), device=x.device)
    alike = torch.where(index < index[:, None], alike, -1.0)
    best, into = alike.max(1)
    survives = best <= threshold
    return CandidateMerge(survives, torch.where(survives, index, into))


def frame_tokens(survivors: int) -> int:
    """How many tokens each of so many frames may have."""
    return int(max(1, (BUDGET / survivors) * PER_FRAME))


def merge_tokens(tokens: Tensor, target: int) -> Reduced:
    """`tokens [B, n, C]` to [B, min(n, target), C]: bipartite steps of half of all, and a last one that is exact; plain
    means, in which what was merged before counts as one."""
    return reduce(tokens, target, forgetful=True, listed_by_similarity=True)
