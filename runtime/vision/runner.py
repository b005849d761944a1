"""How one graph of an engine runs: what the orders ask of a library, what they check first, and whose turn it is.

The orders (`whole`, `adaptive`, `chunked`) know no library; a `Runner` knows nothing of the other graphs.
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
# Name -> shape and dtype; a size that only the video tells is `layout.VARIES`.
Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Runner(Protocol):
    """One graph, loaded.

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
        """Where its work is queued; arguments as of `runtime.gpu.streams`."""
        ...

    def fix(self, tensors: Mapping[str, Tensor], lane: Here) -> None:
        """Use these tensors in every run, which need not be given them again."""
        ...

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """Run on these tensors, its inputs and outputs by name, contiguous; outputs are written where they are.

        Raises:
            EngineError: the library failed.
        """
        ...

    def close(self) -> None:
        """Let go of the graph, which must not be running."""
        ...


class CallGuard:
    """One call at a time, of something that is closed once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The block is a call. Raises RuntimeError while another one is under way, and once closed."""
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
        """The block closes, once the call under way is done; False where that was done before."""
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
    """The shape of a graph's tensor, with `first` in place of its first size, if that is given."""
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
