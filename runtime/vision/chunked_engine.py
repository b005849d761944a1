"""What engines whose clips come in chunks (see `runtime.engine.layout`) have in common, whichever library runs their graphs.

Two graphs of static shapes: stage 0 is the head and writes to buffers of its own, from where a clip's memory gets it;
stage 1 is the rest and reads and writes the memory of the clip. Everything is allocated once. This module knows neither
ONNX Runtime nor TensorRT. A subclass loads the stages, says what tensors they have and runs one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from runtime.engine.layout import (
    DTYPES,
    FRAMES,
    FRAMES_DTYPE,
    HIDDEN,
    POSITIONS,
    POSITIONS_DTYPE,
    RECEIVED,
    TOKENS,
    chunk_tensors,
)
from runtime.errors import EngineError
from runtime.manifest import REBUILD
from runtime.vision.chain import Tensors, fixed
from runtime.vision.chunked import ChunkedVision, Room

_FLOATS = tuple(DTYPES.values())
# Rank and dtypes of every tensor.
_KINDS: dict[str, tuple[int, Sequence[torch.dtype]]] = {
    FRAMES: (4, (FRAMES_DTYPE,)),
    HIDDEN: (3, _FLOATS),
    RECEIVED: (2, (torch.float32,)),
    TOKENS: (2, _FLOATS),
    POSITIONS: (1, (POSITIONS_DTYPE,)),
}


class ChunkedEngine(ChunkedVision):
    """A `ChunkedVision` made of two graphs.

    Args:
        name: of the backend.
        paths, graphs: file and tensors of each stage.
        frames: F, as the manifest has it.
        device: where the buffers are.

    Raises:
        EngineError: the tensors are not those of `runtime.engine.layout`, or do not fit from one stage to the other.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        graphs: Sequence[Tensors],
        frames: int,
        device: torch.device | str = "cpu",
    ) -> None:
        received = RECEIVED in graphs[0]
        for stage, (path, tensors) in enumerate(zip(paths, graphs, strict=True)):
            expected = {name for names in chunk_tensors(stage, received) for name in names}
            if set(tensors) != expected:
                raise EngineError(
                    f"{path} has the tensors {', '.join(sorted(tensors))}, stage {stage} of an engine in chunks has "
                    f"{', '.join(sorted(expected))}: {REBUILD}"
                )
            for tensor, (shape, dtype) in tensors.items():
                rank, allowed = _KINDS[tensor]
                fixed(path, tensor, shape, dtype, allowed, rank=rank)
        chunk, *image = graphs[0][FRAMES][0]
        for tensor in chunk_tensors(1, received)[0]:
            (some, kind), (every, other) = graphs[0][tensor], graphs[1][tensor]
            if (some[0], every[0], kind) != (chunk, frames, other) or some[1:] != every[1:] or frames % chunk:
                raise EngineError(
                    f"{tensor} is {kind} {list(some)} in {paths[0]} and {other} {list(every)} in {paths[1]}, for clips "
                    f"of {frames} frames in chunks of {chunk}: they are of two builds; {REBUILD}"
                )
        super().__init__(name, (frames, *image), chunk, device)  # type: ignore[arg-type]
        self._received = received
        self._graphs = [dict(tensors) for tensors in graphs]
        self._out = {tensor: self._buffer(0, tensor) for tensor in chunk_tensors(0, received)[1]}

    def _buffer(self, stage: int, name: str) -> Tensor:
        shape, dtype = self._graphs[stage][name]
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _make_room(self) -> Room:
        buffers = {name: self._buffer(1, name) for name in self._graphs[1]}
        return Room(buffers[HIDDEN], buffers.get(RECEIVED), buffers[TOKENS], buffers[POSITIONS])

    def _head(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        self._run(0, {FRAMES: frames, **self._out})
        return self._out[HIDDEN], self._out.get(RECEIVED)

    def _rest(self, room: Room) -> tuple[Tensor, Tensor]:
        assert room.tokens is not None
        assert room.positions is not None
        tensors = {HIDDEN: room.hidden, RECEIVED: room.received, TOKENS: room.tokens, POSITIONS: room.positions}
        self._run(1, {name: tensor for name, tensor in tensors.items() if tensor is not None})
        return room.tokens, room.positions

    def _run(self, stage: int, tensors: Mapping[str, Tensor]) -> None:
        """Run a stage on these tensors, its inputs and outputs by name, all of them contiguous."""
        raise NotImplementedError
