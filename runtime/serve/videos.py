"""Videos that clients asked about, found again by what they are.

    found = await videos.find(VideoKey(sha256, before, frames, owner), taken, messages)
    request = found.watched.submit(messages)

A video is decoded once and read once for all questions that have the same text before it, the same number of frames
and the same owner; questions that come while it is decoded wait for that (one flight a key). What one owner has sent is
never found by another, not even by how soon the answer comes. The videos asked about least recently go first: the
pipeline keeps as many prefixes as fit into its bytes, and here are as many videos, with their sampled frames, as were
asked for. One whose prefix had to go is read again from those.
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
    """What a video is found by.

    Attributes:
        sha256: of its content.
        before: ids of the text before it.
        frames: how many were asked for; None for as many as suit it.
        owner: whose it is.
    """

    sha256: str
    before: tuple[int, ...]
    frames: int | None
    owner: str


class Closable(Protocol):
    """A video that a client gave: somebody has to close it."""

    def close(self) -> None:
        """Remove what lies on the disk. A second call does nothing."""


@dataclass(frozen=True)
class Found:
    """A video to ask about, the seconds of its frames (none where there is no clock), and what decoding and resizing it
    cost this request, in seconds."""

    watched: Watched
    timestamps: tuple[float, ...] = ()
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0


@dataclass
class _Flight:
    """A video that is being decoded, and how many wait for it."""

    task: asyncio.Task[Found]
    waiting: int = field(default=0)


class Videos:
    """The videos of one pipeline; used in one event loop.

    Args:
        most: videos that are remembered.
    """

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
        """The video of a key, decoded if it is not known.

        Args:
            taken: the video as it was given. It is closed here, whatever happens.
            messages: a conversation with `key.before` before the video.
            decode: makes a clip of `taken`.

        Raises:
            as `decode`, and `Pipeline.remember`.
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
            if not flight.waiting and not flight.task.done():  # all who waited have left
                flight.task.cancel()
                self._land(key, flight.task)
        return found if first else Found(found.watched, found.timestamps)

    def forget(self) -> None:
        """Let go of all videos."""
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
            taken.close()  # here, since a task that is cancelled early runs none of its own code
            self._land(key, task)
            if not task.cancelled():
                task.exception()  # those who waited have it, if they still do

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
            self._known.popitem(last=False)  # let go, not closed: somebody may be about to ask it
