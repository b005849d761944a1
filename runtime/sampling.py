"""How the next token is picked: what a caller may choose. `runtime.picking` does it.

Values only, so that a command line checks them without PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from earlytom.errors import UserError

MIN_TEMPERATURE = 1e-6  # smaller ones are greedy in float32, or zero


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. Filters apply in this order, as in transformers.

    Attributes:
        temperature: divides the logits; 0 is greedy, and the rest has no effect then.
        top_k: keep the k most likely tokens (and their ties); 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum, at least one; 1 keeps all.
        seed: the same seed gives the same tokens on the same device; None takes a new one each time.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(f"the temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (off) or more, got {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"the seed must be in [0, 2**63), got {self.seed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()
