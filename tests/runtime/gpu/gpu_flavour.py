"""The TensorRT flavour that tests on a GPU build and run with; None, and why, where there is none."""

from __future__ import annotations

import torch

from runtime import trt


def flavour_for_this_gpu() -> tuple[str | None, str]:
    """The flavour that can build and run here, or None and the reason why there is none."""
    if not torch.cuda.is_available():
        return None, "no NVIDIA GPU that torch can use"
    usable = trt.flavours()
    if "tensorrt" in usable:
        return "tensorrt", ""
    major, minor = torch.cuda.get_device_capability()
    if "tensorrt-rtx" not in usable:
        return None, "a GPU, but neither tensorrt nor tensorrt-rtx is installed"
    if not hasattr(trt.load("tensorrt-rtx").ComputeCapability, f"SM{major}{minor}"):
        return None, f"tensorrt-rtx does not compile for compute capability {major}.{minor}"
    return "tensorrt-rtx", ""


FLAVOUR, WHY_NOT = flavour_for_this_gpu()
