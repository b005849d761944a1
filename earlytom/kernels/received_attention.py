"""Received attention: the mean attention each token receives within its frame, without storing the attention matrix.

`received[f, k]` is the mean over heads h and queries q of `softmax(scale * Q K^T)[f, h, q, k]`. A softmax row needs all
its logits, so the logits are computed twice: once for the logarithm of each row's sum (online softmax), once to add up
columns. Each pass keeps one tile of logits in registers. Every output is written by one program, which adds in a fixed
order: no atomics, so results are reproducible bit for bit.

Cost for F frames of T tokens, H heads of d (F=32, T=729, H=16, d=72, halves), at the published figures of an A100-80GB
(2.0 TB/s, 312 TFLOP/s dense, 16 exponentials a clock for each of 108 SMs at 1.41 GHz), to be replaced by measured ones:

    bytes          8 F T H d      215 MB        0.11 ms    Q and K, in each pass: its L2 holds 40 MB of their 107
    products       4 F H T^2 d    78 GFLOP      0.25 ms    0.28 ms with the 80 columns that are multiplied
    exponentials   2 F H T^2      544 million   0.22 ms

So it is bound by the tensor cores, at 0.25 ms, and exponentials can overlap. Between the passes 4 F H T = 1.5 MB are
kept; the matrix itself would be 1.1 GB.

A head whose width is no power of two is covered by two blocks if that is narrower: 72 by 64 + 16 = 80 columns instead
of 128, which would take 0.45 ms.

A row's sum is stored as an fp32 logarithm. For logits around 1e4 its last bit is 2^-10, a relative error of up to 4e-4
of the weights, no more than from rounding the logits; below 100 it is 6e-6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom.errors import UserError
from earlytom.kernels.launch import Launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _vectors(starts, inside, FIRST: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Entries FIRST .. FIRST + BLOCK of the vectors at `starts`: zero past HEAD_DIM and where `inside` is not set."""
    entry = FIRST + tl.arange(0, BLOCK)
    return tl.load(starts[:, None] + entry[None, :], mask=inside[:, None] & (entry < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def row_kernel(
    query,
    key,
    normaliser,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_FRAME: tl.constexpr,
    QUERY_HEAD: tl.constexpr,
    QUERY_TOKEN: tl.constexpr,
    KEY_FRAME: tl.constexpr,
    KEY_HEAD: tl.constexpr,
    KEY_TOKEN: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """normaliser[f, h, q] = -log2(sum over k of 2^(SCALE * q.k)), fp32 [F, H, PADDED], -inf for q >= TOKENS.

    A program is a block of queries of one head of one frame.
    """
    frame, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = query + frame * QUERY_FRAME + head * QUERY_HEAD + row * QUERY_TOKEN
    q = _vectors(queries, row < TOKENS, 0, BLOCK_D, HEAD_DIM)
    if BLOCK_TAIL:
        q_tail = _vectors(queries, row < TOKENS, BLOCK_D, BLOCK_TAIL, HEAD_DIM)

    column = tl.arange(0, BLOCK_K)
    keys = key + frame * KEY_FRAME + head * KEY_HEAD + column * KEY_TOKEN
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(0, TOKENS, BLOCK_K):
        inside = column < TOKENS - first
        k = _vectors(keys, inside, 0, BLOCK_D, HEAD_DIM)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
        if BLOCK_TAIL:
            k_tail = _vectors(keys, inside, BLOCK_D, BLOCK_TAIL, HEAD_DIM)
            logits = tl.dot(q_tail, tl.trans(k_tail), logits, input_precision="ieee")
        logits = tl.where(inside[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1) * SCALE)
        total *= tl.exp2(largest - larger)
        total += tl.sum(tl.exp2(tl.fma(logits, SCALE, -larger[:, None])), 1)
        largest = larger
        keys += BLOCK_K * KEY_TOKEN
    log_share = tl.where(row < TOKENS, -largest - tl.log2(total), float("-inf"))
    tl.store(normaliser + (frame * HEADS + head) * PADDED + row, log_share)


@triton.jit
def column_kernel(
    query,
    key,
    normaliser,
    received,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_FRAME: tl.constexpr,
    QUERY_HEAD: tl.constexpr,
    QUERY_TOKEN: tl.constexpr,
    KEY_FRAME: tl.constexpr,
    KEY_HEAD: tl.constexpr,
    KEY_TOKEN: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """received[f, k] = mean over h and q of 2^(SCALE * q.k + normaliser[f, h, q]), fp32 [F, TOKENS].

    A program takes a block of keys of one frame, for all heads and queries. Keys are the rows of its tile, so that the
    sum over queries stays within a warp.
    """
    frame = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_Q)
    total = tl.zeros([BLOCK_K], tl.float32)
    for head in range(HEADS):
        keys = key + frame * KEY_FRAME + head * KEY_HEAD + column * KEY_TOKEN
        k = _vectors(keys, column < TOKENS, 0, BLOCK_D, HEAD_DIM)
        if BLOCK_TAIL:
            k_tail = _vectors(keys, column < TOKENS, BLOCK_D, BLOCK_TAIL, HEAD_DIM)
        queries = query + frame * QUERY_FRAME + head * QUERY_HEAD + row * QUERY_TOKEN
        log_shares = normaliser + (frame * HEADS + head) * PADDED + row
        for first in range(0, TOKENS, BLOCK_Q):
            inside = row < TOKENS - first
            q = _vectors(queries, inside, 0, BLOCK_D, HEAD_DIM)
            logits = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_K, BLOCK_Q]
            if BLOCK_TAIL:
                q_tail = _vectors(queries, inside, BLOCK_D, BLOCK_TAIL, HEAD_DIM)
                logits = tl.dot(k_tail, tl.trans(q_tail), logits, input_precision="ieee")
            # Padded queries have -inf here, so they add 0.
            log_share = tl.load(log_shares)
            total += tl.sum(tl.exp2(tl.fma(logits, SCALE, log_share[None, :])), 1)
            queries += BLOCK_Q * QUERY_TOKEN
            log_shares += BLOCK_Q
    tl.store(received + frame * TOKENS + column, total / (HEADS * TOKENS), mask=column < TOKENS)


def width_blocks(head_dim: int) -> tuple[int, int]:
    """Powers of two, at least 16 for tensor cores, that cover a head: one block, or a block and a tail if narrower.

    72 gives (64, 16); 56 gives (64, 0), as 32 + 32 is no narrower.
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    block = whole // 2
    if block < 16 or head_dim <= block:
        return whole, 0
    tail = max(16, triton.next_power_of_2(head_dim - block))
    return (block, tail) if block + tail < whole else (whole, 0)


def launches(query: Tensor, key: Tensor, scale: float) -> tuple[Launch, Launch]:
    """The launches of row kernel and column kernel, from shapes, strides and dtype of the tensors."""
    frames, heads, tokens, head_dim = query.shape
    block_d, block_tail = width_blocks(head_dim)
    # Rows: 32 queries per warp, so that keys in shared memory serve two tiles of queries. Columns: 16 keys per warp, as
    # there are only F * T / BLOCK_K programs. FP32 does not run on tensor cores: tiles that fit in registers.
    row_q, row_k, column_q, column_k = (32, 32, 32, 32) if query.dtype == torch.float32 else (128, 64, 64, 64)
    row_programs = triton.cdiv(tokens, row_q)
    constants: dict[str, Any] = {
        "TOKENS": tokens,
        "PADDED": row_programs * row_q,  # a multiple of column_q
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "QUERY_FRAME": query.stride(0),
        "QUERY_HEAD": query.stride(1),
        "QUERY_TOKEN": query.stride(2),
        "KEY_FRAME": key.stride(0),
        "KEY_HEAD": key.stride(1),
        "KEY_TOKEN": key.stride(2),
        "SCALE": scale * math.log2(math.e),
        "BLOCK_D": block_d,
        "BLOCK_TAIL": block_tail,
    }
    rows, columns = ({"BLOCK_Q": q, "BLOCK_K": k} | constants for q, k in ((row_q, row_k), (column_q, column_k)))
    return (
        Launch(row_kernel, (row_programs, heads, frames), rows, num_stages=3),
        Launch(column_kernel, (triton.cdiv(tokens, column_k), frames, 1), columns, num_stages=3),
    )


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean over heads and queries of `softmax(scale * query @ key^T)`.

    Args:
        query, key: [F, H, T, d] fp16, bf16 or fp32, both alike, of any strides: [F, T, H, d] transposed is read in
            place. Copied only where the last dimension is not contiguous.
        scale: of the logits, above zero.

    Returns:
        [F, T] fp32; each frame's sum is one. A frame with a NaN is NaN throughout.

    Raises:
        UserError: tensors of other shapes or dtypes, or a scale that is not above zero.
    """
    if query.dim() != 4 or query.shape != key.shape or query.dtype != key.dtype or query.dtype not in DTYPES:
        raise UserError(
            "query and key must be alike, [frames, heads, tokens, width] of fp16, bf16 or fp32, "
            f"got {query.dtype} {list(query.shape)} and {key.dtype} {list(key.shape)}"
        )
    if not scale > 0:
        raise UserError(f"scale must be above zero, got {scale}")
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        query, key = query.float(), key.float()  # Triton's interpreter multiplies the bits of bf16 as integers
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    frames, heads, tokens, _ = query.shape
    rows, columns = launches(query, key, scale)
    normaliser = torch.empty(frames, heads, rows.constants["PADDED"], dtype=torch.float32, device=query.device)
    received = torch.empty(frames, tokens, dtype=torch.float32, device=query.device)
    rows(query, key, normaliser)
    columns(query, key, normaliser, received)
    return received
