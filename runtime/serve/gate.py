"""Admission control of the server: API keys, sizes of bodies, number of requests, and deadlines of bodies.

    app = Door(app, keys=load_keys(path), places=9)

`Door` is ASGI middleware. Before it reads the body it checks, in this order: the key, the size in the headers, a free
place. The body is then read with a limit and a deadline, whatever the headers said; the application gets it whole or,
for uploads, as a stream. Checks below ASGI are in `runtime.serve.http.connection`.

Errors have OpenAI's format. Nothing here knows of videos or models.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from earlytom.errors import UserError
from earlytom.numbers import real, shown, whole
from runtime.serve.errors import ServeError, encoded, internal

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]

LINE = ("/v1/chat/completions",)  # a request to these paths takes a place
UPLOADS = ("/v1/files",)  # bodies to these paths are streamed to a file
_GUARDED = "v1"  # a path with this part needs a key
# A large body over a slow connection may exceed its deadline as long as it arrives at least at this rate.
_LEAST_RATE = 256 << 10  # bytes per second
# A refused client that is still sending would lose the response if the connection were closed at once.
_LINGER_SECONDS = 2.0
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9A-Fa-f:.]+\](:\d{1,5})?")
_log = logging.getLogger(__name__)


def load_keys(path: str | Path, flag: str = "--api-key-file") -> tuple[str, ...]:
    """The keys of a file, one per line, without empty lines and lines that begin with #. The file is read once.

    `flag` names the file in errors.

    Raises:
        UserError: it cannot be read, has no key, a key twice, or one that is not valid in a header.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{flag} {str(path)!r} cannot be read ({reason}); give a file of one key a line") from error
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"{flag}: line {number} is no key; give printable ASCII without spaces")
        if key in keys:
            raise UserError(f"{flag}: line {number} has the same key as a line above; give each key once")
        keys.append(key)
    if not keys:
        raise UserError(f"{flag} {str(path)!r} has no key; write one key a line, or leave the option out")
    return tuple(keys)


def key_id(key: str) -> str:
    """The id of a key inside the server: equal on every replica, and not the key itself."""
    return hashlib.sha256(b"key id\0" + key.encode()).hexdigest()[:16]


class Door:
    """ASGI middleware around an application.

    keys: any of them gives access to paths under /v1; none: access without a key. `scope["state"]["key"]` has the
    `key_id`.
    max_body, max_upload: bytes of a body. body_seconds: deadline of a body, extended by `_LEAST_RATE`.
    places: concurrent requests to `LINE`, reading their bodies or being answered; None: any number.
    uploads: the same for `UPLOADS`.
    room: returns whether the application takes another request. draining: whether the server is shutting down.
    retry_after: seconds, sent with a refusal for want of a place.
    cors: origins whose pages may call; default none, "*" for all.
    refused: called with the status of every refusal, whoever refuses.
    Raises:
        UserError: an invalid number or origin, by the name of its flag.
    """

    def __init__(
        self,
        app: Application,
        *,
        keys: Sequence[str] = (),
        max_body: int = 64 << 20,
        max_upload: int | None = None,
        body_seconds: float = 10.0,
        places: int | None = None,
        uploads: int = 4,
        room: Callable[[], bool] = lambda: True,
        draining: Callable[[], bool] = lambda: False,
        retry_after: int = 1,
        cors: Sequence[str] = (),
        refused: Callable[[int], object] = lambda status: None,
    ) -> None:
        self._app = app
        self._keys = [(_digest(key.encode()), key_id(key)) for key in keys]
        self._max_body = whole("--max-body", max_body, 1)
        self._max_upload = self._max_body if max_upload is None else whole("--max-video", max_upload, 1)
        self._body_seconds = real("--body-seconds", body_seconds, 0, low_open=True)
        self._most = {**dict.fromkeys(LINE, places), **dict.fromkeys(UPLOADS, uploads)}
        self._inside = dict.fromkeys(self._most, 0)
        self._room, self._draining, self._retry_after, self._refused = room, draining, retry_after, refused
        self._enter_from = _with_cors(self._enter, cors) if cors else self._enter

    @property
    def inside(self) -> int:
        """Number of requests that have a place."""
        return sum(self._inside.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._enter_from(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await self._app(scope, receive, send)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _route(scope)
        body = _Body(receive, self._max_upload if path in UPLOADS else self._max_body, self._body_seconds)
        answer = _Answer(body, send, self._refused)
        try:
            scope.setdefault("state", {})["key"] = self._key_of(scope, path)
            body.check_length(scope)
            if scope["method"] == "POST" and path in self._inside:
                refusal = await self._serve_in_place(path, scope, body, answer)
            else:
                refusal = await self._serve(scope, body, answer)
        except ServeError as error:
            refusal = error
        except asyncio.CancelledError:  # the server was told to end at once
            if answer.started:
                raise
            body.complete, refusal = True, self._ending()  # do not wait for the rest of the body
        if refusal is not None:
            await answer.refuse(refusal)

    async def _serve_in_place(self, path: str, scope: Scope, body: _Body, answer: _Answer) -> ServeError | None:
        self._check_place(path)
        self._inside[path] += 1
        try:
            if path in LINE and not await body.read():
                return None
            return await self._serve(scope, body, answer)
        finally:
            self._inside[path] -= 1

    async def _serve(self, scope: Scope, body: _Body, answer: _Answer) -> ServeError | None:
        """Run the application; returns the error of the body or the application if no response has started."""
        try:
            await self._app(scope, body, answer)
        except Exception as error:
            if answer.started:
                raise
            if body.failure is not None:
                return body.failure
            if isinstance(error, ServeError):
                return error
            _log.exception("%s %s failed", scope["method"], scope["path"])
            return internal()
        return None

    def _key_of(self, scope: Scope, path: str) -> str:
        """The id of the caller's key. Every key is compared, so that timing reveals nothing."""
        if not self._keys or _GUARDED not in path.lower().split("/"):
            return ""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest, found = _digest(token.strip()), ""
        for known, name in self._keys:
            if hmac.compare_digest(known, digest):
                found = name
        if not found or scheme.lower() != b"bearer":
            what = "is not one of this server's" if token else "is missing"
            raise ServeError(401, "invalid_api_key", f"the API key {what}; send the header Authorization: Bearer KEY")
        return found

    def _check_place(self, path: str) -> None:
        if self._draining():
            raise self._ending()
        most = self._most[path]
        if (most is not None and self._inside[path] >= most) or (path in LINE and not self._room()):
            what = "as many requests wait as may wait" if path in LINE else "as many uploads run as may run"
            raise ServeError(429, "overloaded", f"{what}; try again later", retry_after=self._retry_after)

    def _ending(self) -> ServeError:
        what = "the server is shutting down; ask another one"
        return ServeError(503, "draining", what, retry_after=self._retry_after)


class _Body:
    """A request's body as ASGI `receive`, with a limit and a deadline that starts at the first read."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive, self._limit, self._seconds = receive, limit, seconds
        self._begun: float | None = None  # time of the first read, by the loop's clock
        self._size = 0
        self._whole: bytes | None = None  # the body, read before the application asks
        self.complete = False  # no more is coming
        self.expects = False  # the client waits for "100 Continue"
        self.failure: ServeError | None = None

    def check_length(self, scope: Scope) -> None:
        """Raises ServeError for invalid headers of the body, or a size in them that is too large."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        self.expects = headers.get(b"expect", b"").lower() == b"100-continue"
        self.complete = length == b"0" and b"transfer-encoding" not in headers
        if not length.isdigit():
            raise ServeError(400, "invalid_request", "Content-Length is not a number")
        if (packed := headers.get(b"content-encoding", b"identity")).lower() != b"identity":
            what = f"Content-Encoding {shown(packed.decode('latin-1'))} is not undone; send the body as it is"
            raise ServeError(400, "invalid_request", what)
        if len(length) > 18 or int(length) > self._limit:
            raise self._too_large()

    async def read(self) -> bool:
        """Read the whole body into memory; False if the client disconnects meanwhile.

        Raises:
            ServeError: it is too large, or does not come.
        """
        parts = []
        while True:
            message = await self._next()
            if message["type"] != "http.request":
                return False
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        self._whole = b"".join(parts)
        return True

    async def __call__(self) -> Message:
        if self._whole is not None:
            content, self._whole = self._whole, None
            return {"type": "http.request", "body": content, "more_body": False}
        return await self._next()

    async def linger(self) -> None:
        """Read and discard the rest of the body, for a short while."""
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                left = self._limit
                while not self.complete and left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self.complete = not message.get("more_body", False)  # a disconnect has none
        except TimeoutError:
            pass

    async def _next(self) -> Message:
        if self.failure is not None:
            raise self.failure
        if self.complete and self._begun is not None:
            return await self._receive()  # the client's disconnect
        loop = asyncio.get_running_loop()
        self._begun = self._begun if self._begun is not None else loop.time()
        try:
            async with asyncio.timeout_at(self._begun + self._seconds + self._size / _LEAST_RATE):
                message = await self._receive()
        except TimeoutError:
            what = f"the body of the request did not come within {self._seconds:g} s; send it at once"
            self.failure = ServeError(408, "request_timeout", what)
            raise self.failure from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self._size > self._limit:
                self.failure = self._too_large()
                raise self.failure
        else:
            self.complete = True
        return message

    def _too_large(self) -> ServeError:
        what = f"the body of the request has more than {self._limit} bytes; send a smaller video"
        return ServeError(413, "request_too_large", what)


class _Answer:
    """ASGI `send` that can replace the application's response by a refusal until it has started."""

    def __init__(self, body: _Body, send: Send, refused: Callable[[int], object]) -> None:
        self._body, self._send, self._refused = body, send, refused
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._body.failure is not None:  # whatever response the application makes of it
                raise self._body.failure
            self.started = True
            if message["status"] >= 400:
                self._refused(message["status"])
            if not self._body.complete:  # the rest of the body must not be parsed as the next request
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        elif not message.get("more_body", False) and not (self._body.complete or self._body.expects):
            await self._send({**message, "more_body": True})
            await self._body.linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def refuse(self, error: ServeError) -> None:
        """Send an error as the response, which must not have started."""
        self._body.failure = None
        content, headers = encoded(error)
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": content})


def _route(scope: Scope) -> str:
    """The path without the ASGI root path, as the application's routes see it."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _with_cors(app: Application, origins: Sequence[str]) -> Application:
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise UserError(f"--cors {origin!r} is no origin; give one such as https://example.com, or * for all")
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # OpenAI's client sends a dozen of its own
        expose_headers=["retry-after"],
    )
