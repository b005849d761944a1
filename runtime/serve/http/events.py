"""Streamed answers, and clients that disconnect before the end.

A response is server-sent events: `data: {...}` and an empty line for each, `data: [DONE]` at the end. Every
`PING_SECONDS` a comment is sent, so that proxies keep the connection open. Work is cancelled as soon as its client
disconnects, whether or not anything was sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from runtime.serve.gate import Receive, Send

PING_SECONDS = 15.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy would wait for more
]


class Events:
    """One response of server-sent events; the first event sends the headers.

    Attributes:
        started: whether status and headers were sent.
    """

    def __init__(self, send: Send, *, ping_seconds: float = PING_SECONDS) -> None:
        self._send, self._ping_seconds = send, ping_seconds
        self._pings: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # keeps pings and events apart
        self.started = False

    async def event(self, data: dict[str, Any]) -> None:
        """Send one event."""
        await self._write(json.dumps(data, ensure_ascii=False, allow_nan=False))

    async def done(self) -> None:
        """Send `[DONE]`, and end the response."""
        self.stop()
        await self._write("[DONE]")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def stop(self) -> None:
        """Stop the pings."""
        if self._pings is not None:
            self._pings.cancel()
            self._pings = None

    async def _write(self, text: str) -> None:
        async with self._lock:
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                self._pings = asyncio.get_running_loop().create_task(self._ping())
            await self._send(_piece(f"data: {text}\n\n"))

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self._ping_seconds)
            async with self._lock:
                await self._send(_piece(": ping\n\n"))


def _piece(text: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


async def while_there(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work`, and cancel it if the client disconnects.

    Args:
        receive: ASGI's, of a request whose body has been read.
    """
    working, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, left), return_when=asyncio.FIRST_COMPLETED)
    finally:
        left.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))  # until it has cleaned up
    if not working.cancelled():
        working.result()


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
