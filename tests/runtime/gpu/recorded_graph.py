"""CUDA graphs without a GPU: operators are recorded with the tensors that they read and wrote, and run again on those.

What makes a real capture wrong makes this one wrong or fail: Python that decides by what it finds (it runs once), a
tensor that is another one each time, a question to the device (its answer is not known while capturing).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from runtime.gpu.graphs import WARM_UP_RUNS, CaptureError, Replay

# Operators for whose result the host waits.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "unique", "masked_select")


class WaitsForDeviceError(RuntimeError):
    """The host would have had to wait for the device."""


class _Recorder(TorchDispatchMode):
    """Records operators, or only watches that none waits."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            raise WaitsForDeviceError(f"{func} while capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_map(_address, (args, kwargs or {}, out))))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
                continue
            given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            wanted = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and _storage(leaf) not in given]
            if wanted:  # else a view: it shows what is there
                again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for mine, new in zip(wanted, again, strict=True):
                    mine.copy_(new)


def _address(thing: Any) -> Any:
    """A tensor's memory, and not the tensor: it may be given other memory later."""
    return thing.detach() if isinstance(thing, Tensor) else thing


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block an operator that would make the host wait for a GPU raises `WaitsForDeviceError`."""
    with _Recorder():
        yield


class RecordedReplay(Replay):
    """A `Replay` whose captures are recordings.

    Attributes:
        captures, replays: how many there were of each key, in order.
        fail: what the next captures fail with.
    """

    def __init__(self) -> None:
        self.captures: list[object] = []
        self.replays = 0
        self.fail: str | None = None
        super().__init__(torch.device("cpu"))

    def clear(self) -> None:
        super().clear()
        self.reason = None  # this one needs no GPU

    def prepare(self, key: Any, function: Callable[[], None], rewind: Callable[[], None]) -> None:
        before = key in self
        super().prepare(key, function, rewind)
        if key in self and not before:
            self.captures.append(key)

    def _capture(self, function: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
        for _ in range(WARM_UP_RUNS):
            rewind()
            function()
        rewind()
        recorder = _Recorder()
        try:
            if self.fail is not None:
                raise RuntimeError(self.fail)
            with recorder:
                function()
        except RuntimeError as error:
            raise CaptureError(f"the capture failed: {error}") from error

        def play() -> None:
            self.replays += 1
            recorder.play()

        return play
