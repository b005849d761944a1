"""Many pipelines behind one address, by Ray Serve: on one machine, or on a cluster.

A front (`Replicas` in the server's own process, or the deployment `Front`) has everything that knows of clients: it
takes and decodes videos, and puts the frames into Ray's object store once. `Answerer` is a deployment of which each
replica has one pipeline. A video's questions go to one replica, by consistent hashing of its content and its owner, so
that they find it read there. A replica that dies in mid-answer costs nobody an answer: the question is asked again, and
what was sent already is left out, which needs an answer that comes out the same (greedy or seeded). Where all replicas
are busy the front says 429.

    python -m runtime.serve ENGINE --ray --replicas 2          # the server is the front
    serve run runtime.serve.ray:application engine=/engine     # a cluster: see deploy/serve_config.yaml

Ray, when it starts, asks the machine for cloud metadata and opens a socket towards 8.8.8.8 to learn its own address;
what it would report of its use is switched off here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from earlytom.errors import UserError
from runtime.checkpoint import Preprocessing
from runtime.decoder.naming import by_vllm
from runtime.decoder.vllm.prompts import CONCURRENT
from runtime.serve.app import create_app
from runtime.serve.backend import Asked, Local, ModelFacts, Sampled, out_of_time, with_costs
from runtime.serve.decoding import Decoders
from runtime.serve.errors import ServeError, from_runtime
from runtime.serve.gate import load_keys
from runtime.serve.loading import limits_of, load_pipeline
from runtime.serve.media import TakenVideo
from runtime.serve.settings import Settings, settings_from, told_of
from runtime.service.requests import Delta
from runtime.trace import Trace
from runtime.video import Clip

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
ATTEMPTS = 5  # replicas that may die of, or during, one question
_PAUSE_SECONDS = 0.1  # before another one is asked; Ray learns of a death within a moment
_LATE_SECONDS = 1.0  # in which a replica says itself that the time is up
_HEARD_OF = 64  # replicas whose memory is remembered
_PLACES_A_TURN = 4  # requests that a front reads at a time, for each that may be unanswered
_MARGIN_SECONDS = 10.0  # beyond the deadline, for answers to end when a replica is to go
_log = logging.getLogger(__name__)


# What goes between a front and a replica


@dataclass(frozen=True)
class Shipped:
    """A question about a video that is in the object store.

    Attributes:
        asked: with a deadline that counts from now, as clocks of machines differ.
        sha256: of the video.
        clip: where its frames are, in a list, or Ray would fetch them with every question.
    """

    asked: Asked
    sha256: str
    clip: list[ray.ObjectRef]


@dataclass(frozen=True)
class Begun:
    """The video is there: the seconds of its frames, who answers, and how full its memory for videos is."""

    timestamps: tuple[float, ...]
    replica: str
    cache_usage: float


@dataclass(frozen=True)
class Refused:
    """A `ServeError`, which does not survive pickling as an error."""

    status: int
    code: str
    message: str
    param: str | None
    retry_after: int | None

    @classmethod
    def of(cls, error: BaseException) -> Refused:
        found = from_runtime(error)
        return cls(found.status, found.code, found.message, found.param, found.retry_after)

    def error(self) -> ServeError:
        return ServeError(self.status, self.code, self.message, param=self.param, retry_after=self.retry_after)


@dataclass
class ShippedVideo(TakenVideo):
    """A video as a replica has it: it is somewhere else, decoded."""

    clip: ray.ObjectRef | None = None


# A replica


class AnsweringReplica:
    """One pipeline; what the deployment `Answerer` runs.

    told: settings by name, as `settings_from` takes them.
    """

    def __init__(self, told: Mapping[str, Any]) -> None:
        settings = settings_from(told)
        self._pipeline = load_pipeline(settings)
        self._backend = Local(self._pipeline, self._decoded, videos=settings.videos)
        self._name = serve.get_replica_context().replica_id.unique_id

    async def facts(self) -> tuple[ModelFacts, Preprocessing]:
        """What clients are told of the model, and what it wants of frames."""
        frames = self._pipeline.manifest.model.preprocessing
        return self._backend.facts, Preprocessing(frames.size, sampling=frames.sampling)

    async def answer(self, shipped: Shipped) -> AsyncGenerator[Begun | Delta | Refused, None]:
        """One `Begun`, then the answer as it comes; a refusal instead, or in its midst."""
        asked = dataclasses.replace(shipped.asked, deadline=time.monotonic() + shipped.asked.deadline)
        taken = ShippedVideo(shipped.sha256, 0, clip=shipped.clip[0])
        try:
            async with contextlib.aclosing(self._backend.deltas(asked, taken)) as deltas:
                async for one in deltas:
                    if isinstance(one, Sampled):
                        yield Begun(one.timestamps, self._name, self._backend.cache_usage)
                    else:
                        yield one
        except Exception as error:
            refused = Refused.of(error)
            if refused.status >= 500:
                _log.warning("a question failed: %s", error, exc_info=refused.code == "internal_error")
            yield refused

    async def _decoded(self, taken: TakenVideo, counts: Sequence[int], size: tuple[int, int]) -> Clip:
        assert isinstance(taken, ShippedVideo)
        assert taken.clip is not None
        clip: Clip = await taken.clip
        return dataclasses.replace(clip, decode_seconds=0.0, preprocess_seconds=0.0)  # the front counts them

    def __del__(self) -> None:
        if (pipeline := getattr(self, "_pipeline", None)) is not None:
            pipeline.close()


def answerer(told: Mapping[str, Any]) -> serve.Application:
    """The deployment of replicas that settings ask for."""
    settings = settings_from(told)
    most = settings.max_replicas or settings.replicas
    scaled: dict[str, Any] = {"num_replicas": settings.replicas}
    if most > settings.replicas:
        bounds = {"min_replicas": settings.replicas, "max_replicas": most, "target_ongoing_requests": 2}
        scaled = {"autoscaling_config": bounds | {"upscale_delay_s": 5, "downscale_delay_s": 60}}
    deployment = serve.deployment(
        name="Answerer",
        max_ongoing_requests=settings.waiting + _lanes(settings),
        max_queued_requests=settings.waiting + 1,
        graceful_shutdown_timeout_s=settings.deadline + _MARGIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=30,
        ray_actor_options={"num_cpus": 0, "num_gpus": _gpus(settings)},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER) if consistent() else None,
        **scaled,
    )(AnsweringReplica)
    return deployment.bind(dict(told))


def consistent() -> bool:
    """Whether a video's questions can be kept on one replica."""
    return importlib.util.find_spec("mmh3") is not None


def _lanes(settings: Settings) -> int:
    """Questions that a replica answers at a time."""
    return CONCURRENT if by_vllm(settings.decoder) else 1


def _gpus(settings: Settings) -> float:
    """Of each replica."""
    if settings.device == "cpu":
        return 0
    import torch

    return 1 if settings.device == "cuda" or torch.cuda.is_available() else 0


# A front


class Replicas:
    """The backend whose pipelines are the replicas behind a handle; see `runtime.serve.backend.Backend`.

    Args:
        handle: of `Answerer`.
        facts, frames: as `AnsweringReplica.facts` says.
        decode: makes a clip of what a client gave, as `Decoders.clip` does.
        settings: of the server.
    """

    def __init__(
        self, handle: Any, facts: ModelFacts, frames: Preprocessing, decode: Callable[..., Any], *, settings: Settings
    ) -> None:
        self._handle, self._frames, self._decode, self._most = handle, frames, decode, settings.videos
        replicas = settings.max_replicas or settings.replicas
        # As many questions may be inside as all replicas take; where they take fewer, they say so.
        self.facts = dataclasses.replace(facts, lanes=replicas * (settings.waiting + facts.lanes) - settings.waiting)
        self._clips: OrderedDict[tuple[str, int | None, str], ray.ObjectRef] = OrderedDict()  # used last at the end
        self._usage: dict[str, float] = {}
        self._running = 0

    @property
    def running(self) -> int:
        """Requests that a replica has begun with."""
        return self._running

    @property
    def cache_usage(self) -> float:
        """Of the replica that is fullest, when it was last heard of."""
        return max(self._usage.values(), default=0.0)

    def check(self, asked: Asked) -> None:
        """What needs the tokenizer is for the replica to refuse."""

    async def deltas(self, asked: Asked, taken: TakenVideo) -> AsyncGenerator[Sampled | Delta, None]:
        """As of `Backend`."""
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
        """Where the frames of a video are, and what decoding and resizing them cost now."""
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
        """An answer, from one replica, or from others where that one dies."""
        ids: list[int | None] = []  # tokens that were sent
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
        """What one replica says; raises what it refuses."""
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
                    self._usage.pop(item.replica, None)  # heard of last goes to the end
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
            responses.cancel()  # of no effect on one that has ended

    def close(self) -> None:
        """Let go of frames."""
        self._clips.clear()


async def _in_time(responses: Any, deadline: float) -> AsyncGenerator[Any, None]:
    """What comes before a `time.monotonic`. Raises ServeError, 504."""
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


class FrontReplica:
    """The server as a deployment: clients, videos, keys; what `Front` runs.

    told: settings by name. handle: of `Answerer`.
    """

    def __init__(self, told: Mapping[str, Any], handle: Any) -> None:
        self._settings, self._handle = settings_from(told), handle
        self._keys = () if self._settings.api_key_file is None else load_keys(self._settings.api_key_file)
        self._starting = asyncio.Lock()
        self._app: Any = None
        self._decoding: Decoders | None = None

    async def answer_http(self, scope: Any, receive: Any, send: Any) -> None:
        """One request, as ASGI has it."""
        if self._app is None:
            async with self._starting:
                if self._app is None:
                    self._app = await self._made()
        await self._app(scope, receive, send)

    async def _made(self) -> Any:
        facts, frames = await self._handle.facts.remote()
        self._decoding = Decoders(limits_of(self._settings), seconds=self._settings.deadline)
        await self._decoding.start()
        backend = Replicas(self._handle, facts, frames, self._decoding.clip, settings=self._settings)
        return create_app(backend, self._settings, self._keys)


async def _entrance(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application of every front, which is the one of its process."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await serve.get_replica_context().servable_object.answer_http(scope, receive, send)


class _Entrance:
    """An object, as Ray takes a function for one that makes an application."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await _entrance(scope, receive, send)


def application(told: Mapping[str, Any]) -> serve.Application:
    """The whole of it for a cluster: fronts, and replicas behind them.

    told: settings of `runtime.serve.settings.Settings` by name; `engine` at least, `fronts` for how many of them.

    Raises:
        UserError: a setting that makes no sense.
    """
    told = {"ray": True} | dict(told)
    fronts = int(told.pop("fronts", 1))
    settings = settings_from(told)
    front = serve.deployment(
        name="Front",
        num_replicas=fronts,
        max_ongoing_requests=_PLACES_A_TURN * (settings.max_replicas or settings.replicas) * (settings.waiting + 1),
        graceful_shutdown_timeout_s=settings.deadline + _MARGIN_SECONDS,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress(_Entrance())(FrontReplica))
    return front.bind(told, answerer(told))


# One machine


@contextlib.contextmanager
def on_this_machine(settings: Settings, decode: Callable[..., Any], trace: Trace) -> Iterator[Replicas]:
    """A front in this process, and its replicas in a Ray of their own on this machine.

    Raises:
        UserError: the replicas do not start.
    """
    if not consistent():
        trace.line('note: without mmh3 a video may be read by every replica: pip install -e ".[ray]"')
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # deaths of replicas are told here
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING, configure_logging=False)
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        try:
            handle = serve.run(answerer(told_of(settings)), route_prefix=None)
            facts, frames = handle.facts.remote().result()
        except (RuntimeError, RayError) as error:
            what = str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__
            raise UserError(f"the replicas do not start ({what}); run it without --ray to see why") from error
        most = settings.max_replicas or settings.replicas
        count = f"{settings.replicas}" if most == settings.replicas else f"{settings.replicas} to {most}"
        trace.line(f"engine: {facts.engine} (Ray {ray.__version__}, {count} replicas)")
        backend = Replicas(handle, facts, frames, decode, settings=settings)
        yield backend
        backend.close()
        serve.shutdown()
    finally:
        ray.shutdown()
