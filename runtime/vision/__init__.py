"""Vision backends: everything that turns the frames of one clip into visual tokens, behind one small protocol.

`torch` runs the checkpoint's own vision part (the reference), `onnxruntime` runs `vision.onnx`, `tensorrt` and
`tensorrt-rtx` run `vision.engine`, or with the adaptive schedule a chain of such files, or one for each of several
frame counts. Where clips come in chunks it is two of them, and the backend also takes the frames of a clip as they
come. Nothing is imported here but the backend that is opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

# Not `import torch`: in this package that name is the backend's module.
from torch import Tensor, cuda
from torch import device as Device

from runtime.choices import BACKENDS, ENGINE_BACKENDS
from runtime.engine.layout import ENGINE_FILE, ONNX_FILE
from runtime.errors import EngineError
from runtime.manifest import REBUILD, Manifest


class VisionBackend(Protocol):
    """One loaded vision engine; tensors as in `runtime.engine.layout`.

    `batch` is B, the videos that it takes at once; where that is more than 1 it is a `BatchedVision`. Frames may be on
    the CPU, or on `device`, where it runs.

    The tensors that `encode` returns belong to the backend: they are valid until the next `encode` or `close`, which
    writes over them. Splice them into the prompt (a copy anyway) or clone them before that. One call at a time: a
    backend refuses a second one while the first is under way with RuntimeError.
    """

    name: str
    batch: int
    device: Device

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens of one clip.

        Args:
            frames: uint8 [F, 3, H, W], RGB; where `batch` is more than 1 [B, F, 3, H, W].

        Returns:
            tokens [N, D] in the dtype of the graph, positions int64 [N]; likewise with a leading B.

        Raises:
            EngineError: frames of another shape or dtype.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; it cannot be used afterwards. A second call does nothing."""
        ...


class BatchedVision(VisionBackend, Protocol):
    """A backend for several videos at once."""

    def encode_several(self, clips: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Tokens [N, D] and positions [N] of each of 1 to `batch` clips uint8 [F, 3, H, W], in one run.

        They are valid as long as those of `encode`, all together.

        Raises:
            EngineError: too many clips or none, frames of another shape or dtype.
        """
        ...


def encode_one(vision: VisionBackend, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [N, D] and positions [N] of one clip uint8 [F, 3, H, W], however many videos the backend takes at once."""
    if vision.batch == 1:
        return vision.encode(frames)
    return cast(BatchedVision, vision).encode_several([frames])[0]


def choose_backend(asked: str, manifest: Manifest) -> str:
    """Which of `BACKENDS` (but "auto") runs this engine here.

    "auto" takes the compiled engine where there is a GPU that torch can use, else ONNX Runtime; graphs in bf16, for
    which that has no kernels on a CPU, run in PyTorch there. A backend asked for by name is never exchanged for
    another.

    Raises:
        EngineError: an unknown name, or the folder has no file for it.
    """
    compiled = manifest.backend if manifest.backend in ENGINE_BACKENDS else None
    graphs = [name for count in manifest.counts for name in manifest.at(count).stage_files(ONNX_FILE)]
    has_graph = all(name in manifest.files for name in graphs)
    if asked == "auto":
        if compiled and (cuda.is_available() or not has_graph):
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
    """Load the engine of a folder whose manifest was read (and thereby checked).

    Of several frame counts all are loaded, and each call runs the one that its frames fit
    (`runtime.vision.by_frames`).

    Args:
        asked: "auto" or one of `ENGINE_BACKENDS` ("torch" needs a checkpoint: `runtime.vision.torch`).
        threads: of onnxruntime; torch's number by default.
        frames: load only these of the frame counts (default: all).

    Raises:
        EngineError: see `choose_backend`; that is "torch"; the library is missing or of another version than the
            engine's; the file cannot be loaded.
    """
    name = choose_backend(asked, manifest)
    counts = manifest.counts if not frames else tuple(sorted(set(frames)))
    if len(counts) > 1:
        from runtime.vision.by_frames import ByFrames

        each: dict[int, VisionBackend] = {}
        try:
            for count in counts:
                each[count] = open_backend(name, folder, manifest.at(count), threads=threads)
        except BaseException:
            for backend in each.values():
                backend.close()
            raise
        return ByFrames(each)
    manifest = manifest.at(counts[0])
    if name == "torch":
        raise EngineError(f"engine {manifest.name} runs here in PyTorch, from its checkpoint: use Pipeline.load")
    if name == "onnxruntime" and manifest.adaptive:
        from runtime.vision.chain import Room
        from runtime.vision.onnxruntime_chain import OnnxRuntimeChain

        return OnnxRuntimeChain(folder, Room.of(manifest), threads)
    if name == "onnxruntime" and manifest.chunk is not None:
        from runtime.vision.onnxruntime_chunked import OnnxRuntimeChunked

        return OnnxRuntimeChunked(folder, manifest.frames, threads)
    if name == "onnxruntime":
        from runtime.vision.onnxruntime import OnnxRuntimeVision

        return OnnxRuntimeVision(Path(folder) / manifest.file(ONNX_FILE), threads)
    from runtime import trt

    installed = ".".join(map(str, trt.version(trt.load(name))))
    if installed != manifest.backend_version:
        raise EngineError(
            f"engine {manifest.name} was built with {name} {manifest.backend_version} and {installed} is installed, "
            f"engines run only with the version that built them: {REBUILD}"
        )
    if manifest.adaptive:
        from runtime.vision.chain import Room
        from runtime.vision.tensorrt_chain import TensorRTChain

        return TensorRTChain(folder, Room.of(manifest), name)
    if manifest.chunk is not None:
        from runtime.vision.tensorrt_chunked import TensorRTChunked

        return TensorRTChunked(folder, manifest.frames, name)
    from runtime.vision.tensorrt import TensorRTVision

    return TensorRTVision(Path(folder) / manifest.file(ENGINE_FILE), name)
