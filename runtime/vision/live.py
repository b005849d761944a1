"""A clip whose frames come one by one, from a camera or a download: it is encoded while it comes.

    with LiveClip(vision, total=300) as clip:
        for frame in source:
            clip.push(frame)
        encoded, timings = clip.finish()

What comes out is exactly what `runtime.video.clip_from_frames` of all frames and the backend's `encode` give. Frames
are resized where they are pushed; as soon as there are enough for a chunk that are certain to be in the sample, a
thread of this clip's own runs the layers up to the first merge on them (`runtime.vision.chunked`). What is left after
the last frame is the last chunk and the rest of the encoder.

A source of known length (`total`) has a known sample: no other frame is looked at. Of one that may end at any time all
frames have to be kept. Its first F are encoded as they come, for if no more follow they are the sample; if more do,
those that the sample has are used as they are, and the others of the sample are encoded at the end.

On a GPU frames are resized on one stream and encoded on another, both shared by all clips: on the stream that threads
have by default a push would wait for the encoder, and the encoder for whatever else is asked of the GPU. Frames go from
one thread to the other when they are there, so that no stream has to wait for another.

This module knows sampling and resizing (`runtime.video`), not what encodes.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earlytom.errors import UserError
from earlytom.families import FrameSampling, FrameTimes
from earlytom.numbers import whole
from earlytom.transfers import to_device
from runtime.errors import EngineError
from runtime.forks import Home
from runtime.video import sample_indices
from runtime.video.frames import MIN_FRAMES, channels_first, resize_frames, stack_frames
from runtime.video.sample import times_of_sample
from runtime.vision.chunked import CHUNK, ChunkedVision
from runtime.vision.protocol import Encoded

_CLOSED = "this live clip was finished or closed: open another one"
MOST = 10**9  # frames of a clip: a year, so that a number that is no count is told from one
LIMIT = 4  # times F: how many frames a clip of unknown length may have, if nothing else is asked for


@dataclass(frozen=True)
class LiveTimings:
    """Seconds of a live clip.

    Attributes:
        after_last_frame: from the push of the last frame to the tokens, the caller's time before `finish` included:
            what somebody waits who asked while the clip was still coming.
        before: that the head ran before then.
        share: of the head's work on the sampled frames, what was done before then; between 0 and 1.
    """

    after_last_frame: float
    before: float
    share: float


class LiveClip:
    """One clip that is still coming. A context manager that closes.

    Args:
        vision: a backend that takes chunks.
        total: how many frames will come; None where that is not known.
        limit: the most frames that may come where that is not known, 4 F by default; all are kept, resized.
        device: where frames are resized.
        sampling: which frames are shown, see `runtime.video.sample_indices`.

    Raises:
        EngineError: a backend that takes whole clips only.
        UserError: a total or limit that makes no sense.
        RuntimeError: the backend is closed.
    """

    def __init__(
        self,
        vision: ChunkedVision,
        *,
        total: int | None = None,
        limit: int | None = None,
        device: torch.device | str = "cpu",
        sampling: FrameSampling = "ends",
    ) -> None:
        if not isinstance(vision, ChunkedVision):
            raise EngineError(
                "this engine takes whole clips: build one for frames as they come with python -m builder.build --chunk "
                f"{CHUNK}"
            )
        self.frames = vision.shape[0]
        self.size = vision.shape[2:]
        self.total = total = None if total is None else whole("total", total, MIN_FRAMES, MOST)
        self.limit = LIMIT * self.frames if limit is None else whole("limit", limit, MIN_FRAMES, MOST)
        self._device, self._sampling = torch.device(device), sampling
        # How often the sample has each frame of the source; where that may end at any time, the first F once each.
        self._times = Counter(
            range(self.frames) if total is None else sample_indices(total, self.frames, sampling).tolist()
        )
        self._reuse = total is None and vision.rows_alike
        self._chunk = vision.chunk
        self._arrived = 0
        self._kept: list[Tensor] = []  # each [3, H, W]; without a total all frames, so that any sample can be made
        self._waiting: list[Tensor] = []  # for the next chunk
        self._seconds = 0.0  # that the worker ran the head
        self._before = (0, 0.0, 0.0)  # when the last frame came: frames encoded, these seconds, the clock
        self._error: BaseException | None = None  # of the worker
        self._home = Home("this live clip")
        self._lock = threading.Lock()
        self._clip = vision.begin()
        self._resizing, self._encoding = _stream(self._device, "resize"), _stream(self._clip.device, "encode")
        if self._encoding is not None:  # the clip's memory is being cleared on this thread's stream
            self._encoding.wait_stream(torch.cuda.current_stream(self._clip.device))
        self._worker: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="live-clip")

    def push(self, frames: Tensor | NDArray[Any]) -> None:
        """Take the next frames; returns without waiting for the encoder.

        Args:
            frames: uint8 RGB, [n, 3, h, w] or [n, h, w, 3] (channels first where both would fit), or one frame of them,
                in time order, of any size; or a list of single frames or of PIL images, or one of these. They are
                copied.

        Raises:
            UserError: anything else, or more frames than `total` or `limit`, of which none is taken then.
            Exception: what the worker failed with, on frames pushed before.
            RuntimeError: the clip was finished or closed.
        """
        came = time.perf_counter()
        self._home.check()
        with self._lock:
            worker = self._running()
            planar = _planar(frames)  # [n, 3, h, w]
            indices = range(self._arrived, self._arrived + len(planar))
            self._check_count(indices.stop)
            self._before = (self._clip.encoded, self._seconds, came)
            wanted = [index for index in indices if self.total is None or self._times[index]]
            self._arrived = indices.stop
            if not wanted:
                return
            rows = [index - indices.start for index in wanted]
            for index, frame in zip(wanted, self._resize(planar, rows), strict=True):
                self._waiting += [frame] * self._times[index]
                if self.total is None:
                    self._kept.append(frame)
            while len(self._waiting) >= self._chunk:
                worker.submit(self._encode, _take(self._waiting, self._chunk))

    def finish(self) -> tuple[Encoded, LiveTimings]:
        """No more frames will come: the clip's visual tokens and how long it took. Closes the clip.

        On a GPU it waits for the tokens, which can then be read on any stream.

        Raises:
            UserError: fewer frames came than `total`, or than a video has; more may be pushed then.
            Exception: what the worker failed with.
            RuntimeError: the clip was finished or closed.
        """
        self._home.check()
        with self._lock:
            worker = self._running()
            if self.total is not None and self._arrived != self.total:
                raise UserError(
                    f"total is {self.total} frames and {self._arrived} were pushed: push the others, or leave total "
                    "out where the number is not known"
                )
            if self._arrived < MIN_FRAMES:
                raise UserError(f"got {self._arrived} frame(s); a video has at least {MIN_FRAMES} frames")
            job = worker.submit(self._complete)
        try:
            encoded, timings = job.result()
        except CancelledError:
            raise RuntimeError(_CLOSED) from None
        finally:
            self.close()
        return encoded, timings

    def close(self) -> None:
        """Drop what is not encoded yet, wait for the chunk that is, free the memory; a second call does nothing, nor
        does one in a fork of the process."""
        if self._home.left:
            return
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(cancel_futures=True)
            self._clip.close()
            self._kept, self._waiting = [], []

    def __enter__(self) -> LiveClip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> ThreadPoolExecutor:
        """The worker, if it can go on."""
        if self._error is not None:
            raise self._error
        if self._worker is None:
            raise RuntimeError(_CLOSED)
        return self._worker

    def _check_count(self, count: int) -> None:
        if self.total is not None and count > self.total:
            raise UserError(f"total is {self.total} frames and {count} were pushed: push no more than were promised")
        if self.total is None and count > self.limit:
            raise UserError(
                f"{count} frames were pushed and a clip of unknown length keeps at most {self.limit}: give total (the "
                "number of frames that will come), push fewer, or raise limit"
            )

    def _resize(self, planar: Tensor, rows: Sequence[int]) -> Tensor:
        """These rows of [n, 3, h, w], as [r, 3, H, W] on which the caller has no hold."""
        if self._resizing is not None and planar.is_cuda:  # they may still be being made
            self._resizing.wait_stream(torch.cuda.current_stream(planar.device))
        with _on(self._resizing):
            copied = planar[to_device(torch.tensor(rows), planar.device)]
            resized = resize_frames(copied, self.size, self._device)
            _wait(resized.device)  # the worker has a stream of its own
        return resized

    def _wanted(self) -> bool:
        """Whether anybody waits: not once it is closed, nor when the interpreter waits at its exit for this thread."""
        return self._worker is not None and threading.main_thread().is_alive()

    # What the worker does, one call after the other, asking before each whether it is still wanted.

    def _encode(self, frames: list[Tensor]) -> None:
        if self._error is not None or not self._wanted():  # of an earlier chunk
            return
        started = time.perf_counter()
        try:
            with _on(self._encoding):
                self._clip.push(torch.stack(frames))
                _wait(self._clip.device)  # before `frames` are let go
        except BaseException as error:  # for the caller's thread, which raises it
            self._error = error
        self._seconds += time.perf_counter() - started

    def _complete(self) -> tuple[Encoded, LiveTimings]:
        """Encode what is missing of the sample, and the rest."""
        if self._error is not None:
            raise self._error
        plan = self._plan()
        missing = self._waiting if self.total is not None else [self._kept[index] for index in plan.add]
        with _on(self._encoding):
            self._clip.arrange(plan.keep)
            for first in range(0, len(missing), self._chunk):
                if not self._wanted():
                    raise RuntimeError(_CLOSED)
                self._clip.push(torch.stack(missing[first : first + self._chunk]))
            self._clip.arrange(plan.rows)
            found = Encoded(*(value.clone() for value in self._clip.finish()))
            _wait(found.tokens.device)
        for value in found:
            if value.is_cuda:  # where they are likely to be read when they are let go
                value.record_stream(torch.cuda.default_stream(value.device))
        encoded, seconds, came = self._before
        return found, LiveTimings(time.perf_counter() - came, seconds, plan.ahead(encoded) / self.frames)

    @property
    def times(self) -> FrameTimes:
        """When the frames of the sample were, as nothing says when they came."""
        return times_of_sample(self._arrived, self.frames, self._sampling)

    def _plan(self) -> Completion:
        """How the sample comes of what is encoded."""
        encoded = self._clip.encoded
        if self.total is not None:  # what is encoded is the beginning of the sample
            return Completion(range(encoded), range(encoded, self.frames), range(self.frames))
        sample = sample_indices(self._arrived, self.frames, self._sampling).tolist()
        return completion(sample, encoded, self._chunk if not self._reuse else None)


@dataclass(frozen=True)
class Completion:
    """How a sample comes of frames of which the first are encoded.

    Attributes:
        keep: encoded frames that stay, ascending.
        add: frames to encode then.
        rows: the sample, as places in `keep` and `add` together; ascending.
    """

    keep: Sequence[int]
    add: Sequence[int]
    rows: Sequence[int]

    def ahead(self, encoded: int) -> int:
        """Places of the sample that are done once the first `encoded` frames are encoded."""
        return sum(row < len(self.keep) and self.keep[row] < encoded for row in self.rows)


def completion(sample: Sequence[int], encoded: int, chunk: int | None) -> Completion:
    """How `sample`, ascending, comes of the frames 0 to `encoded` - 1.

    `chunk`: None where a frame is encoded alike in every chunk, so that no frame need be encoded twice. Else the frames
    of a chunk: only chunks that a whole clip has as they are stay, and each of the others is encoded as it is there.
    """
    if chunk is None:
        distinct = sorted(set(sample))
        place = {frame: row for row, frame in enumerate(distinct)}
        keep = [frame for frame in distinct if frame < encoded]
        return Completion(keep, distinct[len(keep) :], [place[frame] for frame in sample])
    same = 0
    while same + chunk <= encoded and list(sample[same : same + chunk]) == list(range(same, same + chunk)):
        same += chunk
    return Completion(range(same), sample[same:], range(len(sample)))


def _planar(frames: Any) -> Tensor:
    """What was pushed as uint8 [n, 3, h, w]. Raises UserError for what cannot be that."""
    if isinstance(frames, list | tuple) or hasattr(frames, "getbands"):  # the latter is PIL's, which is not needed here
        return stack_frames(frames if isinstance(frames, list | tuple) else [frames])
    plain = getattr(frames, "layout", torch.strided) is torch.strided and not getattr(frames, "is_nested", False)
    single = isinstance(frames, Tensor | np.ndarray) and plain and frames.ndim == 3
    return channels_first(frames[None] if single else frames, 1)


def _take(frames: list[Tensor], chunk: int) -> list[Tensor]:
    """The first `chunk` of `frames`; they are removed."""
    taken = frames[:chunk]
    del frames[:chunk]
    return taken


@functools.cache
def _stream(device: torch.device, purpose: str) -> Any:
    """The stream of a GPU for this purpose; None on a CPU. One for all clips, as torch keeps memory for each stream."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _on(stream: Any) -> AbstractContextManager[Any]:
    """Within the block what this thread asks of the GPU goes on that stream, if there is one."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _wait(device: torch.device) -> None:
    """Until the GPU has done what this thread asked of it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
