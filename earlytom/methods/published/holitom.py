"""HoliTom: segments that save most tokens; static positions averaged, dynamic ones kept by attention.

Acts after projector and pooling. With `inner_layer` visual tokens are merged again inside the language model, by
`earlytom.inner`. Pure functions: `earlytom.holitom`.

Notation: F frames, P tokens a frame, E LLM width, N tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.holitom.compress import HoliTomSettings, compress
from earlytom.inner import InnerSettings
from earlytom.method import State
from earlytom.methods.published.compressing import Compressing
from earlytom.numbers import real, whole
from earlytom.transfers import to_device


@dataclass(frozen=True)
class HoliTom(Compressing):
    """See `Compressing` and `HoliTomSettings`.

    Attributes:
        tau: a position is unchanged above this cosine; released: 0.65 at a ratio of 0.1, and 0.8 above.
        beta, neighbours, max_window: as in `HoliTomSettings`.
        seed: of noise on densities; None: no noise.
        inner_layer, inner_ratio: as in `EarlyTomConfig`; released: layer 18 of 28. The released form is not causal in
            the layer before it.
    """

    name, watches = "holitom", True
    tau: float = 0.8
    beta: float | None = 0.6
    neighbours: int = 7
    max_window: int = 1024
    seed: int | None = None
    inner_layer: int | None = None
    inner_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        real("tau", self.tau, -1, 1)
        if self.beta is not None:
            real("beta", self.beta, 0, 1)
        whole("neighbours", self.neighbours, 1)
        whole("max_window", self.max_window, 1)
        if self.seed is not None:
            whole("seed", self.seed, 0)
        real("inner_ratio", self.inner_ratio, 0, 1, high_open=True)
        if self.inner_layer is not None:
            whole("inner_layer", self.inner_layer, 1)
            if self.inner_ratio > 0:
                found = InnerSettings(self.inner_layer, self.inner_ratio, causal=not self.faithful)
                object.__setattr__(self, "inner", found)  # of `Method`; the class is frozen

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        assert relevance is not None  # a layer is watched
        settings = HoliTomSettings(
            self.retention_ratio, self.tau, self.beta, self.neighbours, self.max_window, self.faithful
        )
        noise = None
        if self.seed is not None:
            drawn = torch.rand(features.shape[:2].numel(), generator=torch.Generator().manual_seed(self.seed))
            noise = to_device(drawn, features.device)
        chosen = compress(features, relevance, settings, noise=noise)
        return chosen.tokens, chosen.positions
