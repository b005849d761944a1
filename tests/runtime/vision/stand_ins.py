"""TensorRT and CUDA as far as a machine without a GPU can go: stand-ins that write down what was asked of them.

They prove the order (wait, copy, run, event), the shapes and the addresses, not that a GPU agrees.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from earlytom.config import EarlyTomConfig
from runtime import trt as seam
from runtime.engine.layout import ENGINE_FILE, Graph, Layout, Sizes
from runtime.gpu import streams
from runtime.vision import tensorrt
from runtime.vision.open import open_tensorrt

Tensors = dict[str, tuple[tuple[int, ...], str]]
# Engines of every mode, for clips of 4 frames of 8 x 8: tokens inside the tower 5, its width 6; the LLM's width 7.
LAYOUTS = {
    "whole": Layout(EarlyTomConfig(schedule="budget"), 4),
    "batch": Layout(EarlyTomConfig(schedule="budget"), 4, batch=3),
    "adaptive": Layout(EarlyTomConfig(merge_layers=(1,), retention_ratio=0.5), 4, sizes=Sizes(tokens_per_frame=3)),
    "chunked": Layout(EarlyTomConfig(merge_layers=(1,), schedule="budget"), 4, chunk=2),
}
_KINDS = {"frames": "UINT8"} | dict.fromkeys(("count", "positions", "place"), "INT64")
_KINDS |= dict.fromkeys(("received", "sources", "made_of", "bias"), "FLOAT")

INPUTS = ("frames", "pixels", "hidden", "received", "made_of")


def tensors_of(part: Graph, batch: int = 1) -> Tensors:
    """Shape and dtype of what a graph of one of `LAYOUTS` has."""
    videos = () if batch == 1 else (batch,)
    found: Tensors = {}
    for tensor in (*part.inputs, *part.outputs):
        name = tensor.name.removeprefix("merged_")
        rows = tensor.shape[0] if name in ("hidden", "received", "sources", "made_of") else 0
        tokens = -1 if "count" in part.names else 9
        sizes: dict[str, tuple[int, ...]] = {
            "frames": tuple(size or 8 for size in tensor.shape),
            "hidden": (rows or 0, 5, 6),
            "received": (rows or 0, 5),
            "tokens": (*videos, tokens, 7),
            **dict.fromkeys(("positions", "place", "bias"), (*videos, tokens)),
            "sources": (*videos, tensor.shape[-2] or 0, 4) if tensor.name == "sources" else (),
            "made_of": (rows or 0, 4),
            "count": (1,),
        }
        found[tensor.name] = (sizes[name], _KINDS.get(name, "HALF"))
    return found


class Engine:
    """A deserialised engine, which is its own context: it keeps what it is told, and notes its runs in `log`.

    Attributes:
        kept: what it writes as its count, if it has one.
        refuses: whether it refuses to run.
        shapes, addresses: what it was told.
    """

    def __init__(self, part: Graph, tensors: Tensors, log: list[str]) -> None:
        self.part, self.tensors, self.log = part, tensors, log
        self.kept, self.refuses, self.room = 1, False, True
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.num_io_tensors = len(tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return f"TensorIOMode.{'INPUT' if name in INPUTS else 'OUTPUT'}"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> str:
        return f"DataType.{self.tensors[name][1]}"

    def create_execution_context(self) -> Engine | None:
        return self if self.room else None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: str) -> bool:
        what = "run" if self.part.stage is None else f"stage {self.part.stage}"
        told = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())
        self.log.append(f"{what} on {stream}" + (f": {told}" if told else ""))
        if "count" in self.addresses:
            ctypes.c_int64.from_address(self.addresses["count"]).value = self.kept
        return not self.refuses


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.cuda_stream, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    def wait_event(self, event: Any) -> None:
        self.log.append(f"{self.cuda_stream} waits for {event.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.cuda_stream}")


class Gpu:
    """Stand-ins in place of torch's CUDA and the library; everything lands in `log`.

    Attributes:
        engines: what the library deserialises next, in their order; None: it refuses.
        recorded: address and stream of every tensor that a stream was said to read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.engines: list[Engine | None] = []
        self.recorded: list[tuple[int, str]] = []
        log, current = self.log, [Stream("caller", self.log)]

        class Event:
            names = itertools.cycle(("copy", "end"))

            def __init__(self) -> None:
                self.name = next(self.names)

            def record(self, stream: Stream) -> None:
                log.append(f"{stream.cuda_stream} notes {self.name}")

            def synchronize(self) -> None:
                log.append(f"host waits for {self.name}")

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            log.append("{")
            current.append(stream)
            try:
                yield
            finally:
                current.pop()
                log.append("}")

        cuda = SimpleNamespace(
            is_available=lambda: True,
            device=lambda device: contextlib.nullcontext(),
            Stream=lambda device: Stream("engine", log),
            Event=Event,
            stream=on,
            current_stream=lambda device: current[-1],
            synchronize=lambda device: log.append("host waits for all"),
        )
        stand_in = SimpleNamespace(
            cuda=cuda,
            uint8=torch.uint8,
            int64=torch.int64,
            empty=torch.empty,
            zeros=lambda *shape, pin_memory=False, **kind: torch.zeros(*shape, **kind),
        )
        for module in (streams, tensorrt):
            monkeypatch.setattr(module, "torch", stand_in)
        monkeypatch.setattr("runtime.vision.open.torch", stand_in)
        monkeypatch.setattr(
            torch.Tensor,
            "record_stream",
            lambda tensor, stream: self.recorded.append((tensor.data_ptr(), stream.cuda_stream)),
        )
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: self.engines.pop(0))
        library = SimpleNamespace(__version__="1.7.1", ILogger=object, Runtime=lambda logger: runtime)
        monkeypatch.setattr(seam, "load", lambda flavour: library)
        monkeypatch.setattr(seam, "errors_of", lambda logger: ["out of memory"])

    def open(self, folder: Path, layout: Layout) -> tuple[Any, list[Engine]]:
        """The backend for an engine of `LAYOUTS`, and the engines in it; the log begins anew."""
        engines = [Engine(part, tensors_of(part, layout.batch), self.log) for part in layout.graphs]
        self.engines = list(engines)
        for part in layout.graphs:
            (folder / part.file(ENGINE_FILE)).write_bytes(b"plan")
        vision = open_tensorrt(folder, layout, "tensorrt-rtx", device="cpu")
        assert any(line.startswith(("run", "stage 0")) for line in self.log)  # the warm-up
        assert self.log[-1] == ("}" if layout.adaptive else "host waits for all")
        self.log.clear()
        self.recorded.clear()
        return vision, engines
