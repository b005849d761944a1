"""Chooses the backend that runs an engine folder on this machine, and opens the folder with it.

Only the opened backend's library is imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from runtime import trt
from runtime.choices import BACKENDS, ENGINE_BACKENDS
from runtime.engine.layout import ENGINE_FILE, ONNX_FILE, Layout
from runtime.engine.manifest import REBUILD, Manifest
from runtime.errors import EngineError
from runtime.vision import onnxruntime, tensorrt
from runtime.vision.adaptive import Adaptive
from runtime.vision.by_frames import ByFrames
from runtime.vision.chunked import Chunked
from runtime.vision.protocol import VisionBackend
from runtime.vision.runner import Runner
from runtime.vision.whole import Whole


def choose_backend(asked: str, manifest: Manifest) -> str:
    """The one of `BACKENDS` that runs this engine here.

    "auto" takes the compiled engine if torch can use a GPU or the folder has no ONNX graph, else ONNX Runtime, or
    PyTorch for bf16 graphs, for which ONNX Runtime has no CPU kernels. A backend named explicitly is used or refused.

    Raises:
        EngineError: an unknown name, or the folder has no file for it.
    """
    compiled = manifest.backend if manifest.backend in ENGINE_BACKENDS else None
    has_graph = all(graph.file(ONNX_FILE) in manifest.files for graph in manifest.layout.files)
    if asked == "auto":
        if compiled and (torch.cuda.is_available() or not has_graph):
            return compiled
        return "torch" if manifest.dtype == "bf16" else "onnxruntime"
    if asked not in BACKENDS:
        raise EngineError(f"unknown --backend {asked!r}: expected one of {', '.join(BACKENDS)}")
    if asked == "onnxruntime" and manifest.dtype == "bf16":
        raise EngineError("onnxruntime has no bf16 kernels on a CPU: use --backend torch, or build with --fp16")
    if asked == "onnxruntime" and not has_graph:
        raise EngineError(f"engine {manifest.name} has no {manifest.file(ONNX_FILE)} for onnxruntime: {REBUILD}")
    if asked in ("tensorrt", "tensorrt-rtx") and asked != compiled:
        raise EngineError(
            f"engine {manifest.name} was built for {manifest.backend}, not for {asked}: build one with "
            f"python -m builder.build --backend {asked}, or use --backend {compiled or 'onnxruntime'}"
        )
    return asked


def open_backend(
    asked: str,
    folder: str | os.PathLike[str],
    manifest: Manifest,
    *,
    threads: int | None = None,
    frames: Sequence[int] | None = None,
) -> VisionBackend:
    """Load the engines of a folder whose manifest was read (and thereby checked).

    Those of all frame counts are loaded; each call runs the one for its number of frames (`runtime.vision.by_frames`).

    Args:
        asked: "auto" or one of `ENGINE_BACKENDS` ("torch" needs a checkpoint: `runtime.vision.torch`).
        threads: of onnxruntime; default: torch's number.
        frames: load only these frame counts; default: all.

    Raises:
        EngineError: as `choose_backend`; the choice is "torch"; the library is missing or not the version that built
            the engine; the file cannot be loaded.
    """
    name = choose_backend(asked, manifest)
    if name == "torch":
        raise EngineError(f"engine {manifest.name} runs here in PyTorch, from its checkpoint: use Pipeline.load")
    if name != "onnxruntime":
        _check_version(name, manifest)
    opened: dict[int, VisionBackend] = {}
    try:
        for count in sorted(set(frames or manifest.counts)):
            layout = manifest.at(count).layout
            if name == "onnxruntime":
                opened[count] = open_onnxruntime(folder, layout, threads)
            else:
                opened[count] = open_tensorrt(folder, layout, name)
    except BaseException:
        for backend in opened.values():
            backend.close()
        raise
    return next(iter(opened.values())) if len(opened) == 1 else ByFrames(opened)


def open_onnxruntime(folder: str | os.PathLike[str], layout: Layout, threads: int | None = None) -> VisionBackend:
    """The graphs of a folder for one frame count, in ONNX Runtime; errors as those of `runtime.vision.onnxruntime`."""
    paths = [Path(folder) / graph.file(ONNX_FILE) for graph in layout.graphs]
    return _in_order(onnxruntime.load(paths, layout.graphs, threads), layout)


def open_tensorrt(
    folder: str | os.PathLike[str], layout: Layout, flavour: str, device: torch.device | str = "cuda"
) -> VisionBackend:
    """The engines of a folder for one frame count, on a GPU; errors as those of `runtime.vision.tensorrt`."""
    paths = [Path(folder) / graph.file(ENGINE_FILE) for graph in layout.graphs]
    runners = tensorrt.load(paths, layout.graphs, flavour, device)
    with torch.cuda.device(device):
        return _in_order(runners, layout)


def _in_order(runners: Sequence[Runner], layout: Layout) -> VisionBackend:
    if layout.mode == "adaptive":
        return Adaptive(runners, layout)
    return Chunked(runners, layout) if layout.mode == "chunked" else Whole(runners[0])


def _check_version(name: str, manifest: Manifest) -> None:
    installed = ".".join(map(str, trt.version(trt.load(name))))
    if installed != manifest.backend_version:
        raise EngineError(
            f"engine {manifest.name} was built with {name} {manifest.backend_version} and {installed} is installed, "
            f"engines run only with the version that built them: {REBUILD}"
        )
