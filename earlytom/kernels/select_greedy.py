"""Stage II of "cells": N diverse tokens taken one after the other, by a single program.

Exactly the outputs of `earlytom.cells.select.select_greedy`: every product, difference and minimum is rounded as there,
ties go to the lower index, -0 equals +0, and NaN is larger than any number. A negative value counts as zero (saliency
has none).

A step depends on the step before by one index only, so latency is all that counts: the program keeps saliency and
distance of all M tokens in registers, finds the largest of M values, and reads one row of `alike`, the similarity of
every token to the one taken. Value and index are compared as one 64-bit number, so that a step has one reduction. Taken
tokens are marked in registers; their indices are written once, in order, at the end.

Cost. It must move 4 M N bytes of `alike`, 4 M of saliency and 8 N of indices. For M = 14 x 196, N = 630 that is 6.9 MB,
read by one multiprocessor: at 64 bytes per clock from L2 (40 MB on an A100, which still holds the 30 MB of `alike` from
the product before) 77 us at 1.41 GHz. A step is no shorter than the latency of such a read, some 200 clocks, or 90 us
in all. With the reduction (5 exchanges between lanes, one between warps through shared memory, two barriers) and 11
values per thread it is an estimated 600 to 700 clocks per step, 0.3 ms in all; none of these figures is measured.
Rounds (`select_rounds`) take M M comparisons each, spread over the whole GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom.errors import UserError
from earlytom.kernels.launch import Launch

MAX_TOKENS = 8192  # 16 values of each kind per thread; twice as many do not fit in registers


@triton.jit
def _key(value):
    """A value as int32 of the same order: negative values and both zeros become 0, NaN the largest."""
    bits = tl.maximum(value, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(value == value, bits, 0x7FFFFFFF)


@triton.jit
def select_greedy_kernel(
    salient,  # fp32 [M]
    alike,  # fp32 [M, M]
    taken,  # int64 [N]
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, M or more
):
    token = tl.arange(0, BLOCK)
    real = token < M
    value = tl.load(salient + token, mask=real, other=0.0)
    far = tl.full([BLOCK], 1.0, tl.float32)
    order = (BLOCK - 1 - token).to(tl.int64)  # ties: the lower index is the larger number
    left = real
    for _ in range(N):
        key = tl.where(left, _key(value * far), -1)
        best = BLOCK - 1 - (tl.max((key.to(tl.int64) << 32) | order, 0) & 0xFFFFFFFF).to(tl.int32)
        row = tl.load(alike + best.to(tl.int64) * M + token, mask=real, other=0.0)
        far = tl.minimum(far, 1.0 - row, propagate_nan=tl.PropagateNan.ALL)
        left = left & (token != best)
    chosen = real & (~left)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(taken + place, token.to(tl.int64), mask=chosen)


def launch(tokens: int, count: int) -> Launch:
    """The kernel's launch to take `count` of `tokens` tokens.

    Raises:
        UserError: `tokens` is not in 1..8192, or `count` not in 1..tokens.
    """
    if not 1 <= tokens <= MAX_TOKENS:
        raise UserError(
            f"greedy selection takes 1 to {MAX_TOKENS} tokens, got {tokens}: choose fewer frames, or select in rounds"
        )
    if not 1 <= count <= tokens:
        raise UserError(f"count must be between 1 and {tokens} (the tokens of the video), got {count}")
    block = triton.next_power_of_2(tokens)
    warps = max(1, block // (16 * 32))  # the fewest that hold all values: more would wait for each other
    return Launch(select_greedy_kernel, (1, 1, 1), {"M": tokens, "N": count, "BLOCK": block}, num_warps=warps)


def select_greedy(salient: Tensor, alike: Tensor, count: int) -> Tensor:
    """Take `count` tokens one after the other.

    Args:
        salient: [M] fp32, 0 or more; alike: [M, M] fp32 in [0, 1].

    Returns:
        [count] int64, ascending.

    Raises:
        UserError: as `launch`, or shapes or dtypes that are not those above.
    """
    tokens = len(salient) if salient.dim() == 1 else 0
    if not tokens or alike.shape != (tokens, tokens) or not salient.dtype == alike.dtype == torch.float32:
        got = " and ".join(f"{x.dtype} {list(x.shape)}" for x in (salient, alike))
        raise UserError(f"saliency must be fp32 [tokens] and likeness fp32 [tokens, tokens], got {got}")
    run = launch(tokens, count)
    taken = torch.empty(count, dtype=torch.int64, device=salient.device)
    run(salient.contiguous(), alike.contiguous(), taken)
    return taken
