"""Engines on an NVIDIA GPU, through either TensorRT flavour.

The caller has checked the manifest; here engines are deserialised and their contexts are made once, and a run is queued
on the current stream (see `runtime.gpu.streams`). An engine of a single graph always has the same shapes and addresses,
so its kernels are captured as a CUDA graph that a call replays; where capture is impossible, each call launches them
(`TensorRTRunner.unreplayed` says why).

Written for a GPU and unverified without one: what a test on a CPU can reach is the order of the calls and the errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import trt as seam
from runtime.engine import layout
from runtime.engine.dtypes import NAMED, TENSORRT
from runtime.engine.layout import FRAMES, OUTPUTS
from runtime.engine.manifest import REBUILD
from runtime.errors import EngineError
from runtime.gpu.graphs import Replay
from runtime.gpu.streams import Here, Lane
from runtime.vision.runner import Tensors


class TensorRTRunner:
    """A `Runner` around a deserialised engine and its context; made by `load`."""

    def __init__(
        self, flavour: str, path: Path, part: layout.Graph, loaded: tuple[Any, Any], device: torch.device, logger: Any
    ) -> None:
        self.name = flavour
        self.path = path
        self.device = device
        self._runtime, self._engine = loaded
        self._logger = logger
        self._what = "the engine" if part.stage is None else f"stage {part.stage}"
        alone = part.stage is None
        self.tensors = engine_tensors(path, self._engine, part) if alone else all_tensors(path, self._engine)
        # Stages of a chain have a dynamic first dimension, which is set in each run.
        self._told = [tensor.name for tensor in part.inputs] if layout.COUNT in part.names else []
        self._replay: Replay | None = None
        self.context: Any = None

    def make_context(self) -> None:
        """Raise EngineError if there is no room for an execution context."""
        self.context = self._engine.create_execution_context()
        if self.context is None:
            raise EngineError(
                f"{self.name} cannot run {self.path} here ({self._complaint()}): free GPU memory, or build with fewer "
                "--frames"
            )

    def lane(self, shape: Sequence[int], *, kept: bool = False, waits: bool = False) -> Lane:
        return Lane(self.device, shape, waits=waits)

    def fix(self, tensors: Mapping[str, Tensor], lane: Here) -> None:
        """Set these addresses and that of the lane's frames once, and capture the engine's kernels."""
        assert isinstance(lane, Lane)
        self._tell({FRAMES: lane.frames, **tensors})
        replay = Replay(lane.device)
        # tensorrt-rtx can tell beforehand, and a failed capture leaves torch before 2.13 in a bad state.
        capturable = getattr(self.context, "is_stream_capturable", None)
        if capturable is not None and not capturable(lane.stream.cuda_stream):
            replay.refuse(f"{self.name} says that this engine's kernels cannot be captured as a CUDA graph")
        replay.prepare(self.path, self._launch, lambda: None)
        self._replay = replay

    @property
    def unreplayed(self) -> str | None:
        """Why kernels are launched one by one and not as a CUDA graph; None if they are replayed."""
        return "addresses differ from run to run" if self._replay is None else self._replay.reason

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """Queue a run on the current stream."""
        if self._replay is not None:
            self._replay(self.path, self._launch)
            return
        for name in self._told:
            shape = tuple(tensors[name].shape)
            if not self.context.set_input_shape(name, shape):
                raise EngineError(
                    f"{self.name} refused {name} {list(shape)} of {self._what}: {self._complaint()}; {REBUILD}"
                )
        self._tell(tensors)
        self._launch()

    def _tell(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not self.context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"{self.name} refused a buffer for {name}: {self._complaint()}; {REBUILD}")

    def _launch(self) -> None:
        """Launch the engine's kernels on the current stream."""
        if not self.context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise EngineError(f"{self.name} refused to run {self._what}: {self._complaint()}")

    def close(self) -> None:
        # In this order: the CUDA graph uses the context, the context its engine, the engine its runtime.
        if self._replay is not None:
            self._replay.clear()
        self.context = None
        self._engine = None
        self._runtime = None

    def _complaint(self) -> str:
        return complaint(self._logger)


def load(
    paths: Sequence[Path], parts: Sequence[layout.Graph], flavour: str, device: torch.device | str = "cuda"
) -> list[TensorRTRunner]:
    """A runner for each engine file.

    Args:
        paths, parts: the files, and the graphs' layouts.
        flavour: "tensorrt" or "tensorrt-rtx", the one they were built with.
        device: the CUDA device to run on, default the current one.

    Raises:
        EngineError: a file is missing, no GPU that torch can use, the flavour is missing, an engine was built by
            another version or for another GPU, or its tensors are not those of a vision engine.
    """
    for path in paths:
        if not path.is_file():
            raise EngineError(f"{path} is missing: {REBUILD}")
    require_gpu(flavour)
    trt = seam.load(flavour)
    logger = seam.collecting_logger(trt)
    with torch.cuda.device(device):
        where = torch.empty(0, device=device).device  # with its index
        loaded = [load_engine(path, flavour, trt, logger) for path in paths]
        runners = [
            TensorRTRunner(flavour, path, part, engine, where, logger)
            for path, part, engine in zip(paths, parts, loaded, strict=True)
        ]
        for runner in runners:
            runner.make_context()
    return runners


def complaint(logger: Any) -> str:
    """The library's last error message."""
    return (seam.errors_of(logger) or ["it gave no reason"])[-1]


def load_engine(path: Path, flavour: str, trt: Any, logger: Any) -> tuple[Any, Any]:
    """The library's runtime, which must outlive the engine, and the deserialised engine."""
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(
            f"{flavour} {trt.__version__} cannot load {path} ({complaint(logger)}): it was built by another version or "
            f"for another GPU; {REBUILD}"
        )
    return runtime, engine


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


def engine_tensors(path: Path, engine: Any, part: layout.Graph) -> Tensors:
    """Shape and dtype of every tensor of a single-graph engine, by name, checked against its layout."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if str(engine.get_tensor_mode(name)).endswith("INPUT")]
    if inputs != [FRAMES] or not set(OUTPUTS) <= set(names):
        raise EngineError(
            f"{path} takes {inputs} and returns {sorted(set(names) - set(inputs))}, expected {FRAMES} and "
            f"{', '.join(OUTPUTS)}: it is no vision engine of this project; {REBUILD}"
        )
    tensors = all_tensors(path, engine)
    expected = (*part.inputs, *part.outputs)
    for tensor in expected:
        shape, rank = tensors[tensor.name][0], len(tensor.shape)
        if len(shape) != rank:
            raise EngineError(f"{path}: {tensor.name} has shape {list(shape)}, expected {rank} sizes; {REBUILD}")
    for name, (shape, dtype) in tensors.items():
        if min(shape, default=1) < 1:
            kind = next(kind for kind, known in TENSORRT.items() if known == dtype)
            raise EngineError(f"{path}: {name} is {kind} {list(shape)}, expected fixed sizes; {REBUILD}")
    for tensor in expected:
        allowed = [NAMED[name] for name in tensor.dtypes]
        if tensors[tensor.name][1] not in allowed:
            kinds = " or ".join(map(str, allowed))
            raise EngineError(f"{path}: {tensor.name} is {tensors[tensor.name][1]}, expected {kinds}; {REBUILD}")
    return tensors


def all_tensors(path: Path, engine: Any) -> Tensors:
    """Shape (`layout.VARIES` for a dynamic dimension) and dtype of every tensor of an engine, by name."""
    return {name: _tensor(path, engine, name) for name in map(engine.get_tensor_name, range(engine.num_io_tensors))}


def _tensor(path: Path, engine: Any, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    shape = tuple(engine.get_tensor_shape(name))
    kind = str(engine.get_tensor_dtype(name)).rsplit(".", maxsplit=1)[-1]
    if kind not in TENSORRT:
        raise EngineError(f"{path}: {name} is {kind} {list(shape)}, expected a known dtype; {REBUILD}")
    return shape, TENSORRT[kind]
