"""A client of OpenAI's chat completions that records times and does not judge answers.

    async with ServerClient("http://127.0.0.1:8000", key) as client:
        answer = await client.ask(body, stream=True)

A failure is an answer, too, with its status: the HTTP status; "connect", "timeout" or "broken" without one; "200 CODE"
for an error event within a stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

from earlytom.errors import UserError

OK = "200"
_PATH = "/v1/chat/completions"
_DATA, _DONE = b"data:", b"[DONE]"


@dataclass(frozen=True)
class ServedAnswer:
    """One request as its client saw it; seconds since it was sent.

    Attributes:
        status: `OK`, or the failure, see above.
        seconds: until the response ended.
        first: until the first token; None unless streamed.
        gaps: between successive pieces of text.
        text: of the answer, or a refusal's message.
        tokens: generated; prompt_tokens: of the prompt; cached_tokens: of those, from the prefix cache.
        video: sha256 of the video that the server answered about.
        inside: seconds from taking the video to the last token, as the server reports them.
    """

    status: str
    seconds: float
    first: float | None = None
    gaps: tuple[float, ...] = ()
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    video: str = ""
    inside: float | None = None

    @property
    def good(self) -> bool:
        return self.status == OK

    @property
    def per_token(self) -> float | None:
        """TPOT: mean seconds per token after the first; None if there are none."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.seconds - self.first) / (self.tokens - 1)


class ServerClient:
    """Connections to one server.

    Args:
        url: of the server, with or without /v1.
        key: an API key, where it asks for one.
        seconds: timeout without any byte.
    """

    def __init__(self, url: str, key: str | None = None, *, seconds: float = 120.0) -> None:
        headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key}"})
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=seconds,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),  # nobody waits for a connection
            trust_env=False,  # a proxy would be measured
        )

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._http.aclose()

    async def model(self) -> str:
        """The served model's name."""
        try:
            response = await self._http.get("/v1/models")
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise UserError(
                f"no server answers at {self.url} ({what}): start one with python -m runtime.serve"
            ) from error
        if response.status_code == 401:
            raise UserError(f"{self.url} asks for a key (401): give a file that has it with --api-key-file")
        try:
            return str(response.raise_for_status().json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            what = f"GET /v1/models gives {response.status_code}"
            raise UserError(f"{self.url} is no server of chat completions ({what}): give its address") from error

    async def ask(self, body: bytes, *, stream: bool) -> ServedAnswer:
        """Send a request and read its answer to the end; `stream` as in the body."""
        now = asyncio.get_running_loop().time
        sent = now()
        try:
            async with self._http.stream("POST", _PATH, content=body) as response:
                status = str(response.status_code)
                if status == OK and stream:
                    events = _Events(now, sent)
                    async for name in _lines(response.aiter_raw()):
                        events.line(name)
                    return events.answer()
                content = await response.aread()
        except httpx.ConnectError:
            return ServedAnswer("connect", now() - sent)
        except httpx.TimeoutException:
            return ServedAnswer("timeout", now() - sent)
        except (httpx.HTTPError, ValueError):
            return ServedAnswer("broken", now() - sent)
        return _whole(status, content, now() - sent)


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines as soon as they are complete."""
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line


@dataclass
class _Events:
    """The state of one streamed response."""

    now: Any
    sent: float
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    status: str = "broken"  # until its end is there
    _text: list[str] = field(default_factory=list)
    _last: float | None = None  # when the last piece of text came
    _usage: dict[str, Any] = field(default_factory=dict)
    _more: dict[str, Any] = field(default_factory=dict)

    def line(self, line: bytes) -> None:
        """Take one line of the stream."""
        if not line.startswith(_DATA):
            return
        data = line.removeprefix(_DATA).strip()
        if data == _DONE:
            self.status = OK if self.status == "broken" else self.status
            return
        at, event = self.now() - self.sent, json.loads(data)
        if "error" in event:
            self.status = f"{OK} {event['error'].get('code')}"
            self._text = [event["error"].get("message", "")]
            return
        self._usage = event.get("usage") or self._usage
        self._more = event.get("earlytom") or self._more
        for choice in event["choices"]:
            self.first = at if self.first is None else self.first
            if text := choice["delta"].get("content"):
                if self._last is not None:
                    self.gaps.append(at - self._last)
                self._last = at
                self._text.append(text)

    def answer(self) -> ServedAnswer:
        seconds = self.now() - self.sent
        return _answer(self.status, seconds, "".join(self._text), self._usage, self._more, self.first, self.gaps)


def _whole(status: str, content: bytes, seconds: float) -> ServedAnswer:
    """The answer of a response that was not streamed."""
    try:
        told = json.loads(content)
        if status != OK:
            return ServedAnswer(status, seconds, text=str(told["error"]["message"]))
        text = str(told["choices"][0]["message"]["content"])
        return _answer(status, seconds, text, told.get("usage") or {}, told.get("earlytom") or {})
    except (ValueError, LookupError, TypeError):
        return ServedAnswer(status if status != OK else "broken", seconds)


def _answer(
    status: str,
    seconds: float,
    text: str,
    usage: dict[str, Any],
    more: dict[str, Any],
    first: float | None = None,
    gaps: list[float] | None = None,
) -> ServedAnswer:
    return ServedAnswer(
        status,
        seconds,
        first,
        tuple(gaps or ()),
        text,
        usage.get("completion_tokens", 0),
        usage.get("prompt_tokens", 0),
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        more.get("video", ""),
        (more.get("timings") or {}).get("total"),
    )
