"""The vision engine on an NVIDIA GPU, through either TensorRT flavour.

The caller has checked the manifest; here the engine is deserialised, its context is made once, every buffer is
allocated once, and warm-up runs take the flavour's own set-up (kernel compilation on the GPU with tensorrt-rtx) out of
the first request. As shapes and addresses never change, the engine's kernels are then captured as a CUDA graph and a
call replays it; where that cannot be captured, each call launches them (`unreplayed` says why). After that `encode`
allocates no tensor and returns before the GPU has run:

    caller's stream ──wait──> engine's stream: copy frames in, run ──event──> caller's stream goes on

The tensors that `encode` returns are the engine's own buffers (see `runtime.vision`): before the next `encode` writes
over them it waits, on the GPU, for what the caller's stream had queued by then.

Written for a GPU and unverified without one: what a test on a CPU can reach is the checks and the errors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import trt as seam
from runtime.engine.layout import (
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
from runtime.gpu.graphs import Replay
from runtime.manifest import REBUILD

# By the names of `DataType`, which both flavours share.
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
}


class TensorRTVision:
    """A `VisionBackend` around a serialised engine.

    Args:
        engine_path: the engine file.
        flavour: "tensorrt" or "tensorrt-rtx", the one it was built with.
        device: the CUDA device to run on, default the current one.

    Attributes:
        shape: [F, 3, H, W] of the frames it takes, of B > 1 videos at once [B, F, 3, H, W].
        batch: B.
        device: as given.
        unreplayed: why the engine's kernels are launched one by one and not as a CUDA graph; None where they are.

    Raises:
        EngineError: no such file, no GPU that torch can use, the flavour is missing, the engine was built by another
            version or for another GPU, or its tensors are not those of `runtime.engine.layout`.
    """

    def __init__(
        self, engine_path: str | Path, flavour: str = "tensorrt-rtx", *, device: torch.device | str = "cuda"
    ) -> None:
        self.name = flavour
        path = Path(engine_path)
        if not path.is_file():
            raise EngineError(f"{path} is missing: {REBUILD}")
        require_gpu(flavour)
        trt = seam.load(flavour)
        self._logger = seam.collecting_logger(trt)
        self._lock = threading.Lock()
        with torch.cuda.device(device):
            self._runtime, self._engine = load_engine(path, flavour, trt, self._logger)
            tensors = engine_tensors(path, self._engine)
            self._context: Any = make_context(path, flavour, self._engine, self._logger)
            self._prepare(tensors)

    def _prepare(self, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Allocate everything a call needs, tell the context where it is, run once."""
        self.shape = tensors[FRAMES][0]
        self.batch = batch_of(self.shape)
        self._buffers = {
            name: torch.zeros(shape, dtype=dtype, device="cuda") for name, (shape, dtype) in tensors.items()
        }
        self.device = self._buffers[FRAMES].device
        self._staging = torch.zeros(self.shape, dtype=FRAMES_DTYPE, pin_memory=True)
        self._stream = torch.cuda.Stream(self.device)
        self._staged, self._finished = torch.cuda.Event(), torch.cuda.Event()
        for name, buffer in self._buffers.items():
            if not self._context.set_tensor_address(name, buffer.data_ptr()):
                raise EngineError(f"{self.name} refused a buffer for tensor {name}: {self._complaint()}; {REBUILD}")
        self._replay = Replay(self.device)
        # tensorrt-rtx says so beforehand, and a capture that breaks off leaves torch before 2.13 in disorder.
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self._stream.cuda_stream):
            self._replay.refuse(f"{self.name} says that this engine's kernels cannot be captured as a CUDA graph")
        self._replay.prepare(self.shape, self._execute, lambda: None)
        self.encode(self._staging)
        torch.cuda.synchronize(self.device)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Run the engine on one clip.

        Args:
            frames: uint8 [F, 3, H, W], RGB at the model's resolution, on the CPU or on the engine's GPU.

        Returns:
            tokens [N, D] and positions int64 [N] on the GPU, ready for work queued on the caller's current stream and
            valid until the next call. All three have a leading B where the engine takes several videos.

        Raises:
            EngineError: frames of another shape or dtype or on another device, or TensorRT refused to run.
            RuntimeError: called while another call is under way, or after `close`.
        """
        check_frames(frames, self.shape)
        self._check_device(frames)
        with self._turn():
            self._queue([(frames, self._staging, self._buffers[FRAMES])])
            return self._buffers[TOKENS], self._buffers[POSITIONS]

    def encode_several(self, clips: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Visual tokens [N, D] and positions int64 [N] of each of 1 to B clips uint8 [F, 3, H, W], in one run.

        What is left of B is filled with the last clip. Places, validity and errors as those of `encode`.
        """
        check_clips(clips, self.shape)
        if self.batch == 1:
            return [self.encode(clips[0])]
        for clip in clips:
            self._check_device(clip)
        filled = [*clips, *[clips[-1]] * (self.batch - len(clips))]
        with self._turn():
            self._queue(list(zip(filled, self._staging.unbind(), self._buffers[FRAMES].unbind(), strict=True)))
            outputs = zip(self._buffers[TOKENS].unbind(), self._buffers[POSITIONS].unbind(), strict=True)
            return list(outputs)[: len(clips)]

    def _check_device(self, frames: Tensor) -> None:
        if frames.device.type != "cpu" and frames.device != self.device:
            raise EngineError(
                f"frames are on {frames.device} and the engine is on {self.device}: move the frames there"
            )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this vision backend is busy with another clip: open one per thread or wait for it")
        try:
            if self._context is None:
                raise RuntimeError("this vision backend is closed")
            yield
        finally:
            self._lock.release()

    def _queue(self, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Queue copies and run on the engine's stream, between what the caller's stream has and will get.

        `parts`: what is to be copied, its place in the pinned buffer, and its place in the engine's.
        """
        caller = torch.cuda.current_stream(self.device)
        if any(frames.device.type == "cpu" for frames, _, _ in parts):
            # Waits for the previous call's copy out of the pinned buffer, which comes before that call's engine run.
            self._staged.synchronize()
            parts = [
                (pinned.copy_(frames) if frames.device.type == "cpu" else frames, pinned, entering)
                for frames, pinned, entering in parts
            ]
        # Frames may still be being made on the caller's stream, and the last outputs may still be being read there.
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            for frames, _, entering in parts:
                entering.copy_(frames, non_blocking=True)
            self._staged.record(self._stream)
            self._replay(self.shape, self._execute)
            self._finished.record(self._stream)
        for frames, _, _ in parts:
            if frames.is_cuda:
                frames.record_stream(self._stream)  # the caller may drop them before the copy has run
        caller.wait_event(self._finished)
        for name in OUTPUTS:
            self._buffers[name].record_stream(caller)  # `close` may drop them while the caller's stream reads them

    def _execute(self) -> None:
        """Launch the engine's kernels on the current stream."""
        if not self._context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise EngineError(f"{self.name} refused to run the engine: {self._complaint()}")

    @property
    def unreplayed(self) -> str | None:
        return self._replay.reason

    def close(self) -> None:
        """Wait for what is running and free the engine; a second call does nothing."""
        with self._lock:
            if self._context is None:
                return
            self._stream.synchronize()
            # In this order: the graph runs the context's kernels; that must not outlive its engine, nor it its runtime.
            self._replay.clear()
            self._context = None
            self._engine = None
            self._runtime = None
            self._buffers = {}

    def _complaint(self) -> str:
        return complaint(self._logger)


def complaint(logger: Any) -> str:
    """What the library complained about last."""
    return (seam.errors_of(logger) or ["it gave no reason"])[-1]


def load_engine(path: Path, flavour: str, trt: Any, logger: Any) -> tuple[Any, Any]:
    """The library's runtime, which must outlive the engine, and the deserialised engine.

    Raises:
        EngineError: the library refuses the file.
    """
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(
            f"{flavour} {trt.__version__} cannot load {path} ({complaint(logger)}): it was built by another version or "
            f"for another GPU; {REBUILD}"
        )
    return runtime, engine


def make_context(path: Path, flavour: str, engine: Any, logger: Any) -> Any:
    """An execution context. Raises EngineError if there is no room for one."""
    context = engine.create_execution_context()
    if context is None:
        raise EngineError(
            f"{flavour} cannot run {path} here ({complaint(logger)}): free GPU memory, or build with fewer --frames"
        )
    return context


def require_gpu(flavour: str) -> None:
    """Raise EngineError unless torch can use a GPU."""
    if torch.cuda.is_available():
        return
    if seam.has_gpu():
        raise EngineError(
            f"{flavour} needs a torch that can use the GPU and {torch.__version__} cannot: install the CUDA build of "
            f"torch, or use --backend onnxruntime"
        )
    raise EngineError(f"a {flavour} engine runs on an NVIDIA GPU and none was found: use --backend onnxruntime")


def engine_tensors(path: Path, engine: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a deserialised engine, by name.

    Raises:
        EngineError: they are not those of `runtime.engine.layout`, or a shape is not fixed.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if str(engine.get_tensor_mode(name)).endswith("INPUT")]
    if inputs != [FRAMES] or not set(OUTPUTS) <= set(names):
        raise EngineError(
            f"{path} takes {inputs} and returns {sorted(set(names) - set(inputs))}, expected {FRAMES} and "
            f"{', '.join(OUTPUTS)}: it is no vision engine of this project; {REBUILD}"
        )
    tensors = all_tensors(path, engine)
    several = len(tensors[FRAMES][0]) == 5  # a leading B everywhere
    for name, rank in ((FRAMES, 4 + several), (TOKENS, 2 + several), (POSITIONS, 1 + several)):
        if len(tensors[name][0]) != rank:
            raise EngineError(f"{path}: {name} has shape {list(tensors[name][0])}, expected {rank} sizes; {REBUILD}")
    for name, (shape, dtype) in tensors.items():
        if min(shape, default=1) < 1:
            kind = next(kind for kind, known in _DTYPES.items() if known == dtype)
            raise EngineError(f"{path}: {name} is {kind} {list(shape)}, expected fixed sizes; {REBUILD}")
    for name, dtype in ((FRAMES, FRAMES_DTYPE), (POSITIONS, POSITIONS_DTYPE)):
        if tensors[name][1] != dtype:
            raise EngineError(f"{path}: {name} is {tensors[name][1]}, expected {dtype}; {REBUILD}")
    return tensors


def all_tensors(path: Path, engine: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """`tensor_of` each tensor of an engine, by name."""
    return {name: tensor_of(path, engine, name) for name in map(engine.get_tensor_name, range(engine.num_io_tensors))}


def tensor_of(path: Path, engine: Any, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape (-1 where it is dynamic) and dtype of an engine's tensor. Raises EngineError for a dtype torch lacks."""
    shape = tuple(engine.get_tensor_shape(name))
    kind = str(engine.get_tensor_dtype(name)).rsplit(".", maxsplit=1)[-1]
    if kind not in _DTYPES:
        raise EngineError(f"{path}: {name} is {kind} {list(shape)}, expected a known dtype; {REBUILD}")
    return shape, _DTYPES[kind]
