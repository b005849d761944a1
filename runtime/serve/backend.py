"""Who answers: between the server, which knows of clients, and a pipeline, which knows of videos.

`Backend` is what the server needs of it, so that pipelines elsewhere can take the place of the one in this process
(`Local`). A question goes through three calls: `check`, before its video is taken from the client; `deltas`, with the
video; and the server reads these until they end or leaves them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from earlytom.families import family_named
from runtime.decoder.sampling import Sampling
from runtime.engine.manifest import Manifest
from runtime.pipeline import Pipeline
from runtime.serve.errors import ServeError
from runtime.serve.media import TakenVideo
from runtime.serve.videos import VideoKey, Videos
from runtime.service.requests import Delta
from runtime.text.messages import ChatMessage
from runtime.video import Clip

Decode = Callable[[TakenVideo, Sequence[int], tuple[int, int]], Awaitable[Clip]]


@dataclass(frozen=True)
class ModelFacts:
    """What clients are told of the model.

    Attributes:
        frames, tokens, tokens_full: numbers of frames that the engine samples, and for each the visual tokens that are
            left and those without compression.
        ratio: of the tokens that the engine keeps.
        context: positions that a prompt and its answer may take together.
        engine: its name.
        grid: rows and columns of a frame's cells; None where tokens are no cells of a grid.
        lanes: questions that are answered at a time.
    """

    frames: tuple[int, ...]
    tokens: tuple[int, ...]
    tokens_full: tuple[int, ...]
    ratio: float
    context: int
    engine: str
    grid: tuple[int, int] | None
    lanes: int = 1


@dataclass(frozen=True)
class Asked:
    """A question of a client's.

    Attributes:
        messages, sampling, stop, frames: as `Pipeline.submit` takes them.
        max_tokens: None for as many as `most_tokens` and the context allow.
        kept: the answer is to say which visual tokens it looked at.
        owner: id of the client's key.
        deadline: `time.monotonic` at which its time is up.
    """

    messages: tuple[ChatMessage, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    frames: int | None
    max_tokens: int | None
    most_tokens: int
    kept: bool
    owner: str
    deadline: float


@dataclass(frozen=True)
class Sampled:
    """The video is there.

    Attributes:
        timestamps: of its frames, in seconds after the first of the file; none where there is no clock.
    """

    timestamps: tuple[float, ...]


class Backend(Protocol):
    """Answers questions; all methods are called in one event loop."""

    facts: ModelFacts

    @property
    def running(self) -> int:
        """Requests that are being answered."""

    @property
    def cache_usage(self) -> float:
        """Share of the memory for videos that were read which is taken, 0 to 1."""

    def check(self, asked: Asked) -> None:
        """Refuse what can be refused without the video; raises as `Pipeline.check`."""

    def deltas(self, asked: Asked, taken: TakenVideo) -> AsyncGenerator[Sampled | Delta, None]:
        """One `Sampled`, then the answer as it comes.

        `taken` is closed, whatever happens; closing the generator cancels the request.

        Raises:
            as `Pipeline.submit` and its request, and ServeError for a video that cannot be decoded.
        """

    def close(self) -> None:
        """Let go of what is held. A second call does nothing."""


class Local:
    """A pipeline of this process, and the videos that its clients asked about.

    Args:
        decode: makes a clip of what a client gave, of one of some frame counts and of the size [H, W].
        videos: how many are remembered.
    """

    def __init__(self, pipeline: Pipeline, decode: Decode, *, videos: int) -> None:
        manifest = pipeline.manifest
        each = [manifest.at(frames) for frames in manifest.counts]
        self._pipeline, self._decode = pipeline, decode
        self._videos = Videos(pipeline, videos)
        self.facts = ModelFacts(
            frames=tuple(manifest.counts),
            tokens=tuple(one.tokens for one in each),
            tokens_full=tuple(one.tokens_full for one in each),
            ratio=round(each[-1].tokens / each[-1].tokens_full, 4),
            context=pipeline.context,
            engine=manifest.name,
            grid=grid_of(manifest),
            lanes=pipeline.lanes,
        )

    @property
    def running(self) -> int:
        return 0 if self._pipeline.closed else self._pipeline.running

    @property
    def cache_usage(self) -> float:
        cache = self._pipeline.watched
        return cache.counters.bytes / cache.limit if cache.limit else 0.0

    def check(self, asked: Asked) -> None:
        self._question(asked)

    async def deltas(self, asked: Asked, taken: TakenVideo) -> AsyncGenerator[Sampled | Delta, None]:
        began = time.perf_counter()
        try:
            before, how = self._question(asked)
        except BaseException:
            taken.close()
            raise
        key = VideoKey(taken.sha256, before, asked.frames, asked.owner)
        facts, size = self.facts, self._pipeline.manifest.model.preprocessing.size
        counts = facts.frames if asked.frames is None else (asked.frames,)
        found = await self._videos.find(key, taken, asked.messages, lambda: self._decode(taken, counts, size))
        left = asked.deadline - time.monotonic()
        if left <= 0:
            raise out_of_time()
        request = found.watched.submit(asked.messages, deadline=left, **how)
        ahead = time.perf_counter() - began
        async with request:
            yield Sampled(found.timestamps)
            async for delta in request:
                yield with_costs(delta, {"decode": found.decode_seconds, "preprocess": found.preprocess_seconds}, ahead)

    def close(self) -> None:
        self._videos.forget()

    def _question(self, asked: Asked) -> tuple[tuple[int, ...], dict[str, Any]]:
        """The ids before the video, and how the question is asked. Raises as `Pipeline.check`."""
        how: dict[str, Any] = {"sampling": asked.sampling, "stop": asked.stop, "kept": asked.kept}
        count = 1 if asked.max_tokens is None else asked.max_tokens
        words = self._pipeline.check(asked.messages, max_new_tokens=count, frames=asked.frames, **how)
        if asked.max_tokens is None:
            tokens = dict(zip(self.facts.frames, self.facts.tokens, strict=True))
            visual = max(tokens.values()) if asked.frames is None else tokens[asked.frames]
            manifest = self._pipeline.manifest
            visual += manifest.closings.most(visual, manifest.frames_per_stage[-1])
            length = words.room(visual, manifest.frames_per_stage[-1], manifest.layout.steps)
            count = max(1, min(asked.most_tokens, self.facts.context - length))
        return words.prefix_ids, how | {"max_new_tokens": count}


def grid_of(manifest: Manifest) -> tuple[int, int] | None:
    """Rows and columns of a frame's cells, as the model's family has them; None where tokens are no cells of a grid."""
    height, width = manifest.model.preprocessing.size
    patch = manifest.model.patch_size
    rows, columns = family_named(manifest.model.family).cells((height // patch, width // patch))
    return (rows, columns) if rows * columns == manifest.tokens_per_frame else None


def with_costs(delta: Delta, costs: Mapping[str, float], ahead: float) -> Delta:
    """A delta whose answer, if it has one, counts what was done before its request was submitted.

    Args:
        costs: seconds of stages that were done there, by name.
        ahead: seconds from the question to its submission; what no stage has of them was a wait.
    """
    if delta.answer is None:
        return delta
    times = delta.answer.timings
    times = dataclasses.replace(
        times,
        **{name: getattr(times, name) + seconds for name, seconds in costs.items()},
        waiting=times.waiting + max(0.0, ahead - sum(costs.values())),
        first_token=times.first_token + ahead,
        total=times.total + ahead,
    )
    return dataclasses.replace(delta, answer=dataclasses.replace(delta.answer, timings=times))


def out_of_time() -> ServeError:
    """What is said when a deadline passes before the question is in line."""
    return ServeError(504, "deadline_exceeded", "the deadline passed before the video was there: send a smaller one")
