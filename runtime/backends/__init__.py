"""Vision backends: everything that turns the frames of one clip into visual tokens, behind one small protocol.

`torch` runs the checkpoint's own vision part (the reference), `onnxruntime` runs `vision.onnx`, `tensorrt` and
`tensorrt-rtx` run `vision.engine`, or with the adaptive schedule a chain of such files. Nothing is imported here but
the backend that is opened.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from torch import Tensor, cuda  # not `import torch`: in this package that name is the backend's module

from runtime.contract import ENGINE_FILE, ONNX_FILE
from runtime.errors import EngineError
from runtime.manifest import REBUILD, Manifest

# Backends that run a file of an engine folder. The torch backend runs a checkpoint instead, and is made from one.
ENGINE_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
BACKENDS = ("auto", *ENGINE_BACKENDS, "torch")


class VisionBackend(Protocol):
    """One loaded vision engine; tensors as in `runtime.contract`.

    The tensors that `encode` returns belong to the backend: they are valid until the next `encode` or `close`, which
    writes over them. Splice them into the prompt (a copy anyway) or clone them before that. One call at a time: a
    backend refuses a second one while the first is under way with RuntimeError.
    """

    name: str

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens of one clip.

        Args:
            frames: uint8 [F, 3, H, W], RGB.

        Returns:
            tokens [N, D] in the dtype of the graph, positions int64 [N].

        Raises:
            EngineError: frames of another shape or dtype.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; it cannot be used afterwards. A second call does nothing."""
        ...


def choose_backend(asked: str, manifest: Manifest) -> str:
    """Which of `BACKENDS` (but "auto") runs this engine here.

    "auto" takes the compiled engine where there is a GPU that torch can use, else ONNX Runtime; graphs in bf16, for
    which that has no kernels on a CPU, run in PyTorch there. A backend asked for by name is never exchanged for
    another.

    Raises:
        EngineError: an unknown name, or the folder has no file for it.
    """
    compiled = manifest.backend if manifest.backend in ENGINE_BACKENDS else None
    has_graph = all(name in manifest.files for name in manifest.stage_files(ONNX_FILE))
    if asked == "auto":
        if compiled and (cuda.is_available() or not has_graph):
            return compiled
        return "torch" if manifest.dtype == "bf16" else "onnxruntime"
    if asked not in BACKENDS:
        raise EngineError(f"unknown --backend {asked!r}: expected one of {', '.join(BACKENDS)}")
    if asked == "onnxruntime" and manifest.dtype == "bf16":
        raise EngineError("onnxruntime has no bf16 kernels on a CPU: use --backend torch, or build with --fp16")
    if asked == "onnxruntime" and not has_graph:
        raise EngineError(f"engine {manifest.name} has no {ONNX_FILE} for onnxruntime: {REBUILD}")
    if asked in ("tensorrt", "tensorrt-rtx") and asked != compiled:
        raise EngineError(
            f"engine {manifest.name} was built for {manifest.backend}, not for {asked}: build one with "
            f"python -m builder.build --backend {asked}, or use --backend {compiled or 'onnxruntime'}"
        )
    return asked


def open_backend(
    asked: str, folder: str | os.PathLike[str], manifest: Manifest, *, threads: int | None = None
) -> VisionBackend:
    """Load the engine of a folder whose manifest was read (and thereby checked).

    Args:
        asked: "auto" or one of `ENGINE_BACKENDS` ("torch" needs a checkpoint: `runtime.backends.torch`).
        threads: of onnxruntime; torch's number by default.

    Raises:
        EngineError: see `choose_backend`; that is "torch"; the library is missing or of another version than the
            engine's; the file cannot be loaded.
    """
    name = choose_backend(asked, manifest)
    if name == "torch":
        raise EngineError(f"engine {manifest.name} runs here in PyTorch, from its checkpoint: use Pipeline.load")
    if name == "onnxruntime" and manifest.adaptive:
        from runtime.backends.chain import Room
        from runtime.backends.onnxruntime_chain import OnnxRuntimeChain

        return OnnxRuntimeChain(folder, Room.of(manifest), threads)
    if name == "onnxruntime":
        from runtime.backends.onnxruntime import OnnxRuntimeVision

        return OnnxRuntimeVision(Path(folder) / ONNX_FILE, threads)
    from runtime import trt

    installed = ".".join(map(str, trt.version(trt.load(name))))
    if installed != manifest.backend_version:
        raise EngineError(
            f"engine {manifest.name} was built with {name} {manifest.backend_version} and {installed} is installed, "
            f"engines run only with the version that built them: {REBUILD}"
        )
    if manifest.adaptive:
        from runtime.backends.chain import Room
        from runtime.backends.tensorrt_chain import TensorRTChain

        return TensorRTChain(folder, Room.of(manifest), name)
    from runtime.backends.tensorrt import TensorRTVision

    return TensorRTVision(Path(folder) / ENGINE_FILE, name)
