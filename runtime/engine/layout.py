"""What the builder and the runtime agree on: tensor names, dtypes and shapes of an engine, and the files of its folder.

An engine maps one clip to the visual tokens that reach the LLM, with static shapes:

    frames     uint8 [F, 3, H, W]   RGB at the model's resolution; scaling and normalising happen inside the engine
    tokens     dtype [N, D]         D is the width of the LLM; dtype is that of the graph
    positions  int64 [N]            ascending; position = f * P + cell, f the index among the frames that are left

An engine for B > 1 videos at once has a leading B in all three: frames [B, F, 3, H, W], tokens [B, N, D], positions
[B, N]; every video is treated as if it were alone.

That is one graph, `vision.onnx` or `vision.engine`, in the budget schedule. A folder for several frame counts has a
graph for each, `vision.f8.onnx`, `vision.f16.onnx`, ..., so do its other files; ONNX weights of all of them are in
`vision.data`. In the adaptive one it is a chain of them,
`vision.0.onnx`, `vision.1.onnx`, ..., each with the layers up to a merge and the merge itself; n <= F frames arrive:

    hidden           [n, T, D]       all stages but the first: what the stage before merged
    received         fp32 [n, S]     the last stage: received attention
    merged_hidden    [n, T, D]       all stages but the last; rows from `count` on are zero
    merged_received  fp32 [n, S]     the last stage but one; likewise
    count            int64 [1]       frames left; of the last stage, the tokens that count: [M, D] come, of which the
                                     first N are the answer, M = `places` * n being what n frames have room for

An engine whose clips come in chunks of C frames (budget schedule, C divides F) is two graphs, `vision.0.onnx` with the
layers up to the first merge, which runs once for each chunk, and `vision.1.onnx` with everything from there on:

    hidden           [C, T, D], [F, T, D]     what the one returns of a chunk and the other takes of a clip
    received         fp32 [C, S], [F, S]      where the first merge is the last, or there is none: received attention

The model's `image_newline` is not among the tokens: the runtime appends it. Nothing else may spell these names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.errors import EngineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    DTYPES: dict[str, torch.dtype]
    FRAMES_DTYPE: torch.dtype
    POSITIONS_DTYPE: torch.dtype

FRAMES = "frames"
TOKENS = "tokens"
POSITIONS = "positions"
OUTPUTS = (TOKENS, POSITIONS)
HIDDEN, RECEIVED = "hidden", "received"
MERGED_HIDDEN, MERGED_RECEIVED = "merged_hidden", "merged_received"
COUNT = "count"

# The dtypes a graph may have, by the name used in folder names, manifests and flags (--fp16, --bf16, --fp32).
# `DTYPES` maps them to PyTorch's.
DTYPE_NAMES = ("fp16", "bf16", "fp32")

CHUNK_STAGES = 2  # graphs of an engine whose clips come in chunks

MANIFEST_FILE = "manifest.json"
ONNX_FILE = "vision.onnx"
ENGINE_FILE = "vision.engine"
REPORT_FILE = "report.json"
LAYERS_FILE = "layers.json"
DATA_FILE = "vision.data"
REFERENCE_INPUTS_FILE = "reference_inputs.json"
REFERENCE_OUTPUTS_FILE = "reference_outputs.json"


def __getattr__(name: str) -> Any:
    """PyTorch's dtypes, made when they are first asked for: names and files need no PyTorch."""
    if name not in ("DTYPES", "FRAMES_DTYPE", "POSITIONS_DTYPE"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    known = {
        "DTYPES": dict(zip(DTYPE_NAMES, dtypes, strict=True)),
        "FRAMES_DTYPE": torch.uint8,
        "POSITIONS_DTYPE": torch.int64,
    }
    globals().update(known)
    return known[name]


def stage_file(name: str, stage: int) -> str:
    """The file of one stage of a chain: "vision.onnx", 2 to "vision.2.onnx"."""
    stem, suffix = name.rsplit(".", maxsplit=1)
    return f"{stem}.{stage}.{suffix}"


def count_file(name: str, frames: int) -> str:
    """The file of one of several frame counts: "vision.onnx", 8 to "vision.f8.onnx"."""
    stem, suffix = name.rsplit(".", maxsplit=1)
    return f"{stem}.f{frames}.{suffix}"


def stage_tensors(stage: int, stages: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and outputs of one stage of a chain of `stages`, by name."""
    last = stages - 1
    inputs: tuple[str, ...] = (HIDDEN,) if stage else (FRAMES,)
    if 0 < stage == last:
        inputs = (HIDDEN, RECEIVED)
    if stage == last:
        return inputs, (*OUTPUTS, COUNT)
    return inputs, (MERGED_HIDDEN, COUNT, *([MERGED_RECEIVED] * (stage == last - 1)))


def chunk_tensors(stage: int, received: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and outputs of stage 0 or 1 of an engine whose clips come in chunks, by name.

    `received`: whether received attention goes from the one to the other.
    """
    between = (HIDDEN, RECEIVED) if received else (HIDDEN,)
    return (between, OUTPUTS) if stage else ((FRAMES,), between)


def check_frames(frames: Tensor, shape: Sequence[int]) -> None:
    """Refuse frames that an engine built for `shape` = [F, 3, H, W], or [B, F, 3, H, W] for B videos, cannot take.

    Raises:
        EngineError: another shape or dtype.
    """
    import torch

    expected = tuple(shape)
    if tuple(frames.shape) != expected:
        *batch, count, _, height, width = expected
        what = f"[{'B, ' * len(batch)}F, 3, H, W]"
        several = f" of each of {batch[0]} videos" if batch else ""
        raise EngineError(
            f"this engine takes {FRAMES} of shape {list(expected)} {what}, got {list(frames.shape)}: sample "
            f"{count} frames{several} at {height}x{width}, or build another engine with python -m builder.build"
        )
    if frames.dtype != torch.uint8:
        raise EngineError(
            f"this engine takes {FRAMES} of dtype uint8 (RGB, 0 to 255; it normalises them itself), got {frames.dtype}"
        )


def batch_of(shape: Sequence[int]) -> int:
    """B of an engine whose frames have this shape: 1 for [F, 3, H, W], else the first of [B, F, 3, H, W]."""
    return shape[0] if len(shape) == 5 else 1


def check_clips(clips: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Refuse clips that an engine whose frames have `shape` cannot take at once.

    Raises:
        EngineError: no clip or more than it has room for, or a clip of another shape or dtype.
    """
    most = batch_of(shape)
    if not 1 <= len(clips) <= most:
        raise EngineError(
            f"this engine takes 1 to {most} clips at once, got {len(clips)}: give it fewer, or build one for more with "
            "python -m builder.build --batch"
        )
    for clip in clips:
        check_frames(clip, shape[-4:])
