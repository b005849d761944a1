"""Several graphs of one folder in ONNX Runtime on the CPU, that run one after the other on memory that others own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.engine.layout import DTYPES, FRAMES_DTYPE, POSITIONS_DTYPE
from runtime.errors import EngineError
from runtime.vision.chain import DYNAMIC, Tensors
from runtime.vision.onnxruntime import dtype_of, first_line, memory_of, open_session


class Stages:
    """One session a graph, opened once.

    Args:
        paths: the graphs in order.
        threads: of each session; as many as torch uses by default. No two of them run at a time.

    Attributes:
        paths: as given.
        tensors: name to shape and dtype, of each graph.

    Raises:
        EngineError: onnxruntime is missing, or a graph is, or is damaged or needs kernels that the CPU does not have.
    """

    def __init__(self, paths: Sequence[Path], threads: int | None) -> None:
        if threads is not None and threads < 1:
            raise EngineError(f"threads must be at least 1, got {threads}")
        self.paths = tuple(paths)
        self._sessions: list[Any] = [open_session(path, threads or torch.get_num_threads()) for path in paths]
        self.tensors = [_tensors(path, session) for path, session in zip(paths, self._sessions, strict=True)]
        self._bindings: list[Any] = [session.io_binding() for session in self._sessions]

    def run(self, stage: int, inputs: Sequence[str], outputs: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Run a graph on these tensors, contiguous and on the CPU; its outputs are written where they are.

        Raises:
            EngineError: onnxruntime failed.
        """
        binding = self._bindings[stage]
        for name in inputs:
            binding.bind_input(name, **memory_of(tensors[name]))
        for name in outputs:
            binding.bind_output(name, **memory_of(tensors[name]))
        try:
            self._sessions[stage].run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no base class
            raise EngineError(f"onnxruntime failed on {self.paths[stage]}: {first_line(error)}") from error

    def free(self) -> None:
        """Let go of the sessions."""
        self._sessions, self._bindings = [], []


def _tensors(path: Path, session: Any) -> Tensors:
    allowed = {*DTYPES.values(), FRAMES_DTYPE, POSITIONS_DTYPE}
    return {
        value.name: (
            tuple(size if isinstance(size, int) else DYNAMIC for size in value.shape),
            dtype_of(path, value, *sorted(allowed, key=str)),
        )
        for value in (*session.get_inputs(), *session.get_outputs())
    }
