"""VQToken's core, which needs no training: k-means of a video's tokens, one token for each of K clusters.

Acts after projector and pooling (published: before pooling, on more tokens but as many clusters). In the `faithful`
form, as published, codes are means of unit vectors in random order, which only a fine-tuned model can read. By default
a code is the mean of the tokens themselves, at the place of the member nearest to the cluster's mean direction, and
codes are ordered by place. The method is meant for a few dozen tokens a video; above about 64 clusters it is slow, as
seeds are drawn one by one.

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
    """See `Compressing`; without `clusters` K is `round(ratio * F * P)`.

    Attributes:
        clusters: K; "adaptive" chooses it at the elbow of the k-means loss, below `most`.
        most: the most clusters that "adaptive" tries.
        seed: of the random generator.
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
        single = tokens.index_select(0, places).float()  # for an empty cluster
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
