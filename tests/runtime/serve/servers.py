"""A real server in a thread, and clients that do as they like."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from tests.processes import HANG_SECONDS


@contextlib.contextmanager
def serving(app: Any, **config: Any) -> Iterator[int]:
    """The port of the loopback address where `app` is served meanwhile."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, **config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(HANG_SECONDS)
        listening.close()
    assert not thread.is_alive()


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS) as client:
        yield client


def received(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def answered(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer that has a length."""
    content = b""
    while b"\r\n\r\n" not in content:
        part = client.recv(1 << 16)
        assert part, f"the server closed after {content!r}"
        content += part
    head, _, rest = content.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(rest) < int(headers["content-length"]):
        part = client.recv(1 << 16)
        assert part, "the server closed in the middle of its answer"
        rest += part
    return int(first.split()[1]), headers, rest


def request(
    method: str = "POST",
    path: str = "/v1/chat/completions",
    body: bytes = b"",
    length: int | None = None,
    **headers: str,
) -> bytes:
    """The bytes of a request; `length` is what it says of its body, where that is a lie."""
    lines = [f"{method} {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def error_of(content: bytes) -> dict[str, Any]:
    """The error in an answer, which has to be in OpenAI's shape."""
    (name, error), *others = json.loads(content).items()
    assert (name, others, set(error)) == ("error", [], {"message", "type", "param", "code"})
    assert "\n" not in error["message"]
    return error
