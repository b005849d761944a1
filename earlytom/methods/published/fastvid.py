"""FastVID, from the pure functions of `earlytom.fastvid`.

The published method takes scenes and attention from a pooling head; here scenes are cut by the frames' mean tokens, and
attention is that received in the last layer that runs. Notation: F frames, P tokens a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.fastvid import FastVIDSettings, fastvid
from earlytom.method import State
from earlytom.methods.published.compressing import Compressing
from earlytom.numbers import real, whole
from earlytom.scenes import frame_means


@dataclass(frozen=True)
class FastVID(Compressing):
    """See `Compressing` and `FastVIDSettings`. The released form adds noise to densities, seeded by `seed`."""

    name, watches = "fastvid", True
    context: float = 0.4
    least: int = 8
    tau: float = 0.9
    every: int = 4
    weight: float = 0.6
    neighbours: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context", "weight"):
            real(name, getattr(self, name), 0, 1)
        real("tau", self.tau, -1, 1)
        for name in ("least", "every", "neighbours"):
            whole(name, getattr(self, name), 1)
        whole("seed", self.seed, 0)

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        assert relevance is not None  # a layer is watched
        settings = FastVIDSettings(
            self.retention_ratio, self.context, self.least, self.tau, self.every, self.weight, self.neighbours
        )
        noise = None
        if self.faithful:
            drawn = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(self.seed))
            noise = drawn.to(features.device)
        return fastvid(features, relevance, frame_means(features), settings, noise=noise)
