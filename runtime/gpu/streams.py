"""Streams for an engine's work: the caller's (`Here`), or its own, ordered with the caller's by events (`Lane`).

    caller's stream ──wait──> own stream: copy frames in, run ──event──> caller's stream goes on

`Here` and `Lane` have the same interface. A `Lane` is written for a GPU and unverified without one: what a test on a
CPU can reach is the order of the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from runtime.errors import EngineError


class Here:
    """Work on the caller's stream, or on a CPU; a single clip's frames are read in place.

    Args:
        device: where the work is done.
        shape: of the uint8 frames of one call.
        kept: whether to allocate a buffer for frames.

    Attributes:
        frames: that buffer, uint8 of `shape`; None without `kept`.
    """

    def __init__(self, device: torch.device | str, shape: Sequence[int], *, kept: bool = False) -> None:
        self.frames = torch.zeros(tuple(shape), dtype=torch.uint8, device=device) if kept else None
        self.device = torch.device(device) if self.frames is None else self.frames.device
        self._worked = torch.cuda.Event() if self.device.type == "cuda" else None

    def check(self, frames: Tensor) -> None:
        """Accept frames on any device."""

    @contextmanager
    def bringing(self, clips: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the frames to run on: a single clip itself, or several clips stacked in `frames`."""
        if len(clips) == 1:
            yield clips[0].to(self.device).contiguous()  # both are no-ops for frames as `runtime.video` gives them
            return
        assert self.frames is not None
        for place, clip in zip(self.frames.unbind(), clips, strict=True):
            place.copy_(clip)
        yield self.frames

    @contextmanager
    def working(self) -> Iterator[None]:
        """Order the block's work on shared memory after that of earlier calls, whatever streams they used."""
        if self._worked is None:
            yield
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._worked)
        try:
            yield
        finally:
            self._worked.record(stream)

    def fill(self, frames: Tensor) -> Tensor:
        """Copy frames [c, ...] to the buffer `frames` [C, ...], repeating the last one; returns the buffer."""
        assert self.frames is not None
        _fill(self.frames, frames)
        return self.frames

    def read(self, number: Tensor) -> int:
        """The value of `number` after the work queued so far; waits for it."""
        return int(number)

    def own(self, buffers: Sequence[Tensor]) -> None:
        """Take over memory that was just allocated on the caller's stream; nothing to do on that stream."""

    def hand_over(self, outputs: Sequence[Tensor]) -> None:
        """Give outputs to the caller's stream; nothing to do on that stream."""

    def warm_up(self, run: Callable[[Tensor], Any], shape: Sequence[int]) -> None:
        """Nothing to warm up."""

    def drain(self) -> None:
        """Wait for all queued work; there is none of its own."""


class Lane(Here):
    """Work on its own stream of an NVIDIA GPU; frames are copied through pinned memory to the buffer `frames`.

    Args:
        device: as `Here`; the current device.
        shape: as `Here`.
        waits: whether the host waits for the work of every call anyway (`read`), so that no stream need wait.
    """

    def __init__(self, device: torch.device | str, shape: Sequence[int], *, waits: bool = False) -> None:
        self.frames: Tensor = torch.zeros(tuple(shape), dtype=torch.uint8, device=device)
        self.device = self.frames.device
        self.waits = waits
        self._staging = torch.zeros(tuple(shape), dtype=torch.uint8, pin_memory=True)
        self._number = torch.zeros(1, dtype=torch.int64, pin_memory=True) if waits else None
        self.stream: Any = torch.cuda.Stream(self.device)
        self._staged, self._finished = torch.cuda.Event(), torch.cuda.Event()

    def check(self, frames: Tensor) -> None:
        """Raise EngineError unless frames are on the CPU or on this device."""
        if frames.device.type != "cpu" and frames.device != self.device:
            raise EngineError(
                f"frames are on {frames.device} and the engine is on {self.device}: move the frames there"
            )

    @contextmanager
    def bringing(self, clips: Sequence[Tensor]) -> Iterator[Tensor]:
        """Copy the clips to `frames`; the block queues the work that reads them on the same stream."""
        several = len(clips) > 1
        pinned = self._staging.unbind() if several else [self._staging]
        entering = self.frames.unbind() if several else [self.frames]
        if not self.waits and any(clip.device.type == "cpu" for clip in clips):
            # Waits only for the previous call's copy out of the pinned buffer, not for its run.
            self._staged.synchronize()
        staged = [
            place.copy_(clip) if clip.device.type == "cpu" else clip for place, clip in zip(pinned, clips, strict=True)
        ]
        with self._between(staged):
            for clip, place in zip(staged, entering, strict=True):
                place.copy_(clip, non_blocking=True)
            if not self.waits:
                self._staged.record(self.stream)
            yield self.frames

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within the block work is queued on this stream."""
        with self._between():
            yield

    @contextmanager
    def _between(self, read: Sequence[Tensor] = ()) -> Iterator[None]:
        """Order the block's work after that queued on the caller's stream and before later work there. `read`: frames
        that it reads."""
        caller = torch.cuda.current_stream(self.device)
        # The caller's stream may still write the frames, or read the last outputs.
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield
            if not self.waits:
                self._finished.record(self.stream)
        if self.waits:
            return
        for frames in read:
            if frames.is_cuda:
                frames.record_stream(self.stream)  # the caller may drop them before the copy has run
        caller.wait_event(self._finished)

    def fill(self, frames: Tensor) -> Tensor:
        """As `Here.fill`, within `working`; frames on the CPU go through the pinned memory."""
        if frames.device.type == "cpu":
            self._staged.synchronize()  # wait for the previous call's copy out of the pinned buffer
            _fill(self._staging, frames)
            self.frames.copy_(self._staging, non_blocking=True)
            self._staged.record(self.stream)
            return self.frames
        self.check(frames)
        _fill(self.frames, frames)
        frames.record_stream(self.stream)  # the caller may drop them before the copy has run
        return self.frames

    def read(self, number: Tensor) -> int:
        """The value of `number`, int64 [1], after the work queued so far, through pinned memory; waits for it."""
        assert self._number is not None
        self._number.copy_(number, non_blocking=True)
        self.stream.synchronize()
        return int(self._number)

    def own(self, buffers: Sequence[Tensor]) -> None:
        """Take over memory that was just allocated on the caller's stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still be zeroing it
        for buffer in buffers:
            buffer.record_stream(self.stream)  # it may be freed while this stream uses it

    def hand_over(self, outputs: Sequence[Tensor]) -> None:
        """Give outputs to the caller's stream, which may still read them when they are freed."""
        caller = torch.cuda.current_stream(self.device)
        for output in outputs:
            output.record_stream(caller)

    def warm_up(self, run: Callable[[Tensor], Any], shape: Sequence[int]) -> None:
        """Run once on frames of `shape`, so that the first request does not pay for the library's initialisation."""
        run(torch.zeros(tuple(shape), dtype=torch.uint8))
        if not self.waits:
            torch.cuda.synchronize(self.device)

    def drain(self) -> None:
        """Wait for everything that was queued."""
        self.stream.synchronize()


def _fill(room: Tensor, frames: Tensor) -> None:
    room[: len(frames)].copy_(frames)
    room[len(frames) :].copy_(frames[-1:].expand(len(room) - len(frames), -1, -1, -1))
