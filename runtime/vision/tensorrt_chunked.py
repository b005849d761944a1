"""Clips in chunks on an NVIDIA GPU, through either TensorRT flavour: `vision.0.engine` and `vision.1.engine`.

One engine and one context a stage, all made once, as are the buffers (see `runtime.vision.chunked_engine`). All work,
that of several clips too, is queued on one stream of the backend's own, between what the caller's stream has and will
get; no call waits for the GPU but for the copy out of the pinned buffer that the frames of the call before went
through. What `finish` returns is ready for work that is queued on the caller's stream.

Written for a GPU and unverified without one: what a test on a CPU can reach is the order of the calls and the errors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from runtime.engine.layout import CHUNK_STAGES, ENGINE_FILE, FRAMES_DTYPE, stage_file
from runtime.errors import EngineError
from runtime.vision.chunked import Room
from runtime.vision.chunked_engine import ChunkedEngine
from runtime.vision.tensorrt_stages import Stages


class TensorRTChunked(ChunkedEngine):
    """A `ChunkedVision` around the engines of a folder.

    Args:
        folder: of the engine.
        frames: F, as its manifest has it.
        flavour: "tensorrt" or "tensorrt-rtx", the one it was built with.
        device: the CUDA device to run on, default the current one.

    Raises:
        EngineError: a file is missing, no GPU that torch can use, the flavour is missing, an engine was built by
            another version or for another GPU, or does not fit the other.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        frames: int,
        flavour: str = "tensorrt-rtx",
        *,
        device: torch.device | str = "cuda",
    ) -> None:
        paths = [Path(folder) / stage_file(ENGINE_FILE, stage) for stage in range(CHUNK_STAGES)]
        self._engines = Stages(paths, flavour, device)
        with torch.cuda.device(device):
            super().__init__(flavour, paths, self._engines.tensors, frames, device)
            self._staging = torch.zeros((self.chunk, *self.shape[1:]), dtype=FRAMES_DTYPE, pin_memory=True)
            self._stream = torch.cuda.Stream(self.device)
            self._staged, self._finished = torch.cuda.Event(), torch.cuda.Event()
            # Takes the flavour's own set-up out of the first request.
            self.encode(torch.zeros(self.shape, dtype=FRAMES_DTYPE))
            self._stream.synchronize()

    def _make_room(self) -> Room:
        room = super()._make_room()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # it is being cleared there
        for buffer in (room.hidden, room.received, room.tokens, room.positions):
            if buffer is not None:
                buffer.record_stream(self._stream)  # a clip that nobody closed may go while its work is under way
        return room

    @contextmanager
    def _working(self) -> Iterator[None]:
        caller = torch.cuda.current_stream(self.device)
        # Frames may still be being made on the caller's stream, and the last outputs may still be being read there.
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
            self._finished.record(self._stream)
        caller.wait_event(self._finished)

    def _enter(self, frames: Tensor) -> None:
        if frames.device.type == "cpu":
            self._staged.synchronize()  # the copy out of the pinned buffer of the call before
            self._staging[: len(frames)].copy_(frames)
            self._staging[len(frames) :].copy_(frames[-1:].expand(self.chunk - len(frames), -1, -1, -1))
            self._entering.copy_(self._staging, non_blocking=True)
            self._staged.record(self._stream)
            return
        if frames.device != self.device:
            raise EngineError(
                f"frames are on {frames.device} and the engine is on {self.device}: move the frames there"
            )
        super()._enter(frames)
        frames.record_stream(self._stream)  # the caller may drop them before the copy has run

    def _run(self, stage: int, tensors: Mapping[str, Tensor]) -> None:
        self._engines.run(stage, tensors, self._stream)

    def _free(self) -> None:
        self._stream.synchronize()
        self._engines.free()
