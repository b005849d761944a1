"""Frame similarity: mean over tokens of the cosine between the same token of two frames, in one pass over the input.

A program takes a few tokens. For each it forms the Gram matrix [F, F] of the F vectors in registers, block by block
along the width; the diagonal holds the norms, and the cosines are summed. So normalising needs no pass of its own and
each element is read once. A second, small kernel adds the programs' sums in a fixed order, takes the mean and rounds it
to the grid of `merge.SIMILARITY_STEPS`.

Cost for F frames of S tokens of width D (F=32, S=729, D=1152, halves), at the published 2.0 TB/s and 312 TFLOP/s of an
A100-80GB, to be replaced by measured ones:

    bytes       2 F S D                   53.7 MB      0.027 ms    FP32: 107 MB, 0.054 ms
    partials    2 * (4 F^2 programs)       2.0 MB      0.001 ms    243 programs, written and read, mostly in L2
    products    2 F^2 S D                  1.7 GFLOP   0.006 ms    FP32, which has no tensor core: 0.09 ms

A plain GEMM of normalised vectors, [F, S D] by [S D, F], gives the same result but is slower: a prologue that
normalises reads and writes x before the GEMM reads it, 3 x 53.7 MB and 0.081 ms; one that keeps only the norms still
reads x twice, 0.054 ms (L2 holds 40 MB, so the second read is not free). With 32 x 32 outputs and a reduction over S D
= 840 thousand, such a GEMM is split along S D anyway, and has the same partial sums.

Tokens per program: as few as let all programs run at once, so that no SM starts a second round. Three programs fit an
SM up to 64 frames, one beyond: 729 tokens are 243 programs of 3 (128 frames: 105 of 7). One token each would be 729
programs, 6 MB of partial sums and a ragged last round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom.errors import UserError
from earlytom.kernels.launch import Launch
from earlytom.merge import SIMILARITY_STEPS

MAX_FRAMES = 128
SMS = 108  # of an A100
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_SMALLEST_NORM = tl.constexpr(1e-6)  # as in merge.frame_similarity
# Adding and subtracting this rounds a number of magnitude below 2^22 to an integer, half to even: near this constant
# fp32 numbers are 1 apart.
_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def partial_kernel(
    hidden,
    partial,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    FRAME_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    TOKENS_EACH: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """partial[p] = sum over the TOKENS_EACH tokens of program p of the cosines between frames, fp32 [FRAMES, FRAMES].

    Tokens and blocks of the width are one loop, so that loads of the next token overlap the end of the current one.
    """
    program = tl.program_id(0)
    frame = tl.arange(0, BLOCK_F)
    entry = tl.arange(0, BLOCK_D)
    eye = (frame[:, None] == frame[None, :]).to(tl.float32)
    vectors = hidden + frame.to(tl.int64)[:, None] * FRAME_STRIDE + entry[None, :]

    cosines = tl.zeros([BLOCK_F, BLOCK_F], tl.float32)
    gram = tl.zeros([BLOCK_F, BLOCK_F], tl.float32)
    for step in range(TOKENS_EACH * BLOCKS):
        token = program * TOKENS_EACH + step // BLOCKS
        first = step % BLOCKS * BLOCK_D
        left = tl.where(token < TOKENS, WIDTH - first, 0)  # tokens past the end are zero, and add cosines of zero
        inside = (frame < FRAMES)[:, None] & (entry < left)[None, :]
        x = tl.load(vectors + token.to(tl.int64) * TOKEN_STRIDE + first, mask=inside, other=0.0)
        gram = tl.dot(x, tl.trans(x), gram, input_precision="ieee")
        if first + BLOCK_D >= WIDTH:
            norm = tl.sqrt_rn(tl.sum(gram * eye, 1))
            inverse = tl.div_rn(1.0, tl.where(norm < _SMALLEST_NORM, _SMALLEST_NORM, norm))  # tl.maximum drops a NaN
            cosines += gram * (inverse[:, None] * inverse[None, :])  # in brackets, which keeps the matrix symmetric
            gram = tl.zeros([BLOCK_F, BLOCK_F], tl.float32)
    out = partial + program * FRAMES * FRAMES + frame[:, None] * FRAMES + frame[None, :]
    tl.store(out, cosines, mask=(frame < FRAMES)[:, None] & (frame < FRAMES)[None, :])


@triton.jit
def mean_kernel(
    partial,
    similarity,
    PROGRAMS: tl.constexpr,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """similarity [ENTRIES] = sum of `partial [PROGRAMS, ENTRIES]` over programs / TOKENS, in multiples of 1 / STEPS."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for first in range(0, PROGRAMS, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        inside = (program < PROGRAMS)[:, None] & (entry < ENTRIES)[None, :]
        total += tl.load(partial + program[:, None] * ENTRIES + entry[None, :], mask=inside, other=0.0)
    mean = tl.div_rn(tl.sum(total, 0), TOKENS * 1.0)
    steps = (mean * STEPS + _TO_INTEGER) - _TO_INTEGER
    tl.store(similarity + entry, steps * (1 / STEPS), mask=entry < ENTRIES)


def launches(hidden: Tensor) -> tuple[Launch, Launch]:
    """The launches of the two kernels, from shape, strides and dtype of `hidden [F, S, D]`."""
    frames, tokens, width = hidden.shape
    block_f = max(16, triton.next_power_of_2(frames))
    large = block_f > 64
    # Tiles of 2 to 16 KB, three of them in flight. fp32 does not run on tensor cores: a thread holds its operands for
    # the whole of BLOCK_D in registers, beside its sums.
    if hidden.dtype == torch.float32:
        block_d, warps = (16 if large else 32), (8 if block_f >= 64 else 4)
    else:
        block_d, warps = (64, 8) if large else (128, 4)
    beside = 1 if large else 3  # concurrent programs per SM
    tokens_each = triton.cdiv(tokens, SMS * beside)
    programs = triton.cdiv(tokens, tokens_each)
    partial = Launch(
        partial_kernel,
        (programs, 1, 1),
        {
            "FRAMES": frames,
            "TOKENS": tokens,
            "WIDTH": width,
            "FRAME_STRIDE": hidden.stride(0),
            "TOKEN_STRIDE": hidden.stride(1),
            "TOKENS_EACH": tokens_each,
            "BLOCK_F": block_f,
            "BLOCK_D": block_d,
            "BLOCKS": triton.cdiv(width, block_d),
        },
        num_warps=warps,
        num_stages=4,
    )
    block = 32
    mean = Launch(
        mean_kernel,
        (triton.cdiv(frames * frames, block), 1, 1),
        {
            "PROGRAMS": programs,
            "ENTRIES": frames * frames,
            "TOKENS": tokens,
            "STEPS": SIMILARITY_STEPS,
            "BLOCK_P": min(256, triton.next_power_of_2(programs)),
            "BLOCK": block,
        },
    )
    return partial, mean


def frame_similarity(hidden: Tensor) -> Tensor:
    """The same as `merge.frame_similarity`, up to the last bits of its sums.

    Args:
        hidden: [F, S, D] fp16, bf16 or fp32, of any strides: a slice without class tokens is read in place. Copied
            only where the last dimension is not contiguous.

    Returns:
        [F, F] fp32, symmetric, on the grid of `merge.SIMILARITY_STEPS`. All NaN if an input is NaN or infinite.

    Raises:
        UserError: another shape or dtype, or more than `MAX_FRAMES` frames: a program holds two [F, F] in registers.
    """
    if hidden.dim() != 3 or not 1 <= hidden.shape[0] <= MAX_FRAMES or hidden.dtype not in DTYPES:
        raise UserError(
            f"hidden states must be [frames, tokens, width] of fp16, bf16 or fp32 with 1 to {MAX_FRAMES} frames, "
            f"got {hidden.dtype} {list(hidden.shape)}"
        )
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
        hidden = hidden.float()  # Triton's interpreter multiplies the bits of bf16 as integers
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    add, mean = launches(hidden)
    frames = hidden.shape[0]
    partial = torch.empty(add.grid[0], frames, frames, dtype=torch.float32, device=hidden.device)
    similarity = torch.empty(frames, frames, dtype=torch.float32, device=hidden.device)
    add(hidden, partial)
    mean(partial, similarity)
    return similarity
