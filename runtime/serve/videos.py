"""The clients' videos, found again by their content.

    found = await videos.find(VideoKey(sha256, before, frames, owner), taken, messages)
    request = found.watched.submit(messages)

A video is decoded and prefilled once for all questions with the same text before it, the same frame count and the same
owner; questions that arrive during its decoding wait for it (single flight per key). One owner's video is never found
by another, not even through timing. Two caches are least recently used: the pipeline's prefix cache, limited in bytes,
and here the videos with their sampled frames, limited in number. A video whose prefix was evicted is prefilled again
from its frames.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runtime.pipeline import Pipeline
from runtime.service.watched import Watched
from runtime.text.messages import ChatMessage
from runtime.video import Clip


@dataclass(frozen=True)
class VideoKey:
    """The cache key of a video.

    Attributes:
        sha256: of its content.
        before: token ids of the text before it.
        frames: the requested frame count; None for the one that suits it.
        owner: id of the client's key.
    """

    sha256: str
    before: tuple[int, ...]
    frames: int | None
    owner: str


class Closable(Protocol):
    """A client's video, which must be closed."""

    def close(self) -> None:
        """Free its file. A second call does nothing."""


@dataclass(frozen=True)
class Found:
    """A video to ask about, its frames' times in seconds (none for a video without times), and the seconds that this
    request spent on decoding and resizing it."""

    watched: Watched
    timestamps: tuple[float, ...] = ()
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0


@dataclass
class _Flight:
    """A video that is being decoded, and the number of requests that wait for it."""

    task: asyncio.Task[Found]
    waiting: int = field(default=0)


class Videos:
    """The videos of one pipeline; used in one event loop. `most`: number of videos to remember."""

    def __init__(self, pipeline: Pipeline, most: int) -> None:
        self._pipeline, self._most = pipeline, most
        self._known: OrderedDict[VideoKey, Found] = OrderedDict()  # asked about last at the end
        self._flights: dict[VideoKey, _Flight] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def find(
        self,
        key: VideoKey,
        taken: Closable,
        messages: Sequence[ChatMessage],
        decode: Callable[[], Awaitable[Clip]],
    ) -> Found:
        """The video of a key, decoded if it is not known; errors as `decode` and `Pipeline.remember`.

        Args:
            taken: the received video, always closed here.
            messages: a conversation with `key.before` before the video.
            decode: decodes `taken` to a clip.
        """
        if (known := self._known.get(key)) is not None:
            taken.close()
            self._known.move_to_end(key)
            return known
        flight = self._flights.get(key)
        if first := flight is None:
            flight = self._start(key, taken, messages, decode)
        else:
            taken.close()
        assert flight is not None
        flight.waiting += 1
        try:
            found = await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():  # all waiting requests have ended
                flight.task.cancel()
                self._land(key, flight.task)
        return found if first else Found(found.watched, found.timestamps)

    def forget(self) -> None:
        """Forget all videos."""
        self._known.clear()

    def _start(
        self,
        key: VideoKey,
        taken: Closable,
        messages: Sequence[ChatMessage],
        decode: Callable[[], Awaitable[Clip]],
    ) -> _Flight:
        async def make() -> Found:
            clip = await decode()
            watched = self._pipeline.remember(clip, messages, frames=key.frames)
            self._keep(key, Found(watched, clip.timestamps))
            return Found(watched, clip.timestamps, clip.decode_seconds, clip.preprocess_seconds)

        def landed(task: asyncio.Task[Found]) -> None:
            taken.close()  # here, since a task cancelled before it starts runs none of its own code
            self._land(key, task)
            if not task.cancelled():
                task.exception()  # marks it as retrieved: waiting requests, if any, have it

        task = asyncio.get_running_loop().create_task(make())
        task.add_done_callback(landed)
        flight = self._flights[key] = _Flight(task)
        return flight

    def _land(self, key: VideoKey, task: asyncio.Task[Found]) -> None:
        if (flight := self._flights.get(key)) is not None and flight.task is task:
            del self._flights[key]

    def _keep(self, key: VideoKey, found: Found) -> None:
        self._known[key] = found
        while len(self._known) > self._most:
            self._known.popitem(last=False)  # dropped, not closed: a request may be about to use it
