"""The interface to run one graph of an engine with any library, and checks that all backends share.

The backends (`whole`, `adaptive`, `chunked`) know no library; a `Runner` knows nothing of the other graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from runtime.engine import layout
from runtime.engine.dtypes import NAMED
from runtime.engine.manifest import REBUILD
from runtime.errors import EngineError
from runtime.gpu.streams import Here

CLOSED = "this vision backend is closed"
# Name -> shape and dtype; a dimension that depends on the video is `layout.VARIES`.
Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Runner(Protocol):
    """One loaded graph.

    Attributes:
        name: of the backend.
        path: the file.
        tensors: its inputs and outputs.
        device: where it runs.
    """

    name: str
    path: Path
    tensors: Tensors
    device: torch.device

    def lane(self, shape: Sequence[int], *, kept: bool = False, waits: bool = False) -> Here:
        """The stream of its work; arguments as in `runtime.gpu.streams`."""
        ...

    def fix(self, tensors: Mapping[str, Tensor], lane: Here) -> None:
        """Bind these tensors for all later runs."""
        ...

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """Run on these contiguous tensors, inputs and outputs by name; outputs are written in place.

        Raises:
            EngineError: the library failed.
        """
        ...

    def close(self) -> None:
        """Free the graph, which must not be running."""
        ...


class CallGuard:
    """Allows one call at a time, until closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The block is a call. Raises RuntimeError during another call, or once closed."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this vision backend is busy with another clip: open one per thread or wait for it")
        try:
            if self._closed:
                raise RuntimeError(CLOSED)
            yield
        finally:
            self._lock.release()

    @contextmanager
    def closing(self) -> Iterator[bool]:
        """Wait for the current call and mark as closed; yields False if that was done before."""
        with self._lock:
            first, self._closed = not self._closed, True
            yield first


def check_names(runner: Runner, part: layout.Graph, what: str) -> None:
    """Raise EngineError unless the graph has the tensors of `part`; `what` follows "stage 1" in the message."""
    if set(runner.tensors) != part.names:
        raise EngineError(
            f"{runner.path} has the tensors {', '.join(sorted(runner.tensors))}, stage {part.stage} of {what} has "
            f"{', '.join(sorted(part.names))}: {REBUILD}"
        )


def fixed(runner: Runner, tensor: layout.Tensor, first: int | None = None) -> tuple[int, ...]:
    """The shape of a graph's tensor, with its first dimension replaced by `first`, if given."""
    shape, dtype = runner.tensors[tensor.name]
    sizes = shape if first is None else (first, *shape[1:])
    if (
        len(shape) != len(tensor.shape)
        or min(sizes) < 1
        or dtype not in (allowed := [NAMED[name] for name in tensor.dtypes])
    ):
        expected = " or ".join(str(kind).removeprefix("torch.") for kind in allowed)
        raise EngineError(
            f"{runner.path}: {tensor.name} is {dtype} {list(shape)}, expected {expected} of {len(tensor.shape)} sizes; "
            f"{REBUILD}"
        )
    return sizes
