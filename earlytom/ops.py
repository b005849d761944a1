"""The compression stage as PyTorch operators: `torch.ops.earlytom.*`.

On a CPU they run the reference (`earlytom.merge`, `earlytom.select`, `earlytom.attention`, `earlytom.cells`), on CUDA
the Triton kernels of `earlytom.kernels`. Each has a schema and a fake (shape) function, so a model that calls them can
be traced, exported and compiled as one graph. None waits for the device, and all shapes follow from the arguments (the
adaptive schedule gives F rows and a count), so a CUDA graph can capture them.

Notation: F frames, F' frames left, S tokens a frame, D width, P tokens after pooling, E LLM width, k places a frame,
H heads, T tokens, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlytom import merge, select
from earlytom.attention import attention_matrix, column_means
from earlytom.cells import select as diverse

NAMESPACE = "earlytom"


@torch.library.custom_op(f"{NAMESPACE}::frame_similarity", mutates_args=())
def frame_similarity(hidden: Tensor) -> Tensor:
    """`hidden [F, S, D]` to the frames' similarities, [F, F] fp32; see `merge.frame_similarity`."""
    return merge.frame_similarity(hidden)


@torch.library.custom_op(f"{NAMESPACE}::frame_plan", mutates_args=())
def frame_plan(
    similarity: Tensor, frames_out: int | None, tau: float, max_window: int, ema: float, trailing: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan from `similarity [F, F]` fp32; see `merge.plan_similarity`.

    Args:
        frames_out: frames to keep, or None for the adaptive schedule.

    Returns:
        weights [frames_out or F, F] fp32, whose rows from `count` on are zero; static [F] bool; start [F] int64, the
        first frame of each frame's segment; count [] int64.
    """
    weights, start, end = merge.plan_similarity(
        similarity, frames_out, tau=tau, max_window=max_window, ema=ema, trailing=trailing
    )
    count = weights.shape[0]
    if frames_out is None:
        weights = torch.nn.functional.pad(weights, (0, 0, 0, similarity.shape[0] - count))
    return weights, merge.static_frames(start, end), start, torch.full((), count, device=similarity.device)


@torch.library.custom_op(f"{NAMESPACE}::received_attention", mutates_args=())
def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """`query, key [F, H, T, d]` to the attention each token receives, mean over heads and queries, [F, T] fp32."""
    return column_means(attention_matrix(query, key, scale))


@torch.library.custom_op(f"{NAMESPACE}::select_tokens", mutates_args=())
def select_tokens(features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """`features [F', P, E]`, `received [F', P]`, `static [F'] bool` to tokens [F'*k, E] and positions [F'*k] int64.

    See `select.select_fixed`; k is `places`.
    """
    return select.select_fixed(features, received, static, places)


@torch.library.custom_op(f"{NAMESPACE}::select_greedy", mutates_args=())
def select_greedy(salient: Tensor, alike: Tensor, count: int) -> Tensor:
    """`salient [M]` and `alike [M, M]` fp32 to the diverse tokens, [count] int64; see `cells.select.select_greedy`."""
    return diverse.select_greedy(salient, alike, count)


# Kernels are imported at first use: Triton is installed only where PyTorch has CUDA.


@frame_similarity.register_kernel("cuda")
def _(hidden: Tensor) -> Tensor:
    from earlytom.kernels.frame_similarity import frame_similarity as kernel

    return kernel(hidden)


@frame_plan.register_kernel("cuda")
def _(
    similarity: Tensor, frames_out: int | None, tau: float, max_window: int, ema: float, trailing: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from earlytom.kernels.frame_plan import frame_plan as kernel

    return kernel(similarity, frames_out, tau=tau, max_window=max_window, ema=ema, trailing=trailing)


@received_attention.register_kernel("cuda")
def _(query: Tensor, key: Tensor, scale: float) -> Tensor:
    from earlytom.kernels.received_attention import received_attention as kernel

    return kernel(query, key, scale)


@select_tokens.register_kernel("cuda")
def _(features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
    from earlytom.kernels.select_tokens import select_tokens as kernel

    return kernel(features, received, static, places)


@select_greedy.register_kernel("cuda")
def _(salient: Tensor, alike: Tensor, count: int) -> Tensor:
    from earlytom.kernels.select_greedy import select_greedy as kernel

    return kernel(salient, alike, count)


@frame_similarity.register_fake
def _(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[0], dtype=torch.float32)


@frame_plan.register_fake
def _(
    similarity: Tensor, frames_out: int | None, tau: float, max_window: int, ema: float, trailing: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    frames = similarity.shape[0]
    rows = frames if frames_out is None else frames_out
    weights = similarity.new_empty(rows, frames)
    start, count = (similarity.new_empty(shape, dtype=torch.int64) for shape in ((frames,), ()))
    return weights, similarity.new_empty(frames, dtype=torch.bool), start, count


@received_attention.register_fake
def _(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], dtype=torch.float32)


@select_tokens.register_fake
def _(features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
    kept = features.shape[0] * places
    return features.new_empty(kept, features.shape[2]), features.new_empty(kept, dtype=torch.int64)


@select_greedy.register_fake
def _(salient: Tensor, alike: Tensor, count: int) -> Tensor:
    return salient.new_empty(count, dtype=torch.int64)
