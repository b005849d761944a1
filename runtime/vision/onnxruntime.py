"""ONNX Runtime on the CPU: runs `vision.onnx` on any machine, with no GPU and no compiled engine.

The session is made once; outputs are bound once to tensors that this object owns, and the input is bound to the
caller's own memory, so a call copies and allocates nothing on our side.

Session options, as measured on two cores with an exported SigLIP tower (6 layers of width 576, 8 frames of 256 tokens,
interleaved runs): optimiser level, memory pattern, arena and weight prepacking change nothing beyond noise, so they
stay at their defaults. Spinning is off: it buys no time here, and worker threads that spin after a run take the cores
from the decoder that comes next (a 1024 x 1024 matrix product in torch right after a run: 61 ms with spinning, 32 ms
without). bf16 graphs do not load: there are no CPU kernels for them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.engine.layout import (
    DTYPES,
    FRAMES,
    FRAMES_DTYPE,
    OUTPUTS,
    POSITIONS,
    POSITIONS_DTYPE,
    TOKENS,
    batch_of,
    check_clips,
    check_frames,
)
from runtime.errors import EngineError
from runtime.manifest import REBUILD

# torch dtype -> (how onnxruntime prints it, its number in ONNX's TensorProto.DataType)
_TYPES: dict[torch.dtype, tuple[str, int]] = {
    torch.uint8: ("tensor(uint8)", 2),
    torch.int64: ("tensor(int64)", 7),
    torch.float32: ("tensor(float)", 1),
    torch.float16: ("tensor(float16)", 10),
    torch.bfloat16: ("tensor(bfloat16)", 16),
}


class OnnxRuntimeVision:
    """A `VisionBackend` (see `runtime.vision` for who owns the returned tensors).

    Args:
        onnx_path: the graph; external data lies beside it.
        threads: threads of the session; as many as torch uses by default, since the decoder follows on the same cores.

    Attributes:
        shape: [F, 3, H, W] of the frames it takes, of B > 1 videos at once [B, F, 3, H, W].
        batch: B.

    Raises:
        EngineError: onnxruntime is missing, or the file is missing, damaged, needs kernels that the CPU does not have,
            or does not have the inputs and outputs of `runtime.engine.layout`.
    """

    name = "onnxruntime"
    device = torch.device("cpu")

    def __init__(self, onnx_path: str | os.PathLike[str], threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise EngineError(f"threads must be at least 1, got {threads}")
        self._path = Path(onnx_path)
        self._lock = threading.Lock()
        self._session: Any = open_session(self._path, threads or torch.get_num_threads())
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        if set(inputs) != {FRAMES} or not set(OUTPUTS) <= set(outputs):
            raise EngineError(
                f"{self._path} takes {sorted(inputs)} and returns {sorted(outputs)}, expected {FRAMES} and "
                f"{', '.join(OUTPUTS)}: it is no vision engine of this project; {REBUILD}"
            )
        several = len(inputs[FRAMES].shape) == 5  # a leading B everywhere
        self.shape = _static(self._path, inputs[FRAMES], 4 + several)
        self.batch = batch_of(self.shape)
        dtype_of(self._path, inputs[FRAMES], FRAMES_DTYPE)
        self._tokens = _empty(self._path, outputs[TOKENS], 2 + several, *DTYPES.values())  # [N, D]
        self._positions = _empty(self._path, outputs[POSITIONS], 1 + several, POSITIONS_DTYPE)  # [N]
        self._stack = torch.zeros(self.shape, dtype=FRAMES_DTYPE) if several else None  # of `encode_several`
        self._binding = self._session.io_binding()
        for name, tensor in ((TOKENS, self._tokens), (POSITIONS, self._positions)):
            self._binding.bind_output(name, **memory_of(tensor))

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens [N, D] (dtype of the graph) and positions int64 [N] of frames uint8 [F, 3, H, W].

        All three have a leading B where the graph takes several videos. Both are valid until the next call, which
        writes over them.

        Raises:
            EngineError: frames of another shape or dtype, or onnxruntime failed.
            RuntimeError: called while another call is under way, or after `close`.
        """
        check_frames(frames, self.shape)
        frames = frames.cpu().contiguous()  # both are no-ops for frames as `runtime.video` gives them
        with self._turn():
            self._run(frames)
        return self._tokens, self._positions

    def encode_several(self, clips: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Visual tokens [N, D] and positions int64 [N] of each of 1 to B clips uint8 [F, 3, H, W], in one run.

        What is left of B is filled with the last clip. Valid as those of `encode`; errors as there.
        """
        check_clips(clips, self.shape)
        if self._stack is None:
            return [self.encode(clips[0])]
        with self._turn():
            for place in range(self.batch):
                self._stack[place].copy_(clips[min(place, len(clips) - 1)])
            self._run(self._stack)
        return [(self._tokens[place], self._positions[place]) for place in range(len(clips))]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this vision backend is busy with another clip: open one per thread or wait for it")
        try:
            if self._session is None:
                raise RuntimeError("this vision backend is closed")
            yield
        finally:
            self._lock.release()

    def _run(self, frames: Tensor) -> None:
        self._binding.bind_input(FRAMES, **memory_of(frames))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's errors share no base class
            raise EngineError(f"onnxruntime failed on {self._path}: {first_line(error)}") from error

    def close(self) -> None:
        """Free the session. Tensors returned before stay readable."""
        with self._lock:
            self._session = self._binding = None


def open_session(path: Path, threads: int) -> Any:
    """A session for `path` on the CPU.

    Raises:
        EngineError: onnxruntime is missing, or the file is, is damaged or needs kernels that the CPU does not have.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError("onnxruntime is not installed: pip install onnxruntime, or use --backend torch") from error
    if not path.is_file():
        raise EngineError(f"{path} is missing: {REBUILD}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only; they are raised, so the log would say them twice
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        if type(error).__name__ == "NotImplemented":
            remedy = "its dtype has no CPU kernels; build with --fp16 or --fp32, or use --backend torch"
        else:
            remedy = REBUILD
        raise EngineError(f"onnxruntime cannot load {path} ({first_line(error)}): {remedy}") from error


def first_line(error: Exception) -> str:
    """What onnxruntime says, in one line of at most 200 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _static(path: Path, value: Any, rank: int) -> tuple[int, ...]:
    if len(value.shape) != rank or not all(isinstance(size, int) and size > 0 for size in value.shape):
        raise EngineError(f"{path}: {value.name} has shape {value.shape}, expected {rank} fixed sizes; {REBUILD}")
    return tuple(value.shape)


def dtype_of(path: Path, value: Any, *allowed: torch.dtype) -> torch.dtype:
    """The dtype of a session's input or output. Raises EngineError if it is none of `allowed`."""
    for dtype in allowed:
        if _TYPES[dtype][0] == value.type:
            return dtype
    expected = " or ".join(_TYPES[dtype][0] for dtype in allowed)
    raise EngineError(f"{path}: {value.name} is {value.type}, expected {expected}; {REBUILD}")


def _empty(path: Path, value: Any, rank: int, *allowed: torch.dtype) -> Tensor:
    return torch.empty(_static(path, value, rank), dtype=dtype_of(path, value, *allowed))


def memory_of(tensor: Tensor) -> dict[str, Any]:
    """Arguments that bind a contiguous CPU tensor's own memory."""
    return {
        "device_type": "cpu",
        "device_id": 0,
        "element_type": _TYPES[tensor.dtype][1],
        "shape": list(tensor.shape),
        "buffer_ptr": tensor.data_ptr(),
    }
