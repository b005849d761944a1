"""uvicorn's connections with timeouts for slow headers and slow readers, and limits of size and number.

    uvicorn.run(app, http=connections(header_seconds=10))

uvicorn itself waits forever for headers, and for clients that do not read. Every refusal has OpenAI's error format.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from earlytom.numbers import real, whole
from runtime.serve.errors import ServeError, encoded

_MOST_AHEAD = 32  # pipelined requests; uvicorn queues each of them, kilobytes for a line
# Some clients offer HTTP/2 with every request (Upgrade: h2c). An offer may be ignored, but httptools 0.9 stops parsing
# there and drops the body. Delete this once `test_an_offer_of_http_2_is_ignored` passes without it.
_UPGRADE = re.compile(rb"(?i)\r\nupgrade:")


class Connection(HttpToolsProtocol):
    """uvicorn's connection with the limits of `connections`."""

    header_seconds = 10.0  # from the connection, or the first byte after an answer, to the end of the headers
    write_seconds = 30.0  # for a client to read some of the write buffer
    max_header = 64 << 10  # bytes
    most = 512  # connections at once: each takes a file descriptor, of which a process often has 1,024

    _timer: asyncio.TimerHandle | None = None  # runs while headers, or the rest of a body, are awaited
    _writing: asyncio.TimerHandle | None = None
    _awaiting = True  # the headers of a request are next
    _head = 0  # bytes of headers so far
    _answered: Any = None  # uvicorn's cycle that is being answered; `cycle` is that of the last request received

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()
        if len(self.connections) > self.most:
            self._end(ServeError(503, "overloaded", "too many connections; try again later", retry_after=1))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._answered is not None:
            self._answered.disconnected = True
            self._answered.message_event.set()
        self._stop()
        if self._writing is not None:
            self._writing.cancel()

    def data_received(self, data: bytes) -> None:
        if self._awaiting:
            self._head += len(data)
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        if self._between() and self._timer is None:
            self._await_headers()
        super().data_received(data)
        if self._awaiting and self._head > self.max_header:
            self._end(ServeError(431, "request_too_large", f"the headers have more than {self.max_header} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._awaiting:  # trailers after a body are dropped, as they have no limit
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop()
        self._awaiting, self._head = False, 0
        super().on_headers_complete()
        if not self.pipeline:
            self._answered = self.cycle
        if len(self.pipeline) > _MOST_AHEAD:
            error = ServeError(400, "invalid_request", f"more than {_MOST_AHEAD} requests came before an answer")
            self._end(error)
            raise error  # or the parser goes on with its buffer

    def on_message_complete(self) -> None:
        self._awaiting = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._end(ServeError(400, "invalid_request", "this is not a valid HTTP request"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def on_response_complete(self) -> None:
        self._answered = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._await_reader()

    def _between(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self._no_headers)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _no_headers(self) -> None:
        self._timer = None
        if not self._between():  # the beginning of a next request has come meanwhile
            self._await_headers()
        elif self._head:
            what = f"the headers did not come within {self.header_seconds:g} s"
            self._end(ServeError(408, "request_timeout", what))
        else:
            self.transport.close()

    def _await_reader(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(self.write_seconds, self._nobody_reads)

    def _nobody_reads(self) -> None:
        self._writing = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _end(self, error: ServeError) -> None:
        if self.transport.is_closing():
            return
        content, headers = encoded(error)
        lines = [b"HTTP/1.1 %d Refused" % error.status, *(name + b": " + value for name, value in headers)]
        self.transport.write(b"\r\n".join([*lines, b"connection: close", b"", content]))
        self.transport.close()
        self._await_reader()


def connections(
    *, header_seconds: float = 10.0, write_seconds: float = 30.0, max_header: int = 64 << 10, most: int = 512
) -> type[Connection]:
    """The class of connections for uvicorn's `http`.

    header_seconds: timeout of a request's headers. write_seconds: timeout of a client that does not read its answer.
    max_header: most bytes of the headers. most: connections at once.
    """
    settings = {
        "header_seconds": real("--header-seconds", header_seconds, 0, low_open=True),
        "write_seconds": real("write_seconds", write_seconds, 0, low_open=True),
        "max_header": whole("max_header", max_header, 1),
        "most": whole("most", most, 1),
    }
    return type("Connection", (Connection,), settings)
