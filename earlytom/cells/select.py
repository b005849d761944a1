"""Stage II of "cells": selects tokens that are salient and unlike each other.

Greedy selection takes the best token, lowers the value of all that resemble it, takes the next best, and so on
(`select_greedy`). In rounds many are taken at a time, each candidate's value being lowered by better ones of the round
(`select_rounds`); with as many rounds as tokens the result is the same. Removed tokens still count for the decoder:
each adds to the bias of the taken one that it resembles most (`earlytom.standing`).

All decisions are taken in fp32 from `saliency [M]` and `likeness [M, M]`; ties go to the lower index on every backend,
as nothing here relies on the order in which a top-k operator returns equal values. Nothing waits for the device.

Notation: M = F' P tokens of a video after projector and pooling, N of them taken, E LLM width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from earlytom.cells.merge import unit
from earlytom.errors import UserError
from earlytom.standing import owned_sizes


def saliency(features: Tensor) -> Tensor:
    """1 - cosine of each token with the mean of all, `features [M, E]` to [M] fp32, at least 0."""
    x = features.float()
    return (1 - (unit(x) * unit(x.mean(0))).sum(-1)).clamp_min(0)


def affinity(features: Tensor, time: Tensor, frames: int) -> Tensor:
    """Similarity of tokens, decaying with their distance in time, [M, M] fp32, from -1 to 1.

    Args:
        features: [M, E]; time: [M] fp32, the frame of the video that each shows; frames: of the video.
    """
    x = features.float()
    away = unit(x - x.mean(0))
    apart = (time[:, None] - time).abs()
    return (away @ away.T) * torch.exp(apart / -frames)


def likeness(affine: Tensor) -> Tensor:
    """The share of its value that a token loses when another is taken, [M, M], 0 to 1."""
    return affine.clamp(0, 1)


def check_count(tokens: int, count: int) -> None:
    """Raise UserError unless `count` of `tokens` tokens can be taken."""
    if not 1 <= count <= tokens:
        raise UserError(f"count must be between 1 and {tokens} (the tokens of the video), got {count}")


def select_greedy(salient: Tensor, alike: Tensor, count: int) -> Tensor:
    """Take `count` tokens one after the other.

    Args:
        salient: [M] fp32, 0 or more; alike: [M, M] fp32 in [0, 1].

    Returns:
        [count] int64, ascending.
    """
    check_count(len(salient), count)
    far = torch.ones_like(salient)
    left = torch.ones_like(salient, dtype=torch.bool)
    for _ in range(count):
        best = torch.where(left, salient * far, -1.0).argmax(keepdim=True)  # ties to the first
        left.index_fill_(0, best, False)
        far = torch.minimum(far, 1 - alike.index_select(0, best)[0])
    return _places(~left, count)


def round_sizes(count: int, rounds: int) -> list[int]:
    """How many tokens each round takes: after each as many as its share of all, rounded up; no round is empty."""
    rounds = min(rounds, count)
    ends = [-(-count * done // rounds) for done in range(rounds + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def select_rounds(salient: Tensor, alike: Tensor, count: int, rounds: int) -> Tensor:
    """Take `count` tokens in `rounds` rounds; other arguments and the result as in `select_greedy`."""
    check_count(len(salient), count)
    far = torch.ones_like(salient)
    taken = torch.zeros_like(salient, dtype=torch.bool)
    for size in round_sizes(count, rounds):
        value = torch.where(taken, -1.0, salient * far)
        place = _best_first(value).argsort()  # how many go before each
        crowd = torch.where(place[:, None] < place, alike, 0).amax(0)  # how much the better ones resemble each
        value = torch.where(taken, -1.0, value * (1 - crowd))
        chosen = _best_first(value)[:size]
        taken = taken.index_fill(0, chosen, True)
        far = torch.minimum(far, 1 - alike.index_select(0, chosen).amax(0))
    return _places(taken, count)


def _best_first(value: Tensor) -> Tensor:
    """[M] int64: the indices by falling value, ties to the lower index."""
    return value.argsort(descending=True, stable=True)


def _places(taken: Tensor, count: int) -> Tensor:
    """The indices of the `count` true values of `taken [M]`, ascending, without waiting for how many there are."""
    return torch.argsort(~taken, stable=True)[:count]


def token_sizes(affine: Tensor, size: Tensor, taken: Tensor) -> Tensor:
    """The size that each taken token stands for: the sum over the tokens that resemble it most, itself included.

    Args:
        affine: [M, M] fp32; size: [M] fp32; taken: [N] int64.

    Returns:
        [N] fp32; they add up to the sum of the sizes.
    """
    return owned_sizes(affine.index_select(1, taken).T, size)
