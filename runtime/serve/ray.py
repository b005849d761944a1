"""Many pipelines behind one address, by Ray Serve: on one machine, or on a cluster.

A front (`Replicas` in the server's own process, or the deployment `Front`) handles clients: it receives and decodes
videos, and puts each one's frames into Ray's object store once. In the deployment `Answerer` each replica has one
pipeline. All questions about a video go to one replica, by consistent hashing of its content and owner, so that they
find its prefix cache there. If a replica dies in mid-answer, the question is asked again without repeating what was
sent, which needs a deterministic answer (greedy or seeded). If all replicas are busy, the front answers 429.

    python -m runtime.serve ENGINE --ray --replicas 2          # the server is the front
    serve run runtime.serve.ray:application engine=/engine     # a cluster: see deploy/serve_config.yaml

At start Ray asks the machine for cloud metadata and opens a socket towards 8.8.8.8 to learn its own address; its usage
reports are switched off here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

from earlytom.errors import UserError
from runtime.checkpoint import Preprocessing
from runtime.decoder.naming import by_vllm
from runtime.decoder.vllm.prompts import CONCURRENT
from runtime.serve.app import create_app
from runtime.serve.backend import Local, ModelFacts, Sampled
from runtime.serve.decoding import Decoders
from runtime.serve.gate import load_keys
from runtime.serve.loading import decoders_of, load_pipeline
from runtime.serve.media import TakenVideo
from runtime.serve.settings import Settings, settings_from, told_of
from runtime.service.requests import Delta
from runtime.trace import Trace
from runtime.video import Clip

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig

from runtime.serve.replicas.front import Replicas
from runtime.serve.replicas.shipped import Begun, Refused, Shipped, ShippedVideo

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_PLACES_A_TURN = 4  # requests that a front reads at a time, per unanswered question that the replicas may have
_MARGIN_SECONDS = 10.0  # beyond the deadline, to finish answers when a replica is shut down
_log = logging.getLogger(__name__)


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
    """Number of questions that a replica answers at a time."""
    return CONCURRENT if by_vllm(settings.decoder) else 1


def _gpus(settings: Settings) -> float:
    """Number of GPUs per replica."""
    if settings.device == "cpu":
        return 0
    import torch

    return 1 if settings.device == "cuda" or torch.cuda.is_available() else 0


class FrontReplica:
    """The server as the deployment `Front`: clients, videos, keys.

    told: settings by name. handle: the deployment handle of `Answerer`.
    """

    def __init__(self, told: Mapping[str, Any], handle: Any) -> None:
        self._settings, self._handle = settings_from(told), handle
        self._keys = () if self._settings.api_key_file is None else load_keys(self._settings.api_key_file)
        self._starting = asyncio.Lock()
        self._app: Any = None
        self._decoding: Decoders | None = None

    async def answer_http(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one ASGI request."""
        if self._app is None:
            async with self._starting:
                if self._app is None:
                    self._app = await self._made()
        await self._app(scope, receive, send)

    async def _made(self) -> Any:
        facts, frames = await self._handle.facts.remote()
        self._decoding = decoders_of(self._settings)
        await self._decoding.start()
        backend = Replicas(self._handle, facts, frames, self._decoding.clip, settings=self._settings)
        return create_app(backend, self._settings, self._keys)


async def _entrance(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application of every front; it calls the front of its process."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await serve.get_replica_context().servable_object.answer_http(scope, receive, send)


class _Entrance:
    """`_entrance` as an object, as Ray would call a function as a factory of applications."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await _entrance(scope, receive, send)


def application(told: Mapping[str, Any]) -> serve.Application:
    """Fronts and replicas as an application for a cluster.

    told: settings of `runtime.serve.settings.Settings` by name, `engine` at least; `fronts`: number of fronts.

    Raises:
        UserError: a setting is invalid.
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
    """A front in this process, and its replicas in a Ray instance of their own on this machine."""
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
