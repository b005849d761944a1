"""CUDA graphs of functions that work in fixed buffers, and the copy of a number to the host.

A function to be replayed takes nothing, returns nothing, and reads and writes the same tensors each time: a CUDA graph
records kernels and addresses, so Python does not run again.

    replay = Replay(device)
    replay.prepare("step", step, rewind)  # warms up and captures
    replay("step", step)                  # replays; without a capture (on a CPU, say) it calls `step`

Nothing here knows of decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

WARM_UP_RUNS = 2  # the first loads kernels and chooses algorithms, the second runs as later ones do


class CaptureError(Exception):
    """A capture failed; the message is the reason."""


class Replay:
    """CUDA graphs by key, captured once each; where capture is impossible, the functions themselves are called.

    Calls may come from several threads, one at a time.

    Attributes:
        reason: why functions are called and not replayed; None if graphs can be used. The first reason is kept until
            `clear`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: dict[Hashable, Callable[[], None]] = {}
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None
        self.reason: str | None = None
        self.clear()

    def prepare(self, key: Hashable, function: Callable[[], None], rewind: Callable[[], None]) -> None:
        """Capture `function` under `key`, unless that was done or there is a `reason` not to.

        A failed capture is no error, but a `reason`; errors of `function` in the warm-up are raised.

        Args:
            key: identifies the function and the buffers that it works in.
            function: see the module's docstring. It is run a few times.
            rewind: undoes what `function` changes; called before each run, not after the last.
        """
        if key in self._graphs or self.reason is not None:
            return
        try:
            self._graphs[key] = self._capture(function, rewind)
        except CaptureError as failure:
            self.refuse(str(failure))

    def __call__(self, key: Hashable, function: Callable[[], None]) -> None:
        """Replay the graph of `key` on the current stream; call `function` if there is none."""
        self._graphs.get(key, function)()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def refuse(self, reason: str) -> None:
        """Capture nothing from now on, because of `reason`; existing graphs are still replayed."""
        if self.reason is None:
            self.reason = reason

    def clear(self) -> None:
        """Forget all graphs and any reason; needed when buffers or weights have moved."""
        self._graphs = {}
        self._pool = self._side = None
        self.reason = None if self.device.type == "cuda" else f"CUDA graphs need a GPU, and this runs on {self.device}"

    def _capture(self, function: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
        """A callable that replays `function`. Raises CaptureError if it cannot be captured."""
        if self._side is None:
            # One stream and one memory pool for all graphs: libraries keep workspaces per stream, and graphs can share
            # the pool because they run one at a time and leave nothing in it.
            self._side, self._pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self._side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self._side):
                    self._record(graph, function, rewind)
            finally:
                torch.cuda.current_stream().wait_stream(self._side)
        return graph.replay

    def _record(self, graph: torch.cuda.CUDAGraph, function: Callable[[], None], rewind: Callable[[], None]) -> None:
        """On the side stream: warm up, since libraries cannot initialise during a capture, then capture."""
        for _ in range(WARM_UP_RUNS):
            rewind()
            function()
        rewind()
        try:
            # thread_local: other threads may allocate during the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                function()
        except Exception as error:  # the warm-up succeeded, so this is an error of the capture
            # Ending a broken capture fails, too, with a less informative error.
            origin = error.__context__ if isinstance(error.__context__, Exception) else error
            words = str(origin).strip().splitlines() or [type(origin).__name__]
            raise CaptureError(f"the capture of a CUDA graph failed: {words[0]}") from error


class ToHost:
    """Reads one int64 from the device. On a GPU the host waits for that number only, not for work queued after it.

    Nothing is allocated: the copy goes to the same pinned memory each time.
    """

    def __init__(self, device: torch.device) -> None:
        self._landing: Tensor | None = None
        if device.type == "cuda":
            self._landing = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._arrived = torch.cuda.Event()

    @torch.inference_mode()
    def __call__(self, number: Tensor) -> int:
        """The value of `number`, int64 [] on the device, after the work queued so far on its current stream."""
        if self._landing is None:
            return int(number)
        self._landing.copy_(number, non_blocking=True)
        self._arrived.record(torch.cuda.current_stream(number.device))  # this thread's current device may be another
        self._arrived.synchronize()
        return int(self._landing)
