"""Picks the next token from the decoder's logits: greedily, or drawn with temperature, top-k and top-p.

Knows tensors only. Nothing here waits for the device: the id stays there until somebody reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.decoder.sampling import Sampling

_HOTTEST = 1e30  # all are alike then; larger ones are infinite in float32, and an id that is ruled out would be NaN


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
    scaled = (logits - logits.max()) / heat  # the best one is 0, so that none grows to infinity
    if 0 < sampling.top_k < scaled.shape[-1]:
        smallest = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    if sampling.top_p < 1:
        order = logits.sort(descending=True).indices  # as they were: in great heat the best is one of many that tie
        shares = scaled.gather(-1, order).softmax(-1)
        before = shares.cumsum(-1) - shares  # what the more likely tokens have; 0 for the first, which always stays
        late = before >= sampling.top_p
        late[:1].fill_(False)  # in fp32 a sum that is tiny is 0, which is "reached" by nothing
        drop = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, order, late)
        scaled = scaled.masked_fill(drop, -torch.inf)
    return scaled


def _or_none(chosen: Tensor, logits: Tensor) -> Tensor:
    """The id, or -1 if a logit is NaN or infinite, or all are minus infinity."""
    # By the largest value, which is NaN if one is: `logits[chosen]` would ask the device for the index, and wait.
    return chosen.masked_fill(~torch.isfinite(logits.max()), -1)
