"""How the next token is picked from the decoder's logits: greedily, or drawn with temperature, top-k and top-p.

Knows tensors only. Nothing here waits for the device: the id stays there until somebody reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.numbers import real, whole

MIN_TEMPERATURE = 1e-6  # smaller ones are greedy in float32, or zero
_HOTTEST = 1e30  # all are alike then; larger ones are infinite in float32, and an id that is ruled out would be NaN


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. Filters apply in this order, as in transformers.

    Attributes:
        temperature: divides the logits; 0 is greedy, and the rest has no effect then.
        top_k: keep the k most likely tokens (and their ties); 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum, at least one; 1 keeps all.
        seed: the same seed gives the same tokens on the same device; None takes a new one each time.

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
            object.__setattr__(self, name, value)  # plain numbers, whatever kind came

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


class Picker:
    """Picks one id from logits [V] without waiting for the device: int64 [], -1 if the logits are not finite."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._generator: torch.Generator | None = None
        if not sampling.greedy:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        return self._generator is None

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        if self._generator is None:
            return pick_best(logits)
        logits = logits.float()
        # Gumbel-max: argmax(logits - log E), E exponential, follows softmax(logits) and needs no probabilities.
        noise = torch.empty_like(logits).exponential_(generator=self._generator).clamp_min_(1e-30)
        chosen = (filter_logits(logits, self._sampling) - noise.log_()).argmax()
        return _or_none(chosen, logits)


def pick_best(logits: Tensor) -> Tensor:
    """The most likely id of logits [V]: int64 [], -1 if the logits are not finite."""
    return _or_none(logits.argmax(), logits)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits float32 [V] after temperature, top-k and top-p: `softmax` of the result is what is sampled from.

    `sampling` must not be greedy.
    """
    heat = min(sampling.temperature, _HOTTEST)
    logits = (logits - logits.max()) / heat  # the best one is 0, so that none grows to infinity
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ranked, order = logits.sort(descending=True)
        shares = ranked.softmax(-1)
        before = shares.cumsum(-1) - shares  # what the more likely tokens have; 0 for the first, which always stays
        late = before >= sampling.top_p
        late[:1].fill_(False)  # in fp32 a sum that is tiny is 0, which is "reached" by nothing
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, late)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def _or_none(chosen: Tensor, logits: Tensor) -> Tensor:
    """The id, or -1 if a logit is NaN or infinite, or all are minus infinity."""
    # By the largest value, which is NaN if one is: `logits[chosen]` would ask the device for the index, and wait.
    return chosen.masked_fill(~torch.isfinite(logits.max()), -1)
