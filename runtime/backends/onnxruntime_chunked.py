"""Clips in chunks in ONNX Runtime on the CPU: `vision.0.onnx` for each chunk, `vision.1.onnx` for the rest.

Two sessions, opened once. Inputs and outputs are bound to memory that lives as long as the backend or the clip (see
`runtime.backends.chunked_engine`), so a call allocates nothing on our side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.backends.chunked_engine import ChunkedEngine
from runtime.backends.onnxruntime import first_line, memory_of, open_session
from runtime.backends.onnxruntime_chain import session_tensors
from runtime.contract import CHUNK_STAGES, ONNX_FILE, chunk_tensors, stage_file
from runtime.errors import EngineError


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
        if threads is not None and threads < 1:
            raise EngineError(f"threads must be at least 1, got {threads}")
        self._paths = [Path(folder) / stage_file(ONNX_FILE, stage) for stage in range(CHUNK_STAGES)]
        self._sessions: list[Any] = [open_session(path, threads or torch.get_num_threads()) for path in self._paths]
        graphs = [session_tensors(path, session) for path, session in zip(self._paths, self._sessions, strict=True)]
        super().__init__("onnxruntime", self._paths, graphs, frames)
        self._bindings: list[Any] = [session.io_binding() for session in self._sessions]

    def _run(self, stage: int, tensors: Mapping[str, Tensor]) -> None:
        binding = self._bindings[stage]
        inputs, outputs = chunk_tensors(stage, self._received)
        for name in inputs:
            binding.bind_input(name, **memory_of(tensors[name]))
        for name in outputs:
            binding.bind_output(name, **memory_of(tensors[name]))
        try:
            self._sessions[stage].run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no base class
            raise EngineError(f"onnxruntime failed on {self._paths[stage]}: {first_line(error)}") from error

    def _free(self) -> None:
        self._sessions, self._bindings = [], []
