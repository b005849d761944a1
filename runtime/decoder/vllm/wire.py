"""An HTTP client for a vLLM server, whose replies are untrusted.

    wire = Wire(DecoderAddress("http://127.0.0.1:8000/v1"))
    models = wire.get("/models")
    for event in wire.events("/completions", {...}): ...

Each request has its own connection; closing it makes vLLM abort the request. Errors are `DecoderFailed` or, if a retry
may help, its child `DecoderAway`: one line with the address, and of the reply only an OpenAI-style error's message.
Redirects are not followed. Bytes, the length of a line and the time between events are bounded.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from runtime.decoder.naming import DecoderAddress
from runtime.errors import DecoderAway, DecoderFailed

SILENT_SECONDS = 60.0  # timeout of connecting, of the status, and between two events
_LONGEST_LINE = 4 << 20  # bytes; the first event may have an id for each token of the prompt
_LONGEST_ERROR = 64 << 10
_LONGEST_REPLY = 4 << 20
_BLOCK = 64 << 10
_SHOWN = 300  # characters of its error message
_BUSY = (429, 503)


class Wire:
    """A client of one server.

    Args:
        address: of the server.
        key: its API key; None for none.
        silent_seconds: timeout of connecting, of the status, and between two events.
    """

    def __init__(
        self, address: DecoderAddress, key: str | None = None, *, silent_seconds: float = SILENT_SECONDS
    ) -> None:
        self.address = address
        self._at = urlsplit(address.url)
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._silent = silent_seconds

    def get(self, path: str) -> Any:
        """GET the JSON at a path. Raises DecoderFailed."""
        with self._sent("GET", path, None) as response:
            content = b"".join(_limited(self._blocks(response), _LONGEST_REPLY, self._failed))
        return self._json(content)

    def events(self, path: str, body: dict[str, Any], *, most: int) -> Generator[Any, None, None]:
        """POST `body`, and yield the JSON of each server-sent event up to [DONE]; closing it closes the connection.

        `most`: the most bytes of the whole answer.

        Raises:
            DecoderFailed: while iterating, also if the answer ends without [DONE].
        """
        content = json.dumps(body, allow_nan=False).encode()
        with self._sent("POST", path, content) as response:
            if "text/event-stream" not in (response.getheader("content-type") or ""):
                raise self._failed("answered with something else than events")
            for line in self._lines(response, most):
                if not line.startswith(b"data:"):
                    continue  # an empty line between events, or a keep-alive comment
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    return
                event = self._json(data)
                if isinstance(event, dict) and "error" in event:
                    raise self._failed(f"failed: {_message(event)}")
                yield event
        raise self._failed("ended an answer without its end")

    @contextmanager
    def _sent(self, method: str, path: str, body: bytes | None) -> Iterator[http.client.HTTPResponse]:
        """The response to a request, of status 200; the connection is closed at the end."""
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        connection = kind(self._at.hostname or "", self._at.port, timeout=self._silent)
        headers = {**self._headers, "connection": "close", "accept": "*/*"}
        if body is not None:
            headers["content-type"] = "application/json"
        with closing(connection):
            try:
                connection.connect()
            except OSError as error:
                raise DecoderAway(f"{self._name} cannot be reached ({_reason(error)}): is vLLM started?") from error
            try:
                connection.request(method, self._at.path + path, body, headers)
                response = connection.getresponse()
            except TimeoutError as error:
                raise self._hung() from error
            except (OSError, http.client.HTTPException) as error:
                raise self._failed(f"gave no answer that is HTTP ({_reason(error)})") from error
            with closing(response):
                if response.status != 200:
                    raise self._refused(response)
                yield response

    def _refused(self, response: http.client.HTTPResponse) -> DecoderFailed:
        """The error for a status other than 200."""
        try:
            content = b"".join(_limited(self._blocks(response), _LONGEST_ERROR, self._failed))
            said = f": {_message(json.loads(content))}"
        except (DecoderFailed, ValueError, RecursionError):
            said = ""
        if response.status in _BUSY:
            return DecoderAway(f"{self._name} has too much to do (status {response.status}){said}")
        if response.status in (401, 403):
            return self._failed(f"asks for another API key (status {response.status}): give it in --decoder-key-file")
        return self._failed(f"refused with status {response.status}{said}")

    def _blocks(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The response's bytes as they arrive."""
        while True:
            try:
                block = response.read1(_BLOCK)
            except TimeoutError as error:
                raise self._hung() from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self._failed(f"broke off in the midst of an answer ({_reason(error)})") from error
            if not block:
                return
            yield block

    def _lines(self, response: http.client.HTTPResponse, most: int) -> Iterator[bytes]:
        """The response's lines. Only events reset the timeout: a server that sends other bytes counts as silent."""
        rest, heard = b"", time.monotonic()
        for block in _limited(self._blocks(response), most, self._failed):
            *lines, rest = (rest + block).split(b"\n")
            if any(line.startswith(b"data:") for line in lines):
                heard = time.monotonic()
            yield from lines
            if len(rest) > _LONGEST_LINE:
                raise self._failed(f"sent a line of more than {_LONGEST_LINE} bytes")
            if time.monotonic() - heard > self._silent:
                raise self._hung()

    def _json(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._failed("sent something that is not JSON") from error

    def _hung(self) -> DecoderFailed:
        return self._failed(f"said nothing for {self._silent:g} s")

    def _failed(self, what: str) -> DecoderFailed:
        return DecoderFailed(f"{self._name} {what}")

    @property
    def _name(self) -> str:
        return f"the decoder at {self.address.url}"


def _limited(blocks: Iterator[bytes], most: int, failed: Any) -> Iterator[bytes]:
    """The blocks; raises an error of `failed` once they exceed `most` bytes in total."""
    count = 0
    for block in blocks:
        if (count := count + len(block)) > most:
            raise failed(f"sent more than {most} bytes")
        yield block


def _message(reply: Any) -> str:
    """The message of an OpenAI-style error, in one line."""
    error = reply.get("error", reply) if isinstance(reply, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    if not isinstance(text, str):
        return "no reason given"
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


def _reason(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return "no such host"
    return str(getattr(error, "strerror", None) or type(error).__name__)
