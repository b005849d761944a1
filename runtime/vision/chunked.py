"""Backends that encode a clip in chunks, as its frames arrive, whichever library runs the graphs.

Up to the first merge frames do not interact, so the layers up to there, the head, run on `chunk` frames at a time
without waiting for the others; the rest runs once all frames are there. A whole clip is encoded in the same way, so the
result does not depend on when frames arrive: the same calls on the same values in the same order.

    clip = vision.begin()
    clip.push(frames)                        at most `chunk` frames, as often as it takes
    encoded = clip.finish()
    clip.close()

Several clips may be open at once, each with its own memory, which is allocated on demand and reused; their calls take
turns. A head call always has `chunk` frames; the last one is repeated if fewer are given. This module knows no library.
`ChunkedVision` is abstract in how head and rest run; `Chunked` runs the two graphs of an engine. Frames may be given on
any stream: a call never waits for the GPU, except for the previous call's copy out of the pinned staging buffer.

Notation: F frames, C frames of a chunk, c <= C frames that were given, T tokens a frame inside the tower, S patches, D
tower width, E LLM width, N tokens kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.engine.dtypes import FRAMES_DTYPE
from runtime.engine.layout import FRAMES, HIDDEN, OUTPUTS, RECEIVED, Layout
from runtime.engine.manifest import REBUILD
from runtime.errors import EngineError
from runtime.gpu.streams import Here
from runtime.vision.frames import check_frames
from runtime.vision.protocol import Encoded
from runtime.vision.runner import CLOSED, CallGuard, Runner, check_names, fixed

CHUNK = 4  # default frames of a chunk


@dataclass(frozen=True, eq=False)
class Room:
    """The memory of one clip.

    Attributes:
        hidden: [F, T, D] hidden states of the frames so far, from the head.
        received: [F, S] fp32 received attention, if the watched layer is in the head.
        encoded: buffers that the rest writes; None if it allocates new tensors.
    """

    hidden: Tensor
    received: Tensor | None
    encoded: Encoded | None = None


class OpenClip:
    """An open clip; made by `ChunkedVision.begin`. For one thread at a time. A context manager that closes.

    Attributes:
        encoded: number of frames that the head has run on, or that `arrange` has left.
        device: where it runs.
    """

    def __init__(self, vision: ChunkedVision, room: Room) -> None:
        self.encoded = 0
        self.device = room.hidden.device
        self._vision = vision
        self._room: Room | None = room  # None once closed

    def push(self, frames: Tensor) -> None:
        """Run the head on the next frames, uint8 [c, 3, H, W] with 1 <= c <= `chunk`.

        Raises:
            EngineError: frames of another shape or dtype, more than the clip has, or the head failed.
            RuntimeError: the clip or the backend is closed.
        """
        vision, room = self._vision, self._open()
        count, most = len(frames) if frames.dim() == 4 else 0, min(vision.chunk, vision.shape[0] - self.encoded)
        if not 1 <= count <= most:
            raise EngineError(
                f"a chunk is 1 to {most} frames here, {self.encoded} of {vision.shape[0]} being there, got frames "
                f"{list(frames.shape)}"
            )
        check_frames(frames, (count, *vision.shape[1:]))
        rows = slice(self.encoded, self.encoded + count)
        with vision.turn():
            hidden, received = vision.run_head(frames)
            room.hidden[rows].copy_(hidden[:count])
            if room.received is not None and received is not None:
                room.received[rows].copy_(received[:count])
        self.encoded += count

    def arrange(self, rows: Sequence[int]) -> None:
        """Replace the frames encoded so far by those at `rows` of them, dropping or repeating some.

        Args:
            rows: ascending, repeats allowed; at most F.

        Raises:
            EngineError: rows out of range or not ascending, or that would have to move both up and down.
            RuntimeError: the clip or the backend is closed.
        """
        room, places = self._open(), list(enumerate(rows))
        forward = all(row >= place for place, row in places)
        fits = len(rows) <= len(room.hidden) and all(0 <= row < self.encoded for row in rows)
        if list(rows) != sorted(rows) or not fits or not (forward or all(row <= place for place, row in places)):
            raise EngineError(f"{self.encoded} encoded frames cannot be arranged as {list(rows)}")
        with self._vision.turn():
            # In place, in an order in which no row is overwritten before it is read.
            for place, row in places if forward else reversed(places):
                if place != row:
                    room.hidden[place].copy_(room.hidden[row])
                    if room.received is not None:
                        room.received[place].copy_(room.received[row])
        self.encoded = len(rows)

    def finish(self) -> Encoded:
        """Visual tokens of the F frames; valid until the clip is closed.

        Raises:
            EngineError: frames are missing, or the rest failed.
            RuntimeError: the clip or the backend is closed.
        """
        vision, room = self._vision, self._open()
        if self.encoded != vision.shape[0]:
            raise EngineError(f"this engine takes clips of {vision.shape[0]} frames, {self.encoded} were pushed")
        with vision.turn():
            return vision.run_rest(room)

    def restart(self) -> None:
        """Forget the frames pushed so far."""
        self.encoded = 0

    def close(self) -> None:
        """Return the memory to the backend, that of `finish`'s outputs included; a second call does nothing."""
        room, self._room = self._room, None
        if room is not None:
            self._vision.give_back(room)

    def __enter__(self) -> OpenClip:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _open(self) -> Room:
        if self._room is None:
            raise RuntimeError("this clip is closed")
        return self._room


class ChunkedVision:
    """A `VisionBackend` (see `runtime.vision`) that also takes a clip in chunks.

    Args:
        name: of the backend.
        shape: [F, 3, H, W] of a whole clip.
        chunk: C.
        lane: makes the `Lane` (or `Here`) of the head's frames, [C, 3, H, W], and of its work; default: the CPU.

    Attributes:
        name, shape, chunk: as given.
        device: where it runs.
        batch: always 1.
    """

    batch = 1

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int, int],
        chunk: int,
        lane: Callable[[tuple[int, ...]], Here] | None = None,
    ) -> None:
        if not 1 <= chunk <= shape[0]:
            raise EngineError(f"a chunk must have between 1 and {shape[0]} frames (those of a clip), got {chunk}")
        self.name = name
        self.shape = shape
        self.chunk = chunk
        self._lane = (lane or _on_cpu)((chunk, *shape[1:]))
        self.device = self._lane.device
        self._turn, self._whole = threading.Lock(), CallGuard()
        self._rooms: list[Room] = []  # memory of closed clips
        self._own: OpenClip | None = None  # of `encode`
        self._closed = False
        self._alike: bool | None = None

    def begin(self) -> OpenClip:
        """A new clip. Raises RuntimeError when the backend is closed."""
        with self._turn:
            if self._closed:
                raise RuntimeError(CLOSED)
            return OpenClip(self, self._rooms.pop() if self._rooms else self._make_room())

    def encode(self, frames: Tensor) -> Encoded:
        """Visual tokens of a whole clip, uint8 [F, 3, H, W], chunk by chunk.

        They are valid until the next call, which overwrites them. Open clips are not affected.
        """
        check_frames(frames, self.shape)
        with self._whole():
            clip = self._own = self._own or self.begin()
            clip.restart()
            for some in frames.split(self.chunk):
                clip.push(some)
            return clip.finish()

    @property
    def rows_alike(self) -> bool:
        """Whether the head's result for a frame is bit-identical wherever it is in a chunk and whatever is beside it.

        Then a frame encoded in one chunk may be reused in another. Libraries do not guarantee this, but their order of
        summation does not depend on values, so a test with one frame in every place shows it: two calls of the head,
        made once.
        """
        if self._alike is None:
            generator = torch.Generator().manual_seed(0)
            shape = (self.chunk, *self.shape[1:])
            frames = torch.randint(0, 256, shape, generator=generator, dtype=FRAMES_DTYPE)
            with self.turn():
                same = [value.clone() for value in self.run_head(frames[:1]) if value is not None]
                mixed = [value for value in self.run_head(frames) if value is not None]
                everywhere = all(torch.equal(value, value[:1].expand_as(value)) for value in same)
                beside = all(torch.equal(a[0], b[0]) for a, b in zip(same, mixed, strict=True))
            self._alike = everywhere and beside
        return self._alike

    def close(self) -> None:
        """Free the backend; a second call does nothing. Open clips cannot go on."""
        with self._turn:
            if not self._closed:
                self._closed = True
                self._lane.drain()
                self._free()
                self._rooms.clear()
                self._own = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For `OpenClip`: exclusive use of the library and its buffers within the block."""
        with self._turn:
            if self._closed:
                raise RuntimeError(CLOSED)
            with self._lane.working():
                yield

    def run_head(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """For `OpenClip`, within `turn`: [c, 3, H, W] to hidden [C, T, D] and received [C, S], valid until the next."""
        return self._head(self._lane.fill(frames))

    def run_rest(self, room: Room) -> Encoded:
        """For `OpenClip`, within `turn`: visual tokens of the clip in `room`."""
        return self._rest(room)

    def give_back(self, room: Room) -> None:
        """For `OpenClip`: another clip may use this memory."""
        with self._turn:
            if not self._closed:
                self._rooms.append(room)

    def _make_room(self) -> Room:
        raise NotImplementedError

    def _head(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _rest(self, room: Room) -> Encoded:
        raise NotImplementedError

    def _free(self) -> None:
        raise NotImplementedError


class Chunked(ChunkedVision):
    """A `ChunkedVision` of two graphs with static shapes.

    The head writes to its own buffers, which are then copied to the clip's memory; the rest reads and writes the clip's
    memory directly. Everything is allocated once.

    Args:
        runners: of the head and the rest.
        layout: of the engine.
    """

    def __init__(self, runners: Sequence[Runner], layout: Layout) -> None:
        for runner, graph in zip(runners, layout.graphs, strict=True):
            check_names(runner, graph, "an engine in chunks")
            for tensor in (*graph.inputs, *graph.outputs):
                fixed(runner, tensor)
        first, second = runners
        frames, (chunk, *image) = layout.frames, first.tensors[FRAMES][0]
        between = [tensor.name for tensor in layout.graphs[1].inputs]
        for name in between:
            (some, kind), (every, other) = first.tensors[name], second.tensors[name]
            if (some[0], every[0], kind) != (chunk, frames, other) or some[1:] != every[1:] or frames % chunk:
                raise EngineError(
                    f"{name} is {kind} {list(some)} in {first.path} and {other} {list(every)} in {second.path}, for "
                    f"clips of {frames} frames in chunks of {chunk}: they are of two builds; {REBUILD}"
                )
        shape: tuple[int, int, int, int] = (frames, *image)  # type: ignore[assignment]
        super().__init__(first.name, shape, chunk, lambda some: first.lane(some, kept=True))
        self.runners = (first, second)
        self._out = {name: self._buffer(first, name) for name in between}
        self._lane.warm_up(self.encode, self.shape)

    def _buffer(self, runner: Runner, name: str) -> Tensor:
        shape, dtype = runner.tensors[name]
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _make_room(self) -> Room:
        buffers = {name: self._buffer(self.runners[1], name) for name in self.runners[1].tensors}
        self._lane.own(list(buffers.values()))
        return Room(buffers[HIDDEN], buffers.get(RECEIVED), Encoded(*(buffers[name] for name in OUTPUTS)))

    def _head(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        self.runners[0].run({FRAMES: frames, **self._out})
        return self._out[HIDDEN], self._out.get(RECEIVED)

    def _rest(self, room: Room) -> Encoded:
        assert room.encoded is not None
        entering = {HIDDEN: room.hidden} if room.received is None else {HIDDEN: room.hidden, RECEIVED: room.received}
        self.runners[1].run(entering | dict(zip(OUTPUTS, room.encoded, strict=True)))
        return room.encoded

    def _free(self) -> None:
        for runner in self.runners:
            runner.close()


def _on_cpu(shape: tuple[int, ...]) -> Here:
    return Here("cpu", shape, kept=True)
