"""The adaptive schedule's chain on an NVIDIA GPU, through either TensorRT flavour: `vision.0.engine`, ...

One engine and one context a stage, all made once, as are the buffers (see `runtime.vision.chain`); a call tells each
context how many frames arrive and runs it on a stream of its own. After each stage the host waits for its count, eight
bytes that are copied into pinned memory, since it must know the next shape: unlike a single engine's, this `encode`
returns when the GPU is done. What it returns can be read on any stream at once.

Written for a GPU and unverified without one: what a test on a CPU can reach is the order of the calls and the errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from runtime.engine.layout import COUNT, ENGINE_FILE, FRAMES_DTYPE, stage_file, stage_tensors
from runtime.errors import EngineError
from runtime.vision.chain import ChainVision, Room
from runtime.vision.tensorrt_stages import Stages


class TensorRTChain(ChainVision):
    """A `VisionBackend` around the engines of a folder.

    Args:
        folder: of the engine.
        room: see `Room.of`.
        flavour: "tensorrt" or "tensorrt-rtx", the one it was built with.
        device: the CUDA device to run on, default the current one.

    Raises:
        EngineError: a file is missing, no GPU that torch can use, the flavour is missing, an engine was built by
            another version or for another GPU, or does not fit the others.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        room: Room,
        flavour: str = "tensorrt-rtx",
        *,
        device: torch.device | str = "cuda",
    ) -> None:
        paths = [Path(folder) / stage_file(ENGINE_FILE, stage) for stage in range(room.merges + 1)]
        self._engines = Stages(paths, flavour, device)
        with torch.cuda.device(device):
            super().__init__(flavour, paths, self._engines.tensors, room, device)
            self._frames = torch.zeros(self.shape, dtype=FRAMES_DTYPE, device=device)
            self._staging = torch.zeros(self.shape, dtype=FRAMES_DTYPE, pin_memory=True)
            self._count = torch.zeros(1, dtype=torch.int64, pin_memory=True)
            self._stream = torch.cuda.Stream(self.device)
            self.encode(self._staging)  # takes the flavour's own set-up out of the first request

    def _encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        if frames.device.type != "cpu" and frames.device != self.device:
            raise EngineError(
                f"frames are on {frames.device} and the engine is on {self.device}: move the frames there"
            )
        if frames.device.type == "cpu":
            frames = self._staging.copy_(frames)  # the last call waited, so nothing reads it any more
        # Frames may still be being made on the caller's stream, and the last outputs may still be being read there.
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            self._frames.copy_(frames, non_blocking=True)
            outputs = super()._encode(self._frames)
        for output in outputs:
            output.record_stream(caller)  # `close` may drop them while the caller's stream reads them
        return outputs

    def _run(self, stage: int, tensors: Mapping[str, Tensor]) -> None:
        self._engines.run(stage, tensors, self._stream, stage_tensors(stage, self.stages)[0])

    def _read_count(self) -> int:
        self._count.copy_(self._buffers[COUNT], non_blocking=True)
        self._stream.synchronize()
        return int(self._count)

    def _free(self) -> None:
        self._stream.synchronize()
        self._engines.free()
