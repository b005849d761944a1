"""Sampling parameters; `runtime.decoder.picking` applies them. Needs no PyTorch, so a command line can check them."""

from __future__ import annotations

from dataclasses import dataclass

from earlytom.errors import UserError
from earlytom.numbers import real, whole

MIN_TEMPERATURE = 1e-6  # smaller ones are greedy in float32, or zero


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Filters apply in this order, as in transformers.

    Attributes:
        temperature: divides the logits; 0 is greedy, and the others then have no effect.
        top_k: keep the k most likely tokens (and their ties); 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum, at least one; 1 keeps all.
        seed: the same seed gives the same tokens on the same device; None: a new one each time.

    Raises:
        UserError: a value that is no number, or out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature = real("temperature (--temperature)", self.temperature, 0)
        if 0 < temperature < MIN_TEMPERATURE:
            raise UserError(f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature}")
        top_p = real("top_p (--top-p)", self.top_p, 0, 1, low_open=True)
        top_k = whole("top_k (--top-k)", self.top_k, 0)
        seed = None if self.seed is None else whole("seed (--seed)", self.seed, 0, 2**63 - 1)
        for name, value in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k), ("seed", seed)):
            object.__setattr__(self, name, value)  # as plain Python numbers

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()
