"""A clip whose frames arrive one by one, from a camera or a download, and are encoded as they arrive.

    with LiveClip(vision, total=300) as clip:
        for frame in source:
            clip.push(frame)
        encoded, timings = clip.finish()

The result equals that of `runtime.video.clip_from_frames` on all frames followed by the backend's `encode`. `push`
resizes frames in the caller's thread; once a chunk of frames is sure to be in the sample, the clip's worker thread runs
the layers up to the first merge on it (`runtime.vision.chunked`). After the last frame only the last chunk and the rest
of the encoder remain to be run.

A source of known length (`total`) has a known sample, and other frames are skipped. Of a source that may end at any
time all frames are kept. Its first F are encoded as they arrive: they are the sample if no more follow. If more do,
those of them that are in the final sample are reused, and its other frames are encoded at the end.

On a GPU frames are resized on one stream and encoded on another, both shared by all clips: on the default stream a push
would wait for the encoder, and the encoder for other work of the GPU. A thread hands frames over once they are written,
so no stream waits for another.

This module knows sampling and resizing (`runtime.video`), not the encoder.
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
MOST = 10**9  # frames of a clip, a year of video: a larger `total` or `limit` is a mistake
LIMIT = 4  # times F: default limit of frames of a clip of unknown length


@dataclass(frozen=True)
class LiveTimings:
    """Seconds of a live clip.

    Attributes:
        after_last_frame: from the push of the last frame to the tokens, including the caller's time before `finish`:
            how long a question asked earlier waits for them.
        before: run time of the head before that push.
        share: fraction (0 to 1) of the sampled frames that the head had encoded before that push.
    """

    after_last_frame: float
    before: float
    share: float


class LiveClip:
    """One clip that is still arriving. A context manager that closes.

    Args:
        vision: a backend that takes chunks.
        total: number of frames that will arrive; None if unknown.
        limit: the most frames that may arrive if `total` is unknown, default 4 F; all are kept, resized.
        device: where frames are resized.
        sampling: how frames are sampled, see `runtime.video.sample_indices`.

    Raises:
        EngineError: a backend that takes whole clips only.
        UserError: an invalid total or limit.
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
        # How often each frame of the source is in the sample; with unknown length, the first F once each.
        self._times = Counter(
            range(self.frames) if total is None else sample_indices(total, self.frames, sampling).tolist()
        )
        self._reuse = total is None and vision.rows_alike
        self._chunk = vision.chunk
        self._arrived = 0
        self._kept: list[Tensor] = []  # each [3, H, W]; without a total all frames, so that any sample can be made
        self._waiting: list[Tensor] = []  # for the next chunk
        self._seconds = 0.0  # run time of the head
        self._before = (0, 0.0, 0.0)  # at the last push: frames encoded, run time of the head, the clock
        self._error: BaseException | None = None  # of the worker
        self._home = Home("this live clip")
        self._lock = threading.Lock()
        self._clip = vision.begin()
        self._resizing, self._encoding = _stream(self._device, "resize"), _stream(self._clip.device, "encode")
        if self._encoding is not None:  # this thread's stream may still be zeroing the clip's memory
            self._encoding.wait_stream(torch.cuda.current_stream(self._clip.device))
        self._worker: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="live-clip")

    def push(self, frames: Tensor | NDArray[Any]) -> None:
        """Add the next frames; returns without waiting for the encoder.

        Args:
            frames: uint8 RGB [n, 3, h, w] or [n, h, w, 3] (channels first where both would fit) in time order, of any
                size, or a single frame without n; or a PIL image, or a list of single frames or PIL images. Copied.

        Raises:
            UserError: anything else, or more frames than `total` or `limit`: then none of them is added.
            Exception: the encoder's error on earlier frames.
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
        """End the clip and close it; returns its visual tokens and timings.

        On a GPU it waits for the tokens, which can then be read on any stream.

        Raises:
            UserError: fewer frames than `total`, or than a video must have; then more may be pushed.
            Exception: the encoder's error.
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
        """Drop frames that are not encoded, wait for the current chunk, free the memory. Does nothing a second time or
        in a fork of the process."""
        if self._home.left:
            return
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(cancel_futures=True)
            self._clip.close()
            self._kept, self._waiting = [], []

    def __enter__(self) -> LiveClip:
        return self

    def __exit__(self, *raised: object) -> None:
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
        """The frames `rows` of [n, 3, h, w], copied and resized to [r, 3, H, W]."""
        if self._resizing is not None and planar.is_cuda:  # the caller's stream may still be writing them
            self._resizing.wait_stream(torch.cuda.current_stream(planar.device))
        with _on(self._resizing):
            copied = planar[to_device(torch.tensor(rows), planar.device)]
            resized = resize_frames(copied, self.size, self._device)
            _wait(resized.device)  # the worker has a stream of its own
        return resized

    def _wanted(self) -> bool:
        """False once closed, or when the exiting interpreter waits for the worker."""
        return self._worker is not None and threading.main_thread().is_alive()

    # In the worker thread, one call after the other; each checks `_wanted` first.

    def _encode(self, frames: list[Tensor]) -> None:
        if self._error is not None or not self._wanted():  # an earlier chunk failed
            return
        started = time.perf_counter()
        try:
            with _on(self._encoding):
                self._clip.push(torch.stack(frames))
                _wait(self._clip.device)  # before `frames` are freed
        except BaseException as error:  # for the caller's thread, which raises it
            self._error = error
        self._seconds += time.perf_counter() - started

    def _complete(self) -> tuple[Encoded, LiveTimings]:
        """Encode the missing frames of the sample, then run the rest of the encoder."""
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
            if value.is_cuda:  # the stream that probably still reads them when they are freed
                value.record_stream(torch.cuda.default_stream(value.device))
        encoded, seconds, came = self._before
        return found, LiveTimings(time.perf_counter() - came, seconds, plan.ahead(encoded) / self.frames)

    @property
    def times(self) -> FrameTimes:
        """Times of the sampled frames at the default frame rate, as pushed frames bring no times."""
        return times_of_sample(self._arrived, self.frames, self._sampling)

    def _plan(self) -> Completion:
        """How the sample is completed from the encoded frames."""
        encoded = self._clip.encoded
        if self.total is not None:  # the encoded frames are the beginning of the sample
            return Completion(range(encoded), range(encoded, self.frames), range(self.frames))
        sample = sample_indices(self._arrived, self.frames, self._sampling).tolist()
        return completion(sample, encoded, self._chunk if not self._reuse else None)


@dataclass(frozen=True)
class Completion:
    """How a sample is completed once the first frames of a clip are encoded.

    Attributes:
        keep: encoded frames to reuse, ascending.
        add: frames still to encode.
        rows: the sample as indices into `keep` followed by `add`; ascending.
    """

    keep: Sequence[int]
    add: Sequence[int]
    rows: Sequence[int]

    def ahead(self, encoded: int) -> int:
        """Number of the sample's rows that come from the first `encoded` frames of the clip."""
        return sum(row < len(self.keep) and self.keep[row] < encoded for row in self.rows)


def completion(sample: Sequence[int], encoded: int, chunk: int | None) -> Completion:
    """How `sample`, ascending, is completed once frames 0 to `encoded` - 1 are encoded.

    `chunk` is None if a frame's encoding does not depend on its chunk, so that every encoded frame can be reused. Else
    it is the chunk size: only leading chunks that are also chunks of the sample are reused.
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
    """Pushed frames as uint8 [n, 3, h, w], checked."""
    if isinstance(frames, list | tuple) or hasattr(frames, "getbands"):  # the latter is PIL's, which is not needed here
        return stack_frames(frames if isinstance(frames, list | tuple) else [frames])
    plain = getattr(frames, "layout", torch.strided) is torch.strided and not getattr(frames, "is_nested", False)
    single = isinstance(frames, Tensor | np.ndarray) and plain and frames.ndim == 3
    return channels_first(frames[None] if single else frames, 1)


def _take(frames: list[Tensor], chunk: int) -> list[Tensor]:
    """Remove and return the first `chunk` of `frames`."""
    taken = frames[:chunk]
    del frames[:chunk]
    return taken


@functools.cache
def _stream(device: torch.device, purpose: str) -> Any:
    """A GPU's stream for this purpose; None on a CPU. One for all clips, as torch caches memory per stream."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _on(stream: Any) -> AbstractContextManager[Any]:
    """Within the block `stream` is this thread's current stream; no-op for None."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _wait(device: torch.device) -> None:
    """Wait for this thread's current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
