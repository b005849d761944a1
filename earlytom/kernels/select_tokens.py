"""Stage II with a fixed number of places: selects the tokens of each frame and copies them, in one launch.

Exactly the outputs of `earlytom.select.select_fixed`: the k tokens of highest received attention of a changing frame,
the best token of each of k windows of a static one, ties to the lower index, in raster order. -0 equals +0. As there,
NaN beats no token and is beaten by none: every NaN token stays, or the first k if there are more.

A program selects for its whole frame and copies the tokens of a few places, all columns of them. So the selection is
repeated by the programs of a frame, but needs no second launch, and programs write disjoint outputs.

Selecting k of P needs no sort: the k-th largest value is found from its highest bits down, two at a time, by counting
how many values reach each of three candidates. That takes 3 P comparisons per round instead of P * P; at most 16
rounds, and 7 to 9 on average for distinct values, as it ends when exactly k of them reach a candidate.

Cost. It must move 2 F' k E s bytes of tokens (s bytes a number), 4 F' P of received attention, F' flags and 8 F' k of
positions. For 32 frames merged to F' = 14, P = 196, E = 3584, k = 45 (ratio 0.1), s = 2 that is 9.0 MB: 4.5 us at the
A100-80GB's published 2.0 TB/s (to be replaced by a measured figure). The selection precedes the copy and is bound by
latency: rounds of about 100 instructions and three sums over the lanes of a warp (some 170 cycles), then 400
instructions for the places; an estimated 2 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlytom.errors import UserError
from earlytom.kernels.launch import Launch

MAX_TOKENS = 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Target number of programs: a warp for each of the 4 schedulers of an A100's 108 multiprocessors. More would wait for
# each other's selections; fewer would have too few reads in flight.
PROGRAMS = 432


@triton.jit
def _sortable(x):
    """Floats as uint32 of the same order: both zeros are one value, NaN is 0, below every number."""
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats are the smaller the larger their bits are
    return tl.where(x == x, ordered.to(tl.uint32, bitcast=True) ^ 0x80000000, 0)


@triton.jit
def _best_of_frame(key, K: tl.constexpr):
    """Mask of the K largest keys, ties to the first."""
    threshold = tl.full([], 0, tl.uint32)  # the largest number found so far that at least K keys reach
    reached = tl.full([], key.shape[0] + 1, tl.int32)  # how many reach it; more than K before the first round
    step = tl.full([], 1 << 30, tl.uint32)
    while (reached != K) & (step > 0):
        one = tl.sum((key >= threshold + step).to(tl.int32), 0)
        two = tl.sum((key >= threshold + 2 * step).to(tl.int32), 0)
        three = tl.sum((key >= threshold + 3 * step).to(tl.int32), 0)
        threshold += step * ((one >= K).to(tl.uint32) + (two >= K).to(tl.uint32) + (three >= K).to(tl.uint32))
        reached = tl.where(three >= K, three, tl.where(two >= K, two, tl.where(one >= K, one, reached)))
        step = step >> 2
    above = key > threshold
    equal = key == threshold
    room = K - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))


@triton.jit
def _best_of_windows(received, cell, P: tl.constexpr, K: tl.constexpr, WINDOWS: tl.constexpr, WIDEST: tl.constexpr):
    """Mask of the largest in each of K windows (see `earlytom.select.window_of_cell`), ties to the first."""
    size: tl.constexpr = P // K
    longer: tl.constexpr = P % K
    window = tl.arange(0, WINDOWS)
    first = window * size + tl.minimum(window, longer)
    offset = tl.arange(0, WIDEST)[None, :]
    inside = (offset < size + (window < longer).to(tl.int32)[:, None]) & (window < K)[:, None]
    value = tl.load(received + first[:, None] + offset, mask=inside, other=0.0)
    best = first + tl.argmax(tl.where(inside, _sortable(value), 0), 1)
    in_longer: tl.constexpr = longer * (size + 1)
    own = tl.where(cell < in_longer, cell // (size + 1), longer + (cell - in_longer) // size)
    return tl.gather(best, tl.minimum(own, K - 1), 0) == cell


@triton.jit
def _copy(source, target, cell, row, WIDTH: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows `cell` of `source [P, WIDTH]` become rows `row` of `target [K, WIDTH]`."""
    for begin in range(0, WIDTH, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)[None, :]
        mask = (row < K)[:, None] & (column < WIDTH)
        block = tl.load(source + cell[:, None] * WIDTH + column, mask=mask)
        tl.store(target + row[:, None] * WIDTH + column, block, mask=mask)


@triton.jit
def select_tokens_kernel(
    features,  # fp32, fp16 or bf16 [F', P, E]
    received,  # fp32, fp16 or bf16 [F', P]
    static,  # bool [F']
    tokens,  # [F' * K, E], the type of the features
    positions,  # int64 [F' * K]
    P: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    CELLS: tl.constexpr,  # power of two, P or more
    WINDOWS: tl.constexpr,  # power of two, K or more
    WIDEST: tl.constexpr,  # power of two, cells of the longest of K windows or more
    ROWS: tl.constexpr,  # places of a program
    COLUMNS: tl.constexpr,  # of a token, copied at a time
):
    frame = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, CELLS)
    real = cell < P
    received += frame * P
    key = tl.where(real, _sortable(tl.load(received + cell, mask=real, other=0.0)), 0)
    if tl.load(static + frame):
        keep = _best_of_windows(received, cell, P, K, WINDOWS, WIDEST)
    else:
        keep = _best_of_frame(key, K)
    keep = real & (keep | (key == 0))
    place = tl.cumsum(keep.to(tl.int32), 0) - 1

    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    chosen = keep[:, None] & (place[:, None] == row[None, :])
    source = tl.sum(tl.where(chosen, cell[:, None], 0), 0)  # the cell of each place
    tl.store(positions + frame * K + row, frame * P + source, mask=row < K)
    features += frame * P * E
    tokens += frame * K * E
    # Copy 8-byte words if the addresses are aligned: where alignment is unknown at compile time (in a plugin), the
    # compiler would copy element by element.
    NUMBERS: tl.constexpr = 64 // features.dtype.element_ty.primitive_bitwidth  # elements per word
    word = tl.pointer_type(tl.int64)
    if E % NUMBERS == 0 and (features.to(tl.int64) | tokens.to(tl.int64)) % 8 == 0:
        _copy(features.to(word), tokens.to(word), source, row, E // NUMBERS, K, COLUMNS)
    else:
        _copy(features, tokens, source, row, E, K, COLUMNS)


def launch(frames: int, per_frame: int, width: int, places: int) -> Launch:
    """The kernel's launch for features [frames, per_frame, width], of which `places` tokens per frame stay.

    Raises:
        UserError: `per_frame` is not in 1..1024, `places` not in 1..per_frame, or there is no frame or no width.
    """
    if frames < 1 or width < 1 or not 1 <= per_frame <= MAX_TOKENS:
        raise UserError(
            f"the selection kernel takes a frame or more of 1 to {MAX_TOKENS} tokens, got features "
            f"{[frames, per_frame, width]}"
        )
    if not 1 <= places <= per_frame:
        raise UserError(f"places must be between 1 and {per_frame} (the tokens of a frame), got {places}")
    columns = triton.next_power_of_2(width)
    # A single warp needs no barrier in its rounds; from 512 cells on it would have too many comparisons.
    warps = min(max(1, triton.next_power_of_2(per_frame) // 256), 4)
    # Short tokens: at least 256 numbers, 16 bytes of fp16 for each lane of a warp.
    rows = min(max(triton.next_power_of_2(-(-frames * places // PROGRAMS)), 256 // columns), 8)
    constants = {
        "P": per_frame,
        "E": width,
        "K": places,
        "CELLS": triton.next_power_of_2(per_frame),
        "WINDOWS": triton.next_power_of_2(places),
        "WIDEST": triton.next_power_of_2(-(-per_frame // places)),
        "ROWS": rows,
        "COLUMNS": min(columns, 1024 * warps // rows),  # a lane reads 32 words before it writes the first
    }
    return Launch(select_tokens_kernel, (frames, -(-places // rows), 1), constants, num_warps=warps)


def select_tokens(features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Keep exactly `places` tokens of every frame.

    Args:
        features: [F', P, E]; received: [F', P]; each fp32, fp16 or bf16. static: [F'] bool.

    Returns:
        tokens [F' * places, E] in the dtype of the features, and positions [F' * places] int64, `frame * P + cell`.

    Raises:
        UserError: as `launch`, or shapes or dtypes that are not those above.
    """
    fits = features.dim() == 3 and received.shape == features.shape[:2] and static.shape == features.shape[:1]
    if not fits or features.dtype not in DTYPES or received.dtype not in DTYPES or static.dtype != torch.bool:
        got = " and ".join(f"{x.dtype} {list(x.shape)}" for x in (features, received, static))
        raise UserError(
            "features must be [frames, tokens, width] and received attention [frames, tokens], of fp32, fp16 or bf16, "
            f"and static bool [frames], got {got}"
        )
    frames, per_frame, width = features.shape
    run = launch(frames, per_frame, width, places)
    tokens = torch.empty(frames * places, width, dtype=features.dtype, device=features.device)
    positions = torch.empty(frames * places, dtype=torch.int64, device=features.device)
    run(features.contiguous(), received.contiguous(), static.contiguous(), tokens, positions)
    return tokens, positions
