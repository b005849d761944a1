"""POST /v1/chat/completions: from the body of a request to its answer, whole or streamed.

The steps: read and parse the body, check the question, get the video, generate and send the answer. Until the first
token an error has its HTTP status; after it the event stream ends with an error event. A client's disconnect cancels
its request at any step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.requests import Request

from runtime.errors import Cancelled, DecoderFailed
from runtime.serve.backend import Asked, Backend, ModelFacts, Sampled, out_of_time
from runtime.serve.errors import ServeError, body, from_runtime
from runtime.serve.gate import Receive, Scope, Send
from runtime.serve.http.chat import conversation_of
from runtime.serve.http.events import Events, while_there
from runtime.serve.http.spans import Spans
from runtime.serve.media import Media, TakenVideo, VideoPart
from runtime.serve.metrics import Metrics
from runtime.serve.protocol import ChatRequest, Reply, parse, usage_of
from runtime.serve.settings import Settings
from runtime.service.requests import Answer, Delta, Provenance

_LONG = 20_000  # longer texts (in characters) are checked outside the event loop
_log = logging.getLogger(__name__)


class Completions:
    """The endpoint, an ASGI application.

    Attributes:
        inside: number of unanswered questions, at any step.
        started: start of the server, in seconds since 1970.
    """

    metrics: Metrics
    spans: Spans | None = None

    def __init__(self, backend: Backend, settings: Settings, media: Media) -> None:
        self._backend, self._settings, self._media = backend, settings, media
        self.inside = 0
        self.started = int(time.time())

    @property
    def room(self) -> bool:
        """Whether another question may enter."""
        return self.inside < self._settings.waiting + self._backend.facts.lanes

    def check_model(self, name: str) -> None:
        """Raises ServeError, 404, for another model's name."""
        if name != self._settings.name:
            what = f"there is no model {name[:100]!r}; this server has {self._settings.name!r}"
            raise ServeError(404, "model_not_found", what, param="model")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        content = await Request(scope, receive).body()
        request = parse(content, self._backend.facts.frames, self._settings.max_tokens)
        del content  # it has a whole video in it
        self.check_model(request.model)
        messages, part = conversation_of(request.messages)
        asked = Asked(
            messages=tuple(messages),
            sampling=request.sampling,
            stop=request.stop,
            frames=request.frames,
            max_tokens=request.max_tokens,
            most_tokens=self._settings.max_tokens,
            kept=request.kept,
            owner=scope["state"]["key"],
            deadline=arrived + self._settings.deadline,
        )
        request.messages.clear()
        watch = _Watch(arrived, _header(scope, b"traceparent"))
        await while_there(self._answer(request, asked, part, Events(send), send, watch), receive)

    async def _answer(
        self,
        request: ChatRequest,
        asked: Asked,
        part: VideoPart,
        events: Events,
        send: Send,
        watch: _Watch,
    ) -> None:
        reply = Reply(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), self._settings.name)
        try:
            async with aclosing(self._deltas(asked, part, watch)) as deltas:
                if request.stream:
                    await self._stream(request, reply, deltas, watch, events)
                else:
                    await self._whole(request, reply, deltas, watch, send)
        except asyncio.CancelledError:
            if not watch.counted:
                self.metrics.ended("abort")
                self._trace(watch, status=499, code="cancelled")
            raise
        except Exception as error:
            found = from_runtime(error)
            if found.status >= 500 and found.code == "internal_error":
                _log.exception("a question failed")
            if isinstance(error, DecoderFailed):
                _log.warning("%s", error)
            self._trace(watch, status=found.status, code=found.code)
            if not events.started:
                raise found from error
            await events.event(body(found))
            await events.done()
            self.metrics.refused(found.status)
        finally:
            events.stop()

    async def _deltas(self, asked: Asked, part: VideoPart, watch: _Watch) -> AsyncGenerator[Delta, None]:
        """The answer's deltas; the question has its place until the last of them exists."""
        if not self.room:
            what = f"{self.inside} requests are unanswered, and this server takes no more; try again later"
            raise ServeError(429, "overloaded", what, retry_after=1)
        self.inside += 1
        try:
            taken = await self._take(asked, part)
            watch.video = taken.sha256
            deltas = self._backend.deltas(asked, taken)
            try:
                async with _until(asked.deadline):  # from the first one on the pipeline's own deadline holds
                    delta = await anext(deltas, None)
                    if isinstance(delta, Sampled):
                        watch.timestamps = delta.timestamps
                        delta = await anext(deltas, None)
                while isinstance(delta, Delta):
                    watch.token(delta)
                    if delta.answer is not None:  # free the place before the client reads the end
                        break
                    yield delta
                    delta = await anext(deltas, None)
            finally:
                await deltas.aclose()
        finally:
            self.inside -= 1
        if not isinstance(delta, Delta):
            raise Cancelled("the answer ended before its end")
        yield delta

    async def _take(self, asked: Asked, part: VideoPart) -> TakenVideo:
        """Check the question, then get its video."""
        async with _until(asked.deadline):
            if sum(len(one.text) for one in asked.messages) > _LONG:
                await asyncio.to_thread(self._backend.check, asked)
            else:
                self._backend.check(asked)
            return await self._media.take(part, key=asked.owner)

    async def _whole(
        self, request: ChatRequest, reply: Reply, deltas: AsyncGenerator[Delta, None], watch: _Watch, send: Send
    ) -> None:
        last = None
        async for delta in deltas:
            last = delta
        answer = self._count(last, watch)
        told = reply.whole(
            answer.text, answer.finish, _usage(answer), _told(request, answer, watch, self._backend.facts)
        )
        content = json.dumps(told, ensure_ascii=False, allow_nan=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _stream(
        self, request: ChatRequest, reply: Reply, deltas: AsyncGenerator[Delta, None], watch: _Watch, events: Events
    ) -> None:
        last = None
        async for last in deltas:
            if not events.started:
                await events.event(reply.chunk({"role": "assistant", "content": ""}))
            if last.text:
                await events.event(reply.chunk({"content": last.text}))
        answer = self._count(last, watch)
        await events.event(
            reply.chunk({}, answer.finish) | {"earlytom": _told(request, answer, watch, self._backend.facts)}
        )
        if request.include_usage:
            await events.event(reply.usage_chunk(_usage(answer)))
        await events.done()

    def _count(self, last: Delta | None, watch: _Watch) -> Answer:
        """Count the last delta's answer in the metrics and return it."""
        assert last is not None  # `_deltas` has raised
        assert last.answer is not None
        seconds = time.monotonic() - watch.arrived
        self.metrics.observe(last.answer, seconds, [b - a for a, b in itertools.pairwise(watch.tokens)])
        watch.counted = True
        self._trace(watch, answer=last.answer)
        return last.answer

    def _trace(self, watch: _Watch, **how: Any) -> None:
        if self.spans is not None:
            self.spans.question(began=watch.arrived, traceparent=watch.traceparent, **how)


class _Watch:
    """A request's arrival, and what is known of its answer so far."""

    def __init__(self, arrived: float, traceparent: str | None = None) -> None:
        self.arrived, self.traceparent = arrived, traceparent
        self.video = ""  # the video's hash
        self.counted = False  # whether the answer is counted in the metrics
        self.timestamps: tuple[float, ...] = ()  # of the video's frames
        self.tokens: list[float] = []  # `time.monotonic` of each

    def token(self, delta: Delta) -> None:
        if delta.token is not None:
            self.tokens.append(time.monotonic())


def _header(scope: Scope, name: bytes) -> str | None:
    """A header's value, if it has one."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


@asynccontextmanager
async def _until(deadline: float) -> AsyncGenerator[None, None]:
    """Raises ServeError 504 if the block is not done by `deadline`, in `time.monotonic`."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError:
        raise out_of_time() from None


def _usage(answer: Answer) -> dict[str, Any]:
    return usage_of(answer.prompt_tokens, answer.cached_tokens, answer.generated_tokens)


def _told(request: ChatRequest, answer: Answer, watch: _Watch, facts: ModelFacts) -> dict[str, Any]:
    """The response's own field `earlytom`."""
    times = answer.timings
    told: dict[str, Any] = {
        "video": watch.video,
        "video_tokens": answer.visual_tokens,
        "timings": {
            name: round(getattr(times, name), 6)
            for name in ("waiting", "decode", "preprocess", "vision", "prefill", "first_token", "per_token", "total")
        },
    }
    if request.kept:
        told["kept"] = None if answer.kept is None else _kept(answer.kept, facts, watch)
    return told


def _kept(kept: Provenance, facts: ModelFacts, watch: _Watch) -> dict[str, Any]:
    """The provenance of the visual tokens, with the grid of a frame's cells and the frames' times in seconds."""
    found = {one.name: getattr(kept, one.name) for one in dataclasses.fields(kept)}
    about = {"grid": facts.grid, "times": watch.timestamps}
    return about | {name: None if value is None else value.tolist() for name, value in found.items()}
