"""Clips in chunks in ONNX Runtime on the CPU: `vision.0.onnx` for each chunk, `vision.1.onnx` for the rest.

Two sessions, opened once. Inputs and outputs are bound to memory that lives as long as the backend or the clip (see
`runtime.vision.chunked_engine`), so a call allocates nothing on our side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from runtime.engine.layout import CHUNK_STAGES, ONNX_FILE, chunk_tensors, stage_file
from runtime.vision.chunked_engine import ChunkedEngine
from runtime.vision.onnxruntime_stages import Stages


class OnnxRuntimeChunked(ChunkedEngine):
    """A `ChunkedVision` around the graphs of an engine folder.

    Args:
        folder: of the engine.
        frames: F, as its manifest has it.
        threads: of each session; as many as torch uses by default. No two sessions run at a time.

    Raises:
        EngineError: onnxruntime is missing, or a graph is, or is damaged, needs kernels that the CPU does not have or
            does not fit the other.
    """

    def __init__(self, folder: str | os.PathLike[str], frames: int, threads: int | None = None) -> None:
        paths = [Path(folder) / stage_file(ONNX_FILE, stage) for stage in range(CHUNK_STAGES)]
        self._stages = Stages(paths, threads)
        super().__init__("onnxruntime", paths, self._stages.tensors, frames)

    def _run(self, stage: int, tensors: Mapping[str, Tensor]) -> None:
        self._stages.run(stage, *chunk_tensors(stage, self._received), tensors)

    def _free(self) -> None:
        self._stages.free()
