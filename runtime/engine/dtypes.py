"""The dtypes that tensors of an engine may have, as PyTorch has them, and what the other libraries call them."""

from __future__ import annotations

import torch

# By the names of `layout.DTYPE_NAMES`.
DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FLOATS = tuple(DTYPES.values())
FRAMES_DTYPE = torch.uint8
POSITIONS_DTYPE = torch.int64
# By the names that a `layout.Tensor` has for them.
NAMED: dict[str, torch.dtype] = {**DTYPES, "uint8": FRAMES_DTYPE, "int64": POSITIONS_DTYPE}

# torch dtype -> (how onnxruntime prints it, its number in ONNX's TensorProto.DataType)
ONNX: dict[torch.dtype, tuple[str, int]] = {
    torch.uint8: ("tensor(uint8)", 2),
    torch.int64: ("tensor(int64)", 7),
    torch.float32: ("tensor(float)", 1),
    torch.float16: ("tensor(float16)", 10),
    torch.bfloat16: ("tensor(bfloat16)", 16),
}

# By the names of `DataType`, which both TensorRT flavours share.
TENSORRT: dict[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
}
