"""The compression's share of the encoder's time, measured.

Similarities, plans and selection are timed in place. Two parts are no separate steps of the encoder, so they run once
more to be timed: the merging of hidden states, and the layer of received attention, with and without returning it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from earlytom.config import EarlyTomConfig
from earlytom.encoder import encode
from earlytom.families import family_of
from earlytom.merge import apply_weights
from earlytom.methods.earlytom import EarlyTom
from runtime.measure.clock import median, timed
from runtime.measure.variants import Bench


class _Clock:
    """Adds up the compression's seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0  # of the compression
        self.twice = 0.0  # of runs made only for timing

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        return timed(self._device, call)

    def add(self, call: Callable[[], Any]) -> Any:
        out, seconds = self.time(call)
        self.seconds += seconds
        return out


class _TimedEarlyTom(EarlyTom):
    def __init__(self, config: EarlyTomConfig, clock: _Clock) -> None:
        super().__init__(config)
        self._clock = clock
        self._hidden: Tensor | None = None

    def similarity(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden
        return self._clock.add(lambda: super(_TimedEarlyTom, self).similarity(hidden))

    def plan(self, similarity: Tensor, frames_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        plan = self._clock.add(lambda: super(_TimedEarlyTom, self).plan(similarity, frames_out))
        hidden = self._hidden
        if hidden is not None and plan[0].shape[0] < len(hidden):  # the last plan is about segments and merges nothing
            _, seconds = self._clock.time(lambda: apply_weights(plan[0], hidden))
            self._clock.seconds += seconds
            self._clock.twice += seconds
        return plan

    def select(self, *given: Any) -> tuple[Tensor, Tensor]:
        return self._clock.add(lambda: super(_TimedEarlyTom, self).select(*given))

    def select_varying(self, *given: Any) -> tuple[Tensor, Tensor]:
        return self._clock.add(lambda: super(_TimedEarlyTom, self).select_varying(*given))


class _TimedTower:
    """A tower that adds the extra time of returning received attention."""

    def __init__(self, tower: Any, clock: _Clock) -> None:
        self._tower, self._clock = tower, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)

    def run_layer(self, layer: Any, hidden: Tensor, *, receive: bool = False) -> tuple[Tensor, Tensor | None]:
        if not receive:
            return self._tower.run_layer(layer, hidden)
        _, plain = self._clock.time(lambda: self._tower.run_layer(layer, hidden))
        out, seconds = self._clock.time(lambda: self._tower.run_layer(layer, hidden, receive=True))
        self._clock.seconds += seconds - plain
        self._clock.twice += plain
        return out


def compression_share(bench: Bench, config: EarlyTomConfig, pixels: Tensor, repeats: int) -> float:
    """The compression's share of the encoder's time on `pixels [F, 3, H, W]`: median over `repeats` calls after one
    warm-up."""
    found = []
    for _ in range(repeats + 1):
        clock = _Clock(bench.device)
        vision = family_of(bench.checkpoint.config).vision_of(bench.inner)
        timed: Any = _TimedTower(vision.tower, clock)
        vision.tower = timed
        given = (vision, pixels, _TimedEarlyTom(config, clock))
        _, whole = clock.time(functools.partial(encode, *given, depth=bench.depth))
        found.append(clock.seconds / (whole - clock.twice))
    return median(found[1:])
