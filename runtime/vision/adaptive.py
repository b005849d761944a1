"""The adaptive schedule: a chain of graphs, run one after the other.

The frame count after each merge is read by one small copy to the host; the next stage gets that many rows of the same
memory. Every buffer is allocated once, for the largest count; a call binds its first rows and allocates nothing. Each
tensor between stages is double-buffered: a stage reads one buffer and writes the other. As the host must know each
count, `encode` returns only when the last stage is done, also on a GPU; its outputs can be read on any stream at once.

Notation: F frames, n frames that arrive at a stage, T tokens a frame inside the tower, S patches, P after pooling, D
tower width, E LLM width, M rows of tokens for n frames, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.engine.layout import BETWEEN, COUNT, FRAMES, MADE_OF, OF_TOKENS, OUTPUTS, RECEIVED, SOURCES, Layout
from runtime.engine.manifest import REBUILD
from runtime.errors import EngineError
from runtime.vision.frames import check_frames
from runtime.vision.protocol import Encoded
from runtime.vision.runner import CallGuard, Runner, check_names, fixed

# Tensors between stages -> the buffer that holds them, by the input's name. All are double-buffered but `_ONCE`, which
# only one stage writes and only the next one reads.
_MEMORY = {name: taken for taken, made in BETWEEN.items() for name in (taken, made)}
_ONCE = RECEIVED
_Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Adaptive:
    """A `VisionBackend` of several stages.

    Args:
        runners: of the stages, in their order.
        layout: of the engine.

    Attributes:
        shape: [F, 3, H, W] of the frames it takes.
        frames_per_stage: frames before the first merge and after each one, for the last clip.
        batch: always 1.
        device: where it runs.
    """

    batch = 1

    def __init__(self, runners: Sequence[Runner], layout: Layout) -> None:
        self.name = runners[0].name
        self.layout = layout
        self.runners = tuple(runners)
        self.frames_per_stage: tuple[int, ...] = ()
        self._graphs = layout.graphs
        self._turn = CallGuard()
        for runner, graph in zip(runners, self._graphs, strict=True):
            check_names(runner, graph, str(len(runners)))
        self.shape = fixed(runners[0], self._graphs[0].inputs[0])
        if self.shape[0] != layout.frames:
            raise EngineError(
                f"{runners[0].path} takes {self.shape[0]} frames, the manifest says {layout.frames}: {REBUILD}"
            )
        self._buffers = {
            name: torch.zeros(shape, dtype=dtype, device=runners[0].device)
            for name, (shape, dtype) in self._sizes().items()
        }
        self.device = self._buffers[COUNT].device
        self._lane = runners[0].lane(self.shape, waits=True)
        self._lane.warm_up(self.encode, self.shape)

    def encode(self, frames: Tensor) -> Encoded:
        """Visual tokens of frames uint8 [F, 3, H, W], valid until the next call, which overwrites them."""
        check_frames(frames, self.shape)
        with self._turn():
            self._lane.check(frames)
            with self._lane.bringing([frames]) as entering:
                count = self._run(entering)
            left, sources = self.frames_per_stage[-1], f"{MADE_OF}{len(self.runners) % 2}"
            found = {name: self._buffers[name][:count] for name in OF_TOKENS} | {SOURCES: self._buffers[sources][:left]}
            encoded = Encoded(*(found[name] for name in OUTPUTS))
            self._lane.hand_over(encoded)
            return encoded

    def _run(self, frames: Tensor) -> int:
        """Run all stages; returns the number of tokens."""
        arriving, counts = self.layout.frames, [self.layout.frames]
        for stage, runner in enumerate(self.runners):
            runner.run(self._views(stage, arriving, frames))
            last = stage == len(self.runners) - 1
            limit, count = self._rows(arriving) if last else arriving, self._lane.read(self._buffers[COUNT])
            if not 1 <= count <= limit:
                what = "tokens" if last else "frames"
                raise EngineError(
                    f"stage {stage} of the {self.name} engine kept {count} of {limit} {what}, so its arithmetic failed "
                    f"on this clip: build with --bf16 or --fp32"
                )
            arriving = count
            counts.append(count)
        self.frames_per_stage = tuple(counts[:-1])
        return arriving

    def _rows(self, frames_left: int) -> int:
        """M, the rows of tokens that the last stage writes for `frames_left` frames."""
        return self.layout.tokens_of(frames_left)

    def _views(self, stage: int, arriving: int, frames: Tensor) -> dict[str, Tensor]:
        """The tensors of a stage for `arriving` frames, all contiguous."""
        rows = dict.fromkeys(OF_TOKENS, self._rows(arriving)) | {COUNT: 1}
        buffers = {**self._buffers, FRAMES: frames}
        read, written = stage % 2, (stage + 1) % 2
        buffer_of = {BETWEEN[_ONCE]: _ONCE}
        for taken, made in BETWEEN.items():
            if taken != _ONCE:
                buffer_of |= {taken: f"{taken}{read}", made: f"{taken}{written}"}
        graph = self._graphs[stage]
        names = (tensor.name for tensor in (*graph.inputs, *graph.outputs))
        return {name: buffers[buffer_of.get(name, name)][: rows.get(name, arriving)] for name in names}

    def _sizes(self) -> _Buffers:
        """Shape and dtype of every buffer, by the names that `_views` uses."""
        most, last = self.layout.tokens, self.runners[-1]
        tensors = {tensor.name: tensor for tensor in self._graphs[-1].outputs}
        wanted: _Buffers = {name: (fixed(last, tensors[name], most), last.tensors[name][1]) for name in OF_TOKENS}
        wanted[COUNT] = ((1,), torch.int64)
        between: _Buffers = {}
        for runner, graph in zip(self.runners, self._graphs, strict=True):
            for tensor in (*graph.outputs, *graph.inputs):
                if tensor.name == COUNT:
                    fixed(runner, tensor)
                if tensor.name not in _MEMORY:
                    continue
                dtype = runner.tensors[tensor.name][1]
                found = (fixed(runner, tensor, self.layout.frames), dtype)
                if (other := between.setdefault(_MEMORY[tensor.name], found)) != found:
                    raise EngineError(
                        f"{runner.path}: {tensor.name} is {dtype} {list(found[0])}, another stage has {other[1]} "
                        f"{list(other[0])}: they are of two builds; {REBUILD}"
                    )
        for name, found in between.items():
            wanted |= dict.fromkeys((name,) if name == _ONCE else (f"{name}0", f"{name}1"), found)
        return wanted

    def close(self) -> None:
        """Free the stages and the buffers; a second call does nothing. Tensors returned before stay readable."""
        with self._turn.closing() as first:
            if first:
                self._lane.drain()
                for runner in self.runners:
                    runner.close()
                self._buffers = {}
