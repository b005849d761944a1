"""What chains of the adaptive schedule (see `runtime.engine.layout`) have in common, whichever library runs their graphs.

One stage after the other: how many frames a merge left is read by one small copy, and the next stage gets so many rows
of the same memory. Every buffer is allocated once, for the most that any video needs; a call binds the first rows of
them and allocates nothing. Two buffers hold hidden states: a stage reads one and writes the other.

This module knows neither ONNX Runtime nor TensorRT. A subclass loads the stages, says what tensors they have and runs
one of them.

Notation: F frames, n frames that arrive at a stage, T tokens a frame inside the tower, S patches, P after pooling, D
tower width, E LLM width, M rows of tokens that n frames have room for, N tokens that count.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from earlytom.budget import most_tokens, token_count
from runtime.engine.layout import (
    COUNT,
    DTYPES,
    FRAMES,
    FRAMES_DTYPE,
    HIDDEN,
    MERGED_HIDDEN,
    MERGED_RECEIVED,
    POSITIONS,
    POSITIONS_DTYPE,
    RECEIVED,
    TOKENS,
    check_frames,
    stage_tensors,
)
from runtime.errors import EngineError
from runtime.manifest import REBUILD, Manifest

DYNAMIC = -1
# Name -> shape and dtype; a size that only the video tells is DYNAMIC.
Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

_FLOATS = tuple(DTYPES.values())
# What goes from one stage to the next: its name, the name of the memory, its rank and the dtypes it may have.
_BETWEEN = (
    (MERGED_HIDDEN, HIDDEN, 3, _FLOATS),
    (HIDDEN, HIDDEN, 3, _FLOATS),
    (MERGED_RECEIVED, RECEIVED, 2, (torch.float32,)),
    (RECEIVED, RECEIVED, 2, (torch.float32,)),
)


@dataclass(frozen=True)
class Room:
    """How much memory a video may need: `frames` F, `per_frame` P, retention `ratio`, number of `merges`."""

    frames: int
    per_frame: int
    ratio: float
    merges: int

    @classmethod
    def of(cls, manifest: Manifest) -> Room:
        ratio = manifest.earlytom["retention_ratio"]
        return cls(manifest.frames, manifest.tokens_per_frame, ratio, len(manifest.frames_per_stage) - 1)

    def rows(self, frames_left: int) -> int:
        """M, the rows of tokens that the last stage writes for so many frames."""
        return token_count(self.frames, self.per_frame, self.ratio, "adaptive", frames_out=frames_left, static_frames=0)

    @property
    def most(self) -> int:
        """The largest M."""
        return most_tokens(self.frames, self.per_frame, self.ratio, merges=self.merges)


class ChainVision:
    """A `VisionBackend` (see `runtime.vision`) made of stages.

    Args:
        name: of the backend.
        paths, graphs: file and tensors of each stage.
        room: of the engine.
        device: where the buffers are.

    Attributes:
        shape: [F, 3, H, W] of the frames it takes.
        frames_per_stage: frames before the first merge and after each one, of the last clip.
        batch: always 1.
        device: where it runs.

    Raises:
        EngineError: the tensors are not those of `runtime.engine.layout`, or do not fit from one stage to the next.
    """

    batch = 1

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        graphs: Sequence[Tensors],
        room: Room,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.room = room
        self.stages = len(graphs)
        self.frames_per_stage: tuple[int, ...] = ()
        self._lock = threading.Lock()
        self._closed = False
        for stage, (path, tensors) in enumerate(zip(paths, graphs, strict=True)):
            _check_names(path, stage, self.stages, tensors)
        self.shape = fixed(paths[0], FRAMES, *graphs[0][FRAMES], (FRAMES_DTYPE,), rank=4)
        if self.shape[0] != room.frames:
            raise EngineError(f"{paths[0]} takes {self.shape[0]} frames, the manifest says {room.frames}: {REBUILD}")
        self._buffers = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in _buffers(paths, graphs, room).items()
        }
        self.device = self._buffers[COUNT].device

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens [N, E] (dtype of the graph) and positions int64 [N] of frames uint8 [F, 3, H, W].

        Both are valid until the next call, which writes over them.

        Raises:
            EngineError: frames of another shape or dtype, a stage failed, or kept a number of frames that cannot be.
            RuntimeError: called while another call is under way, or after `close`.
        """
        check_frames(frames, self.shape)
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this vision backend is busy with another clip: open one per thread or wait for it")
        try:
            if self._closed:
                raise RuntimeError("this vision backend is closed")
            return self._encode(frames)
        finally:
            self._lock.release()

    def _encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        arriving, counts = self.room.frames, [self.room.frames]
        for stage in range(self.stages):
            self._run(stage, self._views(stage, arriving, frames))
            last = stage == self.stages - 1
            limit, count = self.room.rows(arriving) if last else arriving, self._read_count()
            if not 1 <= count <= limit:
                what = "tokens" if last else "frames"
                raise EngineError(
                    f"stage {stage} of the {self.name} engine kept {count} of {limit} {what}, so its arithmetic failed "
                    f"on this clip: build with --bf16 or --fp32"
                )
            arriving = count
            counts.append(count)
        self.frames_per_stage = tuple(counts[:-1])
        return self._buffers[TOKENS][:arriving], self._buffers[POSITIONS][:arriving]

    def _views(self, stage: int, arriving: int, frames: Tensor) -> dict[str, Tensor]:
        """The tensors of a stage for so many frames, all of them contiguous."""
        inputs, outputs = stage_tensors(stage, self.stages)
        rows = {TOKENS: self.room.rows(arriving), POSITIONS: self.room.rows(arriving), COUNT: 1}
        buffers = {**self._buffers, FRAMES: frames}
        read, written = f"{HIDDEN}{stage % 2}", f"{HIDDEN}{(stage + 1) % 2}"
        buffer_of = {HIDDEN: read, MERGED_HIDDEN: written, MERGED_RECEIVED: RECEIVED}
        return {name: buffers[buffer_of.get(name, name)][: rows.get(name, arriving)] for name in (*inputs, *outputs)}

    def _run(self, stage: int, tensors: Mapping[str, Tensor]) -> None:
        """Run a stage on these tensors, its inputs and outputs by name."""
        raise NotImplementedError

    def _read_count(self) -> int:
        """What the stage that ran last wrote as its count; waits for it."""
        return int(self._buffers[COUNT])

    def close(self) -> None:
        """Free the stages and the buffers; a second call does nothing. Tensors returned before stay readable."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._free()
                self._buffers = {}

    def _free(self) -> None:
        raise NotImplementedError


def _check_names(path: Path, stage: int, stages: int, tensors: Tensors) -> None:
    inputs, outputs = stage_tensors(stage, stages)
    if set(tensors) != {*inputs, *outputs}:
        raise EngineError(
            f"{path} has the tensors {', '.join(sorted(tensors))}, stage {stage} of {stages} has "
            f"{', '.join(sorted((*inputs, *outputs)))}: {REBUILD}"
        )


def _buffers(paths: Sequence[Path], graphs: Sequence[Tensors], room: Room) -> Tensors:
    """Shape and dtype of every buffer, by the names `ChainVision._views` uses."""
    last = len(graphs) - 1
    _, width = fixed(paths[last], TOKENS, *graphs[last][TOKENS], _FLOATS, rank=2, first=room.most)
    fixed(paths[last], POSITIONS, *graphs[last][POSITIONS], (POSITIONS_DTYPE,), rank=1, first=room.most)
    wanted = {
        TOKENS: ((room.most, width), graphs[last][TOKENS][1]),
        POSITIONS: ((room.most,), POSITIONS_DTYPE),
        COUNT: ((1,), torch.int64),
    }
    between: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for path, tensors in zip(paths, graphs, strict=True):
        fixed(path, COUNT, *tensors[COUNT], (torch.int64,), rank=1)
        for name, kept_as, rank, allowed in _BETWEEN:
            if name not in tensors:
                continue
            shape, dtype = tensors[name]
            found = (fixed(path, name, shape, dtype, allowed, rank=rank, first=room.frames), dtype)
            if (other := between.setdefault(kept_as, found)) != found:
                raise EngineError(
                    f"{path}: {name} is {dtype} {list(found[0])}, another stage has {other[1]} {list(other[0])}: they "
                    f"are of two builds; {REBUILD}"
                )
    if HIDDEN in between:
        wanted |= dict.fromkeys((f"{HIDDEN}0", f"{HIDDEN}1"), between.pop(HIDDEN))
    return wanted | between


def fixed(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    allowed: Sequence[torch.dtype],
    *,
    rank: int,
    first: int | None = None,
) -> tuple[int, ...]:
    """`shape` with `first` in place of its first size, if that is given.

    Raises:
        EngineError: another rank or dtype, or a size that is not known.
    """
    sizes = shape if first is None else (first, *shape[1:])
    if len(shape) != rank or min(sizes) < 1 or dtype not in allowed:
        expected = " or ".join(str(kind).removeprefix("torch.") for kind in allowed)
        raise EngineError(f"{path}: {name} is {dtype} {list(shape)}, expected {expected} of {rank} sizes; {REBUILD}")
    return sizes
