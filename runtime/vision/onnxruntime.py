"""ONNX Runtime on the CPU: runs an engine's ONNX graphs on any machine, with no GPU and no compiled engine.

A session is made once; inputs and outputs are bound to existing memory, so that a run copies and allocates nothing on
this side.

Session options, as measured on two cores with an exported vision tower (6 layers of width 576, 8 frames of 256 tokens,
interleaved runs): optimiser level, memory pattern, arena and weight prepacking change nothing beyond noise, so they
stay at their defaults. Spinning is off: it saves no time here, and worker threads that spin after a run take cores from
the decoder that runs next (a 1024 x 1024 matrix product in torch right after a run: 61 ms with spinning, 32 ms
without). bf16 graphs do not load: there are no CPU kernels for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.engine import layout
from runtime.engine.dtypes import FLOATS, FRAMES_DTYPE, NAMED, ONNX, POSITIONS_DTYPE
from runtime.engine.layout import FRAMES, OUTPUTS, VARIES
from runtime.engine.manifest import REBUILD
from runtime.errors import EngineError
from runtime.gpu.streams import Here
from runtime.vision.runner import Tensors


class OnnxRunner:
    """A `Runner` around one session.

    Args:
        path: the graph; external data lies beside it.
        part: the graph's layout.
        threads: of the session.

    Raises:
        EngineError: onnxruntime is missing, or the file is missing, damaged, needs kernels that the CPU does not have,
            or does not have the inputs and outputs of a vision engine.
    """

    name = "onnxruntime"
    device = torch.device("cpu")

    def __init__(self, path: Path, part: layout.Graph, threads: int) -> None:
        self.path = path
        self.session: Any = open_session(path, threads)
        self.tensors = _whole(path, self.session, part) if part.stage is None else _stage(path, self.session)
        self._inputs = {value.name for value in self.session.get_inputs()}
        self._binding = self.session.io_binding()

    def lane(self, shape: Sequence[int], *, kept: bool = False, waits: bool = False) -> Here:
        return Here(self.device, shape, kept=kept)

    def fix(self, tensors: Mapping[str, Tensor], lane: Here) -> None:
        self._bind(tensors)

    def _bind(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            bind = self._binding.bind_input if name in self._inputs else self._binding.bind_output
            bind(name, **memory_of(tensor))

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        self._bind(tensors)
        try:
            self.session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's errors share no base class
            raise EngineError(f"onnxruntime failed on {self.path}: {_first_line(error)}") from error

    def close(self) -> None:
        """Free the session. Output tensors stay readable."""
        self.session = self._binding = None


def load(paths: Sequence[Path], parts: Sequence[layout.Graph], threads: int | None = None) -> list[OnnxRunner]:
    """A runner for each graph.

    Args:
        paths, parts: the files, and the graphs' layouts.
        threads: of each session; default: torch's number, since the decoder runs on the same cores afterwards.
    """
    if threads is not None and threads < 1:
        raise EngineError(f"threads must be at least 1, got {threads}")
    count = threads or torch.get_num_threads()
    return [OnnxRunner(path, part, count) for path, part in zip(paths, parts, strict=True)]


def open_session(path: Path, threads: int) -> Any:
    """A session for `path` on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError("onnxruntime is not installed: pip install onnxruntime, or use --backend torch") from error
    if not path.is_file():
        raise EngineError(f"{path} is missing: {REBUILD}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: warnings would reach the user's terminal
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        if type(error).__name__ == "NotImplemented":
            remedy = "its dtype has no CPU kernels; build with --fp16 or --fp32, or use --backend torch"
        else:
            remedy = REBUILD
        raise EngineError(f"onnxruntime cannot load {path} ({_first_line(error)}): {remedy}") from error


def _first_line(error: Exception) -> str:
    """onnxruntime's message, in one line of at most 200 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _whole(path: Path, session: Any, part: layout.Graph) -> Tensors:
    """The tensors of an engine's single graph, without outputs that are not in the layout."""
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    if set(inputs) != {FRAMES} or not set(OUTPUTS) <= set(outputs):
        raise EngineError(
            f"{path} takes {sorted(inputs)} and returns {sorted(outputs)}, expected {FRAMES} and "
            f"{', '.join(OUTPUTS)}: it is no vision engine of this project; {REBUILD}"
        )
    return {
        tensor.name: (
            _static(path, (inputs | outputs)[tensor.name], len(tensor.shape)),
            _dtype_of(path, (inputs | outputs)[tensor.name], *(NAMED[name] for name in tensor.dtypes)),
        )
        for tensor in (*part.inputs, *part.outputs)
    }


def _stage(path: Path, session: Any) -> Tensors:
    """The tensors of one of an engine's several graphs; a dynamic dimension is `VARIES`."""
    allowed = sorted({*FLOATS, FRAMES_DTYPE, POSITIONS_DTYPE}, key=str)
    return {
        value.name: (
            tuple(size if isinstance(size, int) else VARIES for size in value.shape),
            _dtype_of(path, value, *allowed),
        )
        for value in (*session.get_inputs(), *session.get_outputs())
    }


def _static(path: Path, value: Any, rank: int) -> tuple[int, ...]:
    if len(value.shape) != rank or not all(isinstance(size, int) and size > 0 for size in value.shape):
        raise EngineError(f"{path}: {value.name} has shape {value.shape}, expected {rank} fixed sizes; {REBUILD}")
    return tuple(value.shape)


def _dtype_of(path: Path, value: Any, *allowed: torch.dtype) -> torch.dtype:
    """The dtype of a session's input or output. Raises EngineError if it is none of `allowed`."""
    for dtype in allowed:
        if ONNX[dtype][0] == value.type:
            return dtype
    expected = " or ".join(ONNX[dtype][0] for dtype in allowed)
    raise EngineError(f"{path}: {value.name} is {value.type}, expected {expected}; {REBUILD}")


def memory_of(tensor: Tensor) -> dict[str, Any]:
    """Arguments that bind a contiguous CPU tensor's own memory."""
    return {
        "device_type": "cpu",
        "device_id": 0,
        "element_type": ONNX[tensor.dtype][1],
        "shape": list(tensor.shape),
        "buffer_ptr": tensor.data_ptr(),
    }
