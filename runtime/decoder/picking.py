"""Picks the next token from the decoder's logits: greedily, or sampled with temperature, top-k and top-p.

Tensors only. Nothing here waits for the device: the id stays there until it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.decoder.sampling import Sampling

_HOTTEST = 1e30  # uniform already; larger temperatures are infinite in float32, and would make filtered ids NaN


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
    """Logits float32 [V] after temperature, top-k and top-p; sampling is from their `softmax`.

    `sampling` must not be greedy.
    """
    heat = min(sampling.temperature, _HOTTEST)
    scaled = (logits - logits.max()) / heat  # the largest is 0, so that none overflows
    if 0 < sampling.top_k < scaled.shape[-1]:
        smallest = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    if sampling.top_p < 1:
        order = logits.sort(descending=True).indices  # of the unscaled logits: a high temperature makes ties
        shares = scaled.gather(-1, order).softmax(-1)
        before = shares.cumsum(-1) - shares  # probability of all more likely tokens
        late = before >= sampling.top_p
        late[:1].fill_(False)  # the first always stays, also for a tiny top_p that is 0 in fp32
        drop = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, order, late)
        scaled = scaled.masked_fill(drop, -torch.inf)
    return scaled


def _or_none(chosen: Tensor, logits: Tensor) -> Tensor:
    """The id, or -1 if a logit is NaN or infinite, or all are minus infinity."""
    # max() is NaN if any logit is; indexing by `chosen` would wait for the device.
    return chosen.masked_fill(~torch.isfinite(logits.max()), -1)
