"""The adaptive schedule's chain in ONNX Runtime on the CPU: `vision.0.onnx`, `vision.1.onnx`, ...

One session a stage, all opened once. Inputs and outputs are bound to the rows of the chain's own buffers (see
`runtime.vision.chain`), the frames to the caller's memory, so a call copies and allocates nothing on our side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from runtime.engine.layout import ONNX_FILE, stage_file, stage_tensors
from runtime.vision.chain import ChainVision, Room
from runtime.vision.onnxruntime_stages import Stages


class OnnxRuntimeChain(ChainVision):
    """A `VisionBackend` around the graphs of an engine folder.

    Args:
        folder: of the engine.
        room: see `Room.of`.
        threads: of each session; as many as torch uses by default. No two sessions run at a time.

    Raises:
        EngineError: onnxruntime is missing, or a graph is, or is damaged, needs kernels that the CPU does not have or
            does not fit the others.
    """

    def __init__(self, folder: str | os.PathLike[str], room: Room, threads: int | None = None) -> None:
        paths = [Path(folder) / stage_file(ONNX_FILE, stage) for stage in range(room.merges + 1)]
        self._stages = Stages(paths, threads)
        super().__init__("onnxruntime", paths, self._stages.tensors, room)

    def _encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        return super()._encode(frames.cpu().contiguous())  # both are no-ops for frames as `runtime.video` gives them

    def _run(self, stage: int, tensors: Mapping[str, Tensor]) -> None:
        self._stages.run(stage, *stage_tensors(stage, self.stages), tensors)

    def _free(self) -> None:
        self._stages.free()
