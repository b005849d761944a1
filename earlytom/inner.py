"""Merges visual tokens inside the LLM (optional part of the method).

During prefill, before layer k, visual tokens are ranked by their attention from the last prompt token in layer k-1; the
best-ranked stay, and each of the others is folded into the most similar of those. Text is never touched. `plan_inner`
decides, `InnerPlan.apply` merges; `earlytom.inner_decoder` puts both into a decoder.

Tensors only: no loop over tokens, no host sync; all shapes follow from the lengths of prompt and video and the ratio.

Notation: T tokens a prompt, L of them visual, of which K stay and R are folded; M = T - R tokens are left; D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from earlytom.errors import UserError

# Cosines that differ by less count as equal: kernels sum in different orders, so copies of a token differ by rounding.
TIE = 1e-6


class InnerSettings(NamedTuple):
    """Settings of the merging inside a language model.

    Attributes:
        layer: k.
        ratio: share of the visual tokens to remove.
        fold: whether removed tokens are merged into remaining ones; else they are dropped.
        causal: whether layer k-1 stays causal; else every prompt token sees in it what the last one sees. One published
            method loses the mask there, in its released form only.
    """

    layer: int
    ratio: float
    fold: bool = True
    causal: bool = True


@dataclass(frozen=True)
class InnerPlan:
    """A decision about the T tokens of one prompt.

    Attributes:
        kept: [M] int64, positions of all tokens that stay, ascending.
        targets: [K] int64, positions of the visual ones among them, ascending.
        folded: [R] int64, positions of the removed visual tokens, ascending.
        into: [R] int64, index into `targets` of the token that each removed one is folded into.
    """

    kept: Tensor
    targets: Tensor
    folded: Tensor
    into: Tensor

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights of the merged targets, fp32: of the targets themselves [K], and of the folded tokens [K, R].

        Folding i_1 < .. < i_m into h one after the other, each time `h <- (h + h_i) / 2`, leaves `2^-m` of h and
        `2^-(m-l+1)` of i_l: a half for each member from the l-th on.
        """
        member = (self.into == torch.arange(len(self.targets), device=self.into.device)[:, None]).float()  # [K, R]
        counted = member.cumsum(1)
        halvings = counted[:, -1:] - counted + member
        return torch.exp2(-member.sum(1)), member * torch.exp2(-halvings)

    def apply(self, hidden: Tensor, *, fold: bool = True) -> Tensor:
        """Merge `hidden [T, D]` to [M, D]: computed in fp32, returned in the dtype of `hidden`. Without `fold` removed
        tokens are dropped."""
        if not fold:
            return hidden.index_select(0, self.kept)
        own, shares = self.weights()
        merged = own[:, None] * hidden[self.targets].float() + shares @ hidden[self.folded].float()  # [K, D]
        return hidden.index_copy(0, self.targets, merged.to(hidden.dtype)).index_select(0, self.kept)


def plan_inner(hidden: Tensor, received: Tensor, visual: Tensor, keep: int) -> InnerPlan:
    """Decide which visual tokens of one prompt stay, and which of them the others are folded into.

    Args:
        hidden: [T, D] output of layer k-1, any float dtype; similarities (cosines) are computed in fp32.
        received: [T] attention of the last prompt token to each token in layer k-1, mean over heads.
        visual: [L] int64, positions of the visual tokens, ascending.
        keep: K, see `kept_tokens`. Ties go to the lower position.
    """
    tokens = len(visual)
    if hidden.dim() != 2 or received.shape != hidden.shape[:1] or visual.dim() != 1:
        raise UserError(
            "inner merging takes hidden [T, D], received [T] and visual [L], got "
            f"{list(hidden.shape)}, {list(received.shape)} and {list(visual.shape)}"
        )
    if not min(1, tokens) <= keep <= tokens:
        raise UserError(f"of {tokens} visual tokens at least one and at most all can stay, got keep={keep}")
    rank = received[visual].argsort(descending=True, stable=True)
    targets, folded = visual[rank[:keep].sort().values], visual[rank[keep:].sort().values]
    into = folded  # empty, if all stay
    if keep < tokens:
        alike = F.normalize(hidden[folded].float(), dim=-1) @ F.normalize(hidden[targets].float(), dim=-1).T  # [R, K]
        into = (alike >= alike.amax(1, keepdim=True) - TIE).byte().argmax(1)  # the first of the best
    gone = torch.zeros(len(hidden), dtype=torch.uint8, device=hidden.device).index_fill(0, folded, 1)
    # A stable sort, not `nonzero`, which would make the host wait for a number that the shapes tell.
    kept = gone.argsort(stable=True)[: len(hidden) - len(folded)]
    return InnerPlan(kept, targets, folded, into)
