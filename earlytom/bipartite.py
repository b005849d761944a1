"""Bipartite merging (ToMe's): the tokens of a list are split alternately into two sets, and those of the first with the
best matches in the second are merged into them. Several comparison methods use it.

`match` decides, and `Matching.merge` applies the decision to any values that tokens have. Merging is a product with a
one-hot matrix rather than a scatter: deterministic, and an operator that engines have. There is no host sync; all
shapes depend on token counts only.

Notation: B lists, n tokens a list, the first c of them protected, r merged, a and b tokens in the two sets, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.ranking import best, largest, slots


@dataclass(frozen=True)
class Matching:
    """A decision about n tokens of each of B lists, of which n - r are left: the protected ones, the rest of the first
    set, the second set.

    Attributes:
        tokens: n; protected: c.
        source: [B, r] int64, indices into the first set of the tokens that are merged, ascending.
        target: [B, r] int64, indices into the second set of the tokens that they are merged into.
        stays: [B, a - r] int64, indices into the first set of the tokens that are not merged, in the result's order.
    """

    tokens: int
    protected: int
    source: Tensor
    target: Tensor
    stays: Tensor

    @property
    def merged(self) -> int:
        """r."""
        return self.source.shape[-1]

    def total(self, values: Tensor) -> Tensor:
        """Sums over merged tokens: `values [B, n, D]` to [B, n - r, D], in their dtype."""
        first, second = sides(values, self.protected)
        kept, gone = (first.gather(1, _wide(which, values)) for which in (self.stays, self.source))
        index = torch.arange(second.shape[1], device=values.device)
        into = (self.target[:, None] == index[:, None]).to(values.dtype)  # [B, b, r]
        return torch.cat([values[:, : self.protected], kept, second + into @ gone], 1)

    def merge(self, values: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Means weighted by size: `values [B, n, D]` and `size [B, n]` to those of n - r tokens; sizes are summed."""
        added = self.total(size[..., None])
        return self.total(values * size[..., None]) / added, added[..., 0]

    def places(self, place: Tensor) -> Tensor:
        """`place [B, n]` to [B, n - r]: a token into which others are merged keeps its place."""
        first, second = sides(place, self.protected)
        return torch.cat([place[:, : self.protected], first.gather(1, self.stays), second], 1)

    def owner(self) -> Tensor:
        """The token that each token has become, [B, n] int64: an index into the n - r that are left."""
        c, lists = self.protected, len(self.source)
        first, second = set_sizes(self.tokens, c)
        device = self.source.device
        place = torch.arange(self.stays.shape[-1], device=device).expand(lists, -1)
        of_first = torch.zeros(lists, first, dtype=torch.int64, device=device).scatter(1, self.stays, c + place)
        of_first = of_first.scatter(1, self.source, c + first - self.merged + self.target)
        of_second = (c + first - self.merged + torch.arange(second, device=device)).expand(lists, -1)
        whole = torch.arange(self.tokens, device=device).repeat(lists, 1)
        whole[:, c + c % 2 :: 2] = of_first
        whole[:, c + 1 - c % 2 :: 2] = of_second
        return whole


def sides(values: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """The two sets of `values [B, n, ...]`: unprotected tokens at even places of the list, and those at odd ones."""
    odd = protected % 2
    return values[:, protected + odd :: 2], values[:, protected + 1 - odd :: 2]


def set_sizes(tokens: int, protected: int) -> tuple[int, int]:
    """Numbers of tokens of the two sets."""
    free = tokens - protected
    first = free // 2 if protected % 2 else (free + 1) // 2
    return first, free - first


def match(metric: Tensor, merged: int, *, protected: int = 0, listed_by_similarity: bool = False) -> Matching:
    """Decide which `merged` tokens of the first set are merged into which of the second.

    Each token's match is the most similar one (cosine) of the second set. The tokens of the most similar matches are
    merged; of equal ones the first.

    Args:
        metric: [B, n, d], any float dtype; compared in fp32.
        protected: number of tokens at the front of the list that take no part.
        listed_by_similarity: whether unmerged tokens are ordered by falling similarity, rather than by place.
    """
    tokens = metric.shape[1]
    first, second = set_sizes(tokens, protected)
    if not 0 <= merged <= first or (merged and not second):
        raise UserError(f"of {tokens} tokens, {protected} protected, at most {min(first, second)} merge, got {merged}")
    direction = metric.float()
    direction = direction / direction.norm(dim=-1, keepdim=True)
    one, other = sides(direction, protected)
    if not merged:
        none = torch.empty(len(metric), 0, dtype=torch.int64, device=metric.device)
        stays = torch.arange(first, device=metric.device).expand(len(metric), -1)
        return Matching(tokens, protected, none, none, stays)
    alike = one @ other.transpose(1, 2)
    found = alike.amax(-1)
    goes = best(found, merged)
    source = slots(goes, merged)
    if listed_by_similarity:
        stays = found.argsort(dim=-1, descending=True, stable=True)[:, merged:]
    else:
        stays = slots(~goes, first - merged)
    return Matching(tokens, protected, source, largest(alike).gather(1, source), stays)


@dataclass(frozen=True)
class Reduced:
    """Lists that were merged to fewer tokens.

    Attributes:
        values: [B, m, D]; size: [B, m] fp32, the number of tokens merged into each.
        place: [B, m] int64, each one's place among the n tokens: that of the token others were merged into.
    """

    values: Tensor
    size: Tensor
    place: Tensor


def reduce(
    values: Tensor,
    target: int,
    *,
    metric: Tensor | None = None,
    protected: int = 0,
    forgetful: bool = False,
    listed_by_similarity: bool = False,
) -> Reduced:
    """Merge `values [B, n, D]` to [B, min(n, target), D]; each step but the last merges as many as it can.

    Args:
        metric: [B, n, d], compared by cosine and merged as the values are; default: the values.
        forgetful: means are unweighted, so a token merged in an earlier step counts as one.
        protected, listed_by_similarity: as in `match`.
    """
    lists, tokens, _ = values.shape
    if target <= protected:
        raise UserError(f"at least {protected + 1} of {tokens} tokens are left, got a target of {target}")
    size = torch.ones(lists, tokens, device=values.device)
    place = torch.arange(tokens, device=values.device).expand(lists, -1)
    dtype, values = values.dtype, values.float()
    metric = None if metric is None else metric.float()
    while (tokens := values.shape[1]) > target:
        half, left = (tokens - protected) // 2, tokens - target
        step = half if half > target - protected else left
        step = min(step, set_sizes(tokens, protected)[0])
        found = match(
            values if metric is None else metric, step, protected=protected, listed_by_similarity=listed_by_similarity
        )
        counted = torch.ones_like(size) if forgetful else size
        place, size = found.places(place), found.total(size[..., None])[..., 0]
        values = found.merge(values, counted)[0]
        metric = None if metric is None else found.merge(metric, counted)[0]
    return Reduced(values.to(dtype), size, place)


def _wide(index: Tensor, values: Tensor) -> Tensor:
    """[B, k] to [B, k, D], for a gather of `values [B, n, D]`."""
    return index[..., None].expand(-1, -1, values.shape[-1])
