"""Copies frames to a GPU while the previous request computes.

    upload = Upload(device)
    arriving = upload(clip.frames)   # in the thread that prepares: copies to pinned memory, queues the copy to the GPU
    frames = arriving.take()         # in the thread that serves: its stream waits for that copy, the host does not

Pinned memory is allocated once for each shape; device memory comes from torch's caching allocator, which stops
allocating once the peak number of concurrent requests is reached. On a CPU frames stay as they are.

Written for a GPU and unverified without one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Arriving:
    """Frames that may still be being written, and the event that they are (None: they are ready)."""

    frames: Tensor
    done: Any = None

    def take(self) -> Tensor:
        """The frames, for work that is queued on the current stream of their device."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.frames.device)
            stream.wait_event(self.done)
            self.frames.record_stream(stream)  # allocated on another stream
        return self.frames


def as_of_now(frames: Tensor) -> Arriving | None:
    """A caller's frames on a GPU, which the current stream may still be writing; None for frames on a CPU."""
    if not frames.is_cuda:
        return None
    made = torch.cuda.Event()
    made.record(torch.cuda.current_stream(frames.device))
    return Arriving(frames, made)


class Upload:
    """Copies of frames to `device`, on a stream of their own; for one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: dict[torch.Size, Tensor] = {}
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._copied = torch.cuda.Event()

    def working(self) -> AbstractContextManager[Any]:
        """Within the block the copy stream is current, so that this thread's work does not queue behind computation."""
        return torch.cuda.stream(self._stream) if self._device.type == "cuda" else nullcontext()

    def __call__(self, frames: Tensor) -> Arriving:
        """Start copying frames of any shape, which may be overwritten at once; frames on the device are not copied."""
        if self._device.type != "cuda":
            return Arriving(frames)
        arrived = torch.cuda.Event()
        if frames.is_cuda:  # resized there, on this thread's stream
            arrived.record(torch.cuda.current_stream(frames.device))
            return Arriving(frames, arrived)
        pinned = self._pinned.get(frames.shape)
        if pinned is None:
            pinned = self._pinned[frames.shape] = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
        self._copied.synchronize()  # wait for the previous copy out of the same pinned memory
        pinned.copy_(frames)
        with torch.cuda.stream(self._stream):
            there = pinned.to(self._device, non_blocking=True)
            self._copied.record(self._stream)
            arrived.record(self._stream)
        return Arriving(there, arrived)
