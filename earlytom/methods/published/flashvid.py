"""FlashVID after its description, from the pure functions of `earlytom.flashvid`.

The released form passes a quarter more tokens than the ratio to the language model and prunes them inside it; that
second step is not implemented. The default passes the ratio's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from earlytom.flashvid import FlashVIDSettings, flashvid
from earlytom.method import State
from earlytom.methods.published.compressing import Compressing
from earlytom.numbers import real, whole

EXPANSION = 1.25


@dataclass(frozen=True)
class FlashVID(Compressing):
    """See `Compressing` and `FlashVIDSettings`."""

    name, watches = "flashvid", True
    diverse: float = 0.7
    least: int = 8
    tau: float = 0.9
    linked: float = 0.8
    neighbours: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        real("diverse", self.diverse, 0, 1)
        for name in ("tau", "linked"):
            real(name, getattr(self, name), -1, 1)
        for name in ("least", "neighbours"):
            whole(name, getattr(self, name), 1)

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        assert relevance is not None  # a layer is watched
        expansion = EXPANSION if self.faithful else 1.0
        settings = FlashVIDSettings(
            self.retention_ratio, expansion, self.diverse, self.least, self.tau, self.linked, self.neighbours
        )
        return flashvid(features, relevance, settings)
