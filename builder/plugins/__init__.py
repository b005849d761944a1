"""The compression stage as TensorRT plugins, from the Triton kernels that PyTorch runs on a GPU.

The graph calls ONNX functions (`builder.export.functions`, `builder.export.cells`), whose bodies are ordinary operators
that run everywhere. This package replaces most of them by plugins of the same names: `ptx` compiles a kernel ahead of
time, `registry` registers the plugins with TensorRT, `graph` turns the function calls of an ONNX file into plugin
nodes. The finished engine holds the PTX and needs no Python. `python -m builder.plugins` shows the kernels' cost.

This module chooses between plugin and function body for an engine; it needs neither TensorRT nor Triton.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata

from earlytom.errors import UserError
from runtime.trt import Capability

# The oldest PTX version that supports each GPU, by compute capability; the plugins support these GPUs only.
PTX_VERSIONS: dict[Capability, int] = {
    (8, 0): 80,
    (8, 6): 80,
    (8, 7): 80,
    (8, 9): 80,
    (9, 0): 80,
    (10, 0): 86,
    (10, 3): 88,
    (12, 0): 87,
    (12, 1): 88,
}
GPUS = ", ".join(f"{major}.{minor}" for major, minor in PTX_VERSIONS)
COMPRESSIONS = ("auto", "plugin", "native")
NATIVE = "use --compression native"
INSTALL = 'pip install "earlytom-engine-builder[plugin]"'


def kernel_target(target: Capability, hardware_compatible: bool) -> Capability:
    """The compute capability to compile kernels for: the target's, or 8.0 if the engine is hardware-compatible.

    PTX for 8.0 runs on every newer GPU, PTX for 9.0 and later on that GPU alone.
    """
    return (8, 0) if hardware_compatible else target


@dataclass(frozen=True)
class Choice:
    """How the compression stage runs in an engine ("plugin" or "native") and, in one line for the user, why."""

    compression: str
    reason: str


def choose(
    asked: str, backend: str, target: Capability, schedule: str = "budget", *, has_kernels: bool = True
) -> Choice:
    """Resolve `--compression`.

    "auto" takes the plugins where they can be built (tensorrt, budget schedule, a supported GPU), else the function
    bodies. "plugin" and "native" are used or refused, never exchanged.

    Args:
        asked: one of `COMPRESSIONS`.
        backend: "onnx", "tensorrt" or "tensorrt-rtx".
        target: compute capability, see `kernel_target`.
        schedule: "budget" or "adaptive".
        has_kernels: whether a step of the method has a kernel.
    """
    if asked not in COMPRESSIONS:
        raise UserError(f"unknown --compression {asked!r}: expected one of {', '.join(COMPRESSIONS)}")
    if asked == "native":
        return Choice("native", "asked for: the graph's own operators")
    refused = {
        "tensorrt-rtx": "tensorrt-rtx has no plugins, and its parser ends the process on a plugin node",
        "onnx": "an ONNX file holds no kernels",
    }.get(backend)
    if refused is None and schedule != "budget":
        refused = f"the plugins have static shapes, and --schedule {schedule} has not"
    if refused is None and not has_kernels:
        refused = "tokens taken in rounds are ordinary operators (--rounds greedy has a kernel)"
    if refused is None and target not in PTX_VERSIONS:
        capability = ".".join(map(str, target))
        refused = f"there are plugin kernels for compute capability {GPUS} only, not for {capability}"
    if refused is not None:
        if asked == "plugin":
            other = "" if backend == "tensorrt" else ", or --backend tensorrt"
            raise UserError(f"--compression plugin cannot be built: {refused}; {NATIVE}{other}")
        return Choice("native", refused)
    if importlib.util.find_spec("triton") is None:
        raise UserError(f"the compression plugin needs Triton: {INSTALL}, or {NATIVE}")
    return Choice("plugin", "asked for" if asked == "plugin" else "tensorrt takes the kernels")


def triton_version() -> str:
    """Version of the installed Triton, under whatever name it was distributed."""
    distributions = metadata.packages_distributions().get("triton")
    if not distributions:
        raise UserError(f"the compression plugin needs Triton: {INSTALL}, or {NATIVE}")
    return metadata.version(distributions[0])
