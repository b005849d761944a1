"""What the builder and the runtime agree on: tensor names, dtypes and shapes of an engine, and the files of its folder.

An engine maps one clip to the visual tokens that reach the LLM, with static shapes:

    frames     uint8 [F, 3, H, W]   RGB at the model's resolution; scaling and normalising happen inside the engine
    tokens     dtype [N, D]         D is the width of the LLM; dtype is that of the graph
    positions  int64 [N]            ascending; position = f * P + cell, f the index among the frames that are left

That is one graph, `vision.onnx` or `vision.engine`, in the budget schedule. In the adaptive one it is a chain of them,
`vision.0.onnx`, `vision.1.onnx`, ..., each with the layers up to a merge and the merge itself; n <= F frames arrive:

    hidden           [n, T, D]       all stages but the first: what the stage before merged
    received         fp32 [n, S]     the last stage: received attention
    merged_hidden    [n, T, D]       all stages but the last; rows from `count` on are zero
    merged_received  fp32 [n, S]     the last stage but one; likewise
    count            int64 [1]       frames left; of the last stage, the tokens that count: [M, D] come, of which the
                                     first N are the answer, M = `places` * n being what n frames have room for

The model's `image_newline` is not among the tokens: the runtime appends it. Nothing else may spell these names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.errors import EngineError

FRAMES = "frames"
TOKENS = "tokens"
POSITIONS = "positions"
OUTPUTS = (TOKENS, POSITIONS)
HIDDEN, RECEIVED = "hidden", "received"
MERGED_HIDDEN, MERGED_RECEIVED = "merged_hidden", "merged_received"
COUNT = "count"

FRAMES_DTYPE = torch.uint8
POSITIONS_DTYPE = torch.int64
# The dtypes a graph may have, by the name used in folder names, manifests and flags (--fp16, --bf16, --fp32).
DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

MANIFEST_FILE = "manifest.json"
ONNX_FILE = "vision.onnx"
ENGINE_FILE = "vision.engine"
REPORT_FILE = "report.json"
LAYERS_FILE = "layers.json"
REFERENCE_INPUTS_FILE = "reference_inputs.json"
REFERENCE_OUTPUTS_FILE = "reference_outputs.json"


def stage_file(name: str, stage: int) -> str:
    """The file of one stage of a chain: "vision.onnx", 2 to "vision.2.onnx"."""
    stem, suffix = name.rsplit(".", maxsplit=1)
    return f"{stem}.{stage}.{suffix}"


def stage_tensors(stage: int, stages: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and outputs of one stage of a chain of `stages`, by name."""
    last = stages - 1
    inputs: tuple[str, ...] = (HIDDEN,) if stage else (FRAMES,)
    if 0 < stage == last:
        inputs = (HIDDEN, RECEIVED)
    if stage == last:
        return inputs, (*OUTPUTS, COUNT)
    return inputs, (MERGED_HIDDEN, COUNT, *([MERGED_RECEIVED] * (stage == last - 1)))


def check_frames(frames: Tensor, shape: Sequence[int]) -> None:
    """Refuse frames that an engine built for `shape` = [F, 3, H, W] cannot take.

    Raises:
        EngineError: another shape or dtype.
    """
    expected = tuple(shape)
    if tuple(frames.shape) != expected:
        raise EngineError(
            f"this engine takes {FRAMES} of shape {list(expected)} [F, 3, H, W], got {list(frames.shape)}: sample "
            f"{expected[0]} frames at {expected[2]}x{expected[3]}, or build another engine with python -m builder.build"
        )
    if frames.dtype != FRAMES_DTYPE:
        raise EngineError(
            f"this engine takes {FRAMES} of dtype uint8 (RGB, 0 to 255; it normalises them itself), got {frames.dtype}"
        )
