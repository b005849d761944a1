"""The adaptive schedule's chain in ONNX Runtime on the CPU: `vision.0.onnx`, `vision.1.onnx`, ...

One session a stage, all opened once. Inputs and outputs are bound to the rows of the chain's own buffers (see
`runtime.backends.chain`), the frames to the caller's memory, so a call copies and allocates nothing on our side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.backends.chain import DYNAMIC, ChainVision, Room, Tensors
from runtime.backends.onnxruntime import dtype_of, first_line, memory_of, open_session
from runtime.contract import DTYPES, FRAMES_DTYPE, ONNX_FILE, POSITIONS_DTYPE, stage_file, stage_tensors
from runtime.errors import EngineError


class OnnxRuntimeChain(ChainVision):
    """A `VisionBackend` around the graphs of an engine folder.

    Args:
        folder: of the engine.
        room: see `Room.of`.
        threads: of each session; as many as torch uses by default. No two sessions run at a time.

    Raises:
        EngineError: onnxruntime is missing, or a graph is, or is damaged, needs kernels that the CPU does not have or
            does not fit the others.
    """

    def __init__(self, folder: str | os.PathLike[str], room: Room, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise EngineError(f"threads must be at least 1, got {threads}")
        self._paths = [Path(folder) / stage_file(ONNX_FILE, stage) for stage in range(room.merges + 1)]
        self._sessions: list[Any] = [open_session(path, threads or torch.get_num_threads()) for path in self._paths]
        graphs = [session_tensors(path, session) for path, session in zip(self._paths, self._sessions, strict=True)]
        super().__init__("onnxruntime", self._paths, graphs, room)
        self._bindings: list[Any] = [session.io_binding() for session in self._sessions]

    def _encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        return super()._encode(frames.cpu().contiguous())  # both are no-ops for frames as `runtime.video` gives them

    def _run(self, stage: int, tensors: Mapping[str, Tensor]) -> None:
        binding = self._bindings[stage]
        inputs, outputs = stage_tensors(stage, self.stages)
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


def session_tensors(path: Path, session: Any) -> Tensors:
    allowed = {*DTYPES.values(), FRAMES_DTYPE, POSITIONS_DTYPE}
    return {
        value.name: (
            tuple(size if isinstance(size, int) else DYNAMIC for size in value.shape),
            dtype_of(path, value, *sorted(allowed, key=str)),
        )
        for value in (*session.get_inputs(), *session.get_outputs())
    }
