"""The backend that answers questions: the interface between the server (clients) and a pipeline (videos).

`Local` is a pipeline in this process; other backends may use pipelines elsewhere. A question takes two calls: `check`,
before its video is received, and `deltas` with the video, which the server reads to the end or closes.
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
    """Facts about the model, for clients.

    Attributes:
        frames, tokens, tokens_full: the engine's frame counts, and for each the visual tokens with and without
            compression.
        ratio: retention ratio of the largest frame count.
        context: context length in tokens, prompt and answer together.
        engine: its name.
        grid: rows and columns of a frame's cells; None where tokens are no cells of a grid.
        lanes: number of questions answered concurrently.
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
    """A client's question.

    Attributes:
        messages, sampling, stop, frames, kept: as in `Pipeline.submit`.
        max_tokens: None for as many as `most_tokens` and the context allow.
        owner: id of the client's API key.
        deadline: in `time.monotonic`.
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
    """The event that the video is sampled.

    Attributes:
        timestamps: of its frames, in seconds after the file's first frame; none for a video without times.
    """

    timestamps: tuple[float, ...]


class Backend(Protocol):
    """Answers questions; all methods are called in one event loop."""

    facts: ModelFacts

    @property
    def running(self) -> int:
        """Number of requests being answered."""

    @property
    def cache_usage(self) -> float:
        """Used share of the prefix cache, 0 to 1."""

    def check(self, asked: Asked) -> None:
        """Check a question without its video; raises as `Pipeline.check`."""

    def deltas(self, asked: Asked, taken: TakenVideo) -> AsyncGenerator[Sampled | Delta, None]:
        """One `Sampled`, then the answer's deltas.

        `taken` is closed, whatever happens; closing the generator cancels the request.

        Raises:
            as `Pipeline.submit` and its request, and ServeError for a video that cannot be decoded.
        """

    def close(self) -> None:
        """Free all resources. A second call does nothing."""


class Local:
    """A pipeline in this process, and its clients' videos.

    Args:
        decode: decodes a client's video to a clip of one of some frame counts and of size (H, W).
        videos: number of videos to remember.
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
        """The token ids before the video, and the arguments of `submit`. Raises as `Pipeline.check`."""
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
    """Rows and columns of a frame's cells, by the model's family; None where tokens are no cells of a grid."""
    height, width = manifest.model.preprocessing.size
    patch = manifest.model.patch_size
    rows, columns = family_named(manifest.model.family).cells((height // patch, width // patch))
    return (rows, columns) if rows * columns == manifest.tokens_per_frame else None


def with_costs(delta: Delta, costs: Mapping[str, float], ahead: float) -> Delta:
    """Add the time before a request's submission to its answer's timings, if the delta has the answer.

    Args:
        costs: seconds of the stages before submission, by name.
        ahead: seconds from the question to its submission; those of no stage count as waiting.
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
    """The error of a deadline that passes before the question is submitted."""
    return ServeError(504, "deadline_exceeded", "the deadline passed before the video was there: send a smaller one")
