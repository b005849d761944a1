"""VQToken's core: a video's tokens in K clusters, and one token for each. It needs no training.

Acts after projector and pooling (as published before pooling, where there are more tokens but the same clusters). As
published the codes are means of unit vectors in random order, which only a model tuned for them can read: that is the
`faithful` form. The default takes means of the tokens as they are, in the order in time of the member nearest to each
mean, whose place the token takes. A few dozen tokens for a video are a summary of its scenes; above about 64 clusters
it is outside the method, as seeds are drawn one after the other.

Pure functions: `earlytom.vqtoken`. Notation: F frames, P tokens a frame, E LLM width, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from earlytom.config import one_of
from earlytom.errors import UserError
from earlytom.method import Counts, State
from earlytom.methods.published.compressing import Compressing
from earlytom.numbers import whole
from earlytom.transfers import to_device
from earlytom.vqtoken.codebook import (
    LEAST,
    Fit,
    cluster_sums,
    codebook,
    directions,
    draws_needed,
    fit_adaptive,
    fit_seeded,
    medoids,
)


@dataclass(frozen=True)
class VQToken(Compressing):
    """See `Compressing`; without `clusters` there are `round(ratio * F * P)`.

    Attributes:
        clusters: K; "adaptive" lets the bend of the curve decide, from 12 to `most`.
        most: of an adaptive choice.
        seed: of the draws.
    """

    name = "vqtoken"
    clusters: int | Literal["adaptive"] | None = None
    most: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.clusters, str):
            one_of("clusters", self.clusters, ("adaptive",))
        elif self.clusters is not None:
            whole("clusters", self.clusters, 1)
        whole("most", self.most, LEAST + 2)
        whole("seed", self.seed, 0)

    def counts(self, frames: int, tokens_per_frame: int) -> Counts | None:
        if self.clusters == "adaptive":
            return None
        return Counts((frames,), self._clusters(frames * tokens_per_frame))

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        tokens = features.flatten(0, 1)
        unit = directions(tokens)
        found = self._fit(unit)
        places = medoids(unit, found)
        if self.faithful:
            return codebook(unit, found).to(features.dtype), places
        total, members = cluster_sums(tokens, found.labels, len(places))
        single = tokens.index_select(0, places).float()  # of a cluster that nothing belongs to
        means = torch.where(members[:, None] > 0, total / members[:, None].clamp_min(1), single)
        order = places.argsort(stable=True)
        return means.index_select(0, order).to(features.dtype), places.index_select(0, order)

    def _fit(self, unit: Tensor) -> Fit:
        adaptive = self.clusters == "adaptive"
        count = draws_needed(self.most) if adaptive else self._clusters(len(unit))
        drawn = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))
        uniforms = to_device(drawn, unit.device)
        if not adaptive:
            return fit_seeded(unit, uniforms)
        if len(unit) < self.most:
            raise UserError(f"{len(unit)} tokens make no choice of up to {self.most} clusters: lower most")
        return fit_adaptive(unit, uniforms, self.most, "released" if self.faithful else "intended")[-1]

    def _clusters(self, tokens: int) -> int:
        wanted = self.clusters if isinstance(self.clusters, int) else round(self.retention_ratio * tokens)
        return min(max(1, wanted), tokens)
