"""The server as an ASGI application: OpenAI's paths on a backend, behind the gate.

    app = create_app(backend, settings)

POST /v1/chat/completions, GET /v1/models[/ID], POST, GET and DELETE /v1/files, /health, /ready, /metrics, /version, and
a page at /. Errors have OpenAI's format. `app.inside` counts unanswered questions; once `app.draining` is set new ones
are refused and current ones are answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from runtime.serve.backend import Backend
from runtime.serve.errors import ServeError, body, from_runtime
from runtime.serve.fetch import FetchRules
from runtime.serve.gate import Door, Receive, Scope, Send
from runtime.serve.http.completions import Completions
from runtime.serve.http.spans import Spans
from runtime.serve.http.uploads import Uploads
from runtime.serve.media import FileStore, Media
from runtime.serve.metrics import CONTENT_TYPE, Metrics
from runtime.serve.page import page
from runtime.serve.settings import Settings

# Bodies that may be read for each request that may be unanswered: slow ones are not to shut others out.
_PLACES_A_TURN = 4
_FORM_BYTES = 64 << 10  # of an upload, beside its file


class ServerApp:
    """The ASGI application, with its state for the server process.

    Attributes:
        draining: no new questions are taken.
    """

    def __init__(self, backend: Backend, settings: Settings, keys: Sequence[str]) -> None:
        self.draining = False
        self.backend, self.settings = backend, settings
        self.files = FileStore(
            8 * settings.max_video, settings.videos, owners=max(1, len(keys)), max_file=settings.max_video
        )
        rules = FetchRules(
            allow_domains=settings.allow_domain,
            allow_private=settings.allow_private,
            seconds=settings.fetch_seconds,
            max_bytes=settings.max_video,
        )
        self.completions = Completions(backend, settings, Media(rules, settings.max_video, self.files))
        self.metrics = self.completions.metrics = Metrics(settings.metrics_prefix, model=settings.name)
        self.spans = None if settings.otlp is None else Spans(settings.otlp, name=settings.name)
        self.completions.spans = self.spans
        self.metrics.gauges(
            running=lambda: backend.running,
            waiting=lambda: max(0, self.inside - backend.running),
            cache_usage=lambda: backend.cache_usage,
        )
        self._door = Door(
            self._routes(),
            keys=keys,
            max_body=settings.max_body,
            max_upload=settings.max_video + _FORM_BYTES,
            body_seconds=settings.body_seconds,
            places=_PLACES_A_TURN * (settings.waiting + backend.facts.lanes),
            room=lambda: self.completions.room,
            draining=lambda: self.draining,
            cors=settings.cors,
            refused=self.metrics.refused,
        )

    @property
    def inside(self) -> int:
        """Number of unanswered questions."""
        return self.completions.inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._door(scope, receive, send)

    @property
    def busy(self) -> bool:
        """Whether any request waits for an answer, or is being sent one."""
        return self._door.inside > 0

    def close(self) -> None:
        """Delete uploaded files and free the backend's videos."""
        if self.spans is not None:
            self.spans.close()
        self.files.close()
        self.backend.close()

    def _routes(self) -> FastAPI:
        uploads = Uploads(self.files)
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        app.router.routes.extend(
            [
                Route("/v1/chat/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/files", uploads.create, methods=["POST"]),
                Route("/v1/files", uploads.list),
                Route("/v1/files/{id}", uploads.get),
                Route("/v1/files/{id}", uploads.delete, methods=["DELETE"]),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/version", self._version),
                *([Route("/", page)] if self.settings.page else []),
            ]
        )
        for kind in (ServeError, HTTPException, Exception):
            app.add_exception_handler(kind, self._refused)
        app.add_exception_handler(ClientDisconnect, self._left)
        return app

    async def _refused(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = _of_the_framework(error, request)
        found = from_runtime(error)
        headers = {} if found.retry_after is None else {"retry-after": str(found.retry_after)}
        if found.status == 405:
            headers["allow"] = ", ".join(_methods(request))
        return JSONResponse(body(found), found.status, headers)

    async def _left(self, request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # the client has disconnected

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self.completions.check_model(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        facts = self.backend.facts
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.completions.started,
            "owned_by": "earlytom",
            "max_model_len": facts.context,
            "earlytom": {
                "engine": facts.engine,
                "frames": facts.frames,
                "tokens": facts.tokens,
                "tokens_full": facts.tokens_full,
                "ratio": facts.ratio,
            },
        }

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        if self.draining:
            raise ServeError(503, "draining", "the server is shutting down; ask another one", retry_after=1)
        return JSONResponse({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _version(self, request: Request) -> Response:
        try:
            found = version("earlytom-engine-builder")
        except PackageNotFoundError:  # run from its sources
            found = "0"
        return JSONResponse({"version": found})


def create_app(backend: Backend, settings: Settings, keys: Sequence[str] = ()) -> ServerApp:
    """The application on a backend.

    keys: API keys, any of which gives access to the paths under /v1; none: access without a key.

    Raises:
        UserError: a setting that makes no sense, by its flag.
    """
    return ServerApp(backend, settings, keys)


def _of_the_framework(error: HTTPException, request: Request) -> ServeError:
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        return ServeError(404, "not_found", f"there is no {where}")
    if error.status_code == 405:
        return ServeError(405, "method_not_allowed", f"there is no {where}; the path has other methods")
    return ServeError(error.status_code, "invalid_request", str(error.detail))


def _methods(request: Request) -> list[str]:
    """The HTTP methods of a path, over all of its routes."""
    routes = [one for one in request.app.routes if one.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for one in routes for method in one.methods})
