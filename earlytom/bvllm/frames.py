"""B-VLLM's merging, which needs no training: candidates (soft mixtures of frames) made of the same frames are merged,
and each survivor's tokens are merged to an equal share of a budget.

There are two forms of temporal merging. In the released one (`faithful`) a candidate into which others are merged may
itself be merged, and theirs are lost. The default follows such chains to a survivor.

Notation: k candidates, T frames, S tokens a frame, C width, L survivors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.bipartite import Reduced, reduce
from earlytom.errors import UserError

THRESHOLD = 0.75
BUDGET = 18  # the most tokens in all, in frames of `PER_FRAME` tokens
PER_FRAME = 32


@dataclass(frozen=True)
class CandidateMerge:
    """Which of k candidates survive.

    Attributes:
        survives: [k] bool.
        into: [k] int64, the candidate that each is merged into; itself if it survives.
    """

    survives: Tensor
    into: Tensor

    def merge(self, candidates: Tensor, *, faithful: bool = False) -> Tensor:
        """`candidates [k, ...]` to [L, ...]: the mean of each survivor and those merged into it. Syncs for L."""
        padded, survives = self.padded(candidates, faithful=faithful)
        return padded[survives]

    def padded(self, candidates: Tensor, *, faithful: bool = False) -> tuple[Tensor, Tensor]:
        """`merge` with a static shape: [k, ...], survivors first, and [k] bool, True for survivors."""
        into = self.into if faithful else self.ends()
        index = torch.arange(len(into), device=into.device)
        member = (into == index[:, None]).to(candidates.dtype)  # [to, from]
        means = (member / member.sum(1, keepdim=True).clamp_min(1)) @ candidates.flatten(1)
        order = (~self.survives).byte().argsort(stable=True)
        return means.index_select(0, order).unflatten(1, candidates.shape[1:]), self.survives.index_select(0, order)

    def ends(self) -> Tensor:
        """The survivor at the end of each candidate's chain, [k] int64; links go to earlier ones, so k - 1 suffice."""
        into, steps = self.into, 1
        while steps < len(into):
            into, steps = into.index_select(0, into), 2 * steps
        return into


def merge_candidates(rows: Tensor, threshold: float = THRESHOLD) -> CandidateMerge:
    """Decide by `rows [k, T]`, the weight of each frame in each candidate. A candidate whose similarity to an earlier
    one, (1 + cosine) / 2, is above `threshold` is merged into the most similar earlier one; of equal ones the first.
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
    """Tokens of each of `survivors` frames."""
    return int(max(1, (BUDGET / survivors) * PER_FRAME))


def merge_tokens(tokens: Tensor, target: int) -> Reduced:
    """`tokens [B, n, C]` to [B, min(n, target), C] by bipartite steps that each merge half, and an exact last one.
    Means are unweighted: a merged token counts as one."""
    return reduce(tokens, target, forgetful=True, listed_by_similarity=True)
