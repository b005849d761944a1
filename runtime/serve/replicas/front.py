"""The backend of a front: replicas behind a Ray Serve handle.

A video's frames are put into Ray's object store once, and all its questions go to one replica. If a replica dies in
mid-answer, the question is asked again: see `runtime.serve.ray`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from runtime.checkpoint import Preprocessing
from runtime.serve.backend import Asked, ModelFacts, Sampled, out_of_time, with_costs
from runtime.serve.errors import ServeError
from runtime.serve.media import TakenVideo
from runtime.serve.replicas.shipped import Begun, Refused, Shipped
from runtime.serve.settings import Settings
from runtime.service.requests import Delta

ATTEMPTS = 5  # per question; another one follows a replica's death
_PAUSE_SECONDS = 0.1  # between attempts, so that Ray notices the death
_LATE_SECONDS = 1.0  # beyond the deadline, for the replica's own error
_HEARD_OF = 64  # replicas whose cache usage is kept
_log = logging.getLogger(__name__)


class Replicas:
    """The backend whose pipelines are the replicas behind a handle; see `runtime.serve.backend.Backend`.

    Args:
        handle: the deployment handle of `Answerer`.
        facts, frames: those of `AnsweringReplica.facts`.
        decode: decodes a client's video to a clip, as `Decoders.clip`.
        settings: the server's settings.
    """

    def __init__(
        self, handle: Any, facts: ModelFacts, frames: Preprocessing, decode: Callable[..., Any], *, settings: Settings
    ) -> None:
        self._handle, self._frames, self._decode, self._most = handle, frames, decode, settings.videos
        replicas = settings.max_replicas or settings.replicas
        # The gate admits as many questions as all replicas take at most; replicas refuse beyond their own capacity.
        self.facts = dataclasses.replace(facts, lanes=replicas * (settings.waiting + facts.lanes) - settings.waiting)
        self._clips: OrderedDict[tuple[str, int | None, str], ray.ObjectRef] = OrderedDict()  # used last at the end
        self._usage: dict[str, float] = {}
        self._running = 0

    @property
    def running(self) -> int:
        """Number of requests that replicas are answering."""
        return self._running

    @property
    def cache_usage(self) -> float:
        """The highest last known cache usage of a replica."""
        return max(self._usage.values(), default=0.0)

    def check(self, asked: Asked) -> None:
        """No check here: a check of the prompt needs the tokenizer, which the replicas have."""

    async def deltas(self, asked: Asked, taken: TakenVideo) -> AsyncGenerator[Sampled | Delta, None]:
        """See `Backend.deltas`."""
        began = time.perf_counter()
        try:
            clip, costs = await self._shipped(asked, taken)
        finally:
            taken.close()
        ahead = time.perf_counter() - began
        sent = 0
        async with contextlib.aclosing(self._answered(asked, taken.sha256, clip)) as items:
            async for item in items:
                if isinstance(item, Sampled):
                    yield item
                    continue
                sent += 1
                yield with_costs(item, costs, ahead)

    async def _shipped(self, asked: Asked, taken: TakenVideo) -> tuple[ray.ObjectRef, dict[str, float]]:
        """A video's frames in the object store, and the seconds of decoding and preprocessing them just now."""
        key = (taken.sha256, asked.frames, asked.owner)
        if (known := self._clips.get(key)) is not None:
            self._clips.move_to_end(key)
            return known, {"decode": 0.0, "preprocess": 0.0}
        counts = self.facts.frames if asked.frames is None else (asked.frames,)
        clip = await self._decode(taken, counts, self._frames.size, sampling=self._frames.sampling)
        found = await asyncio.to_thread(ray.put, clip)
        self._clips[key] = found
        while len(self._clips) > self._most:
            self._clips.popitem(last=False)
        return found, {"decode": clip.decode_seconds, "preprocess": clip.preprocess_seconds}

    async def _answered(self, asked: Asked, sha256: str, clip: ray.ObjectRef) -> AsyncGenerator[Sampled | Delta, None]:
        """An answer from one replica; if it dies, from others."""
        ids: list[int | None] = []  # of tokens sent
        began = False
        for attempt in range(ATTEMPTS):
            at = 0
            try:
                async with contextlib.aclosing(self._asked(asked, sha256, clip)) as items:
                    async for item in items:
                        if isinstance(item, Begun):
                            if not began:
                                began = True
                                yield Sampled(item.timestamps)
                            continue
                        if at < len(ids):  # sent before the other replica died
                            if item.token != ids[at]:
                                raise _lost("another replica answers it in another way; ask again")
                            at += 1
                            continue
                        if item.token is not None:
                            ids.append(item.token)
                            at += 1
                        yield item
                        if item.answer is not None:
                            return
                raise _lost("its replica ended it; ask again")
            except (RayActorError, DeploymentUnavailableError) as error:
                _log.warning("a replica has died: %s", type(error).__name__)
                if ids and not (asked.sampling.greedy or asked.sampling.seed is not None):
                    raise _lost("its replica died, and it was drawn at random; ask again") from error
                if attempt == ATTEMPTS - 1:
                    raise _lost("one replica after the other died") from error
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _asked(self, asked: Asked, sha256: str, clip: ray.ObjectRef) -> AsyncGenerator[Begun | Delta, None]:
        """One replica's items; its refusal is raised."""
        left = asked.deadline - time.monotonic()
        if left <= 0:
            raise out_of_time()
        shipped = Shipped(dataclasses.replace(asked, deadline=left), sha256, [clip])
        session = f"{asked.owner}/{sha256}"
        responses = self._handle.options(stream=True, session_id=session).answer.remote(shipped)
        running = False
        try:
            async for item in _in_time(responses, asked.deadline):
                if isinstance(item, Refused):
                    raise item.error()
                if isinstance(item, Begun):
                    running = True
                    self._running += 1
                    self._usage.pop(item.replica, None)  # so that the newest is at the end
                    self._usage[item.replica] = item.cache_usage
                    while len(self._usage) > _HEARD_OF:
                        del self._usage[next(iter(self._usage))]
                yield item
        except BackPressureError as error:
            what = "every replica has as many requests as it takes; try again later"
            raise ServeError(429, "overloaded", what, retry_after=1) from error
        except (RayActorError, DeploymentUnavailableError):
            raise
        except RayError as error:
            raise _lost("its replica failed; ask again") from error
        finally:
            self._running -= running
            with contextlib.suppress(Exception):  # `cancel` raises the error of a request that reached no replica
                responses.cancel()  # no effect after the end

    def close(self) -> None:
        """Release the frames in the object store."""
        self._clips.clear()


async def _in_time(responses: Any, deadline: float) -> AsyncGenerator[Any, None]:
    """The items of `responses` until `deadline` (`time.monotonic`), then ServeError, 504."""
    items = aiter(responses)
    while True:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) + _LATE_SECONDS):
                item = await anext(items)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise out_of_time() from None
        yield item


def _lost(why: str) -> ServeError:
    return ServeError(503, "replica_lost", f"the answer was lost: {why}", retry_after=1)
