"""HTTP to a server that may send anything: one line says what, and nothing hangs or grows."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.decoder.naming import DecoderAddress
from runtime.decoder.vllm import wire as wire_module
from runtime.decoder.vllm.wire import Wire
from runtime.errors import DecoderAway, DecoderFailed
from tests.runtime.decoder.vllm.stand_in import Raw, reply

SILENT = 0.3  # seconds; what hangs is given up after it
MOST = 1 << 20


def read(raw: Raw, most: int = MOST) -> list[Any]:
    with raw.standing() as url:
        return list(Wire(DecoderAddress(url), silent_seconds=SILENT).events("/completions", {"a": 1}, most=most))


def test_events_are_read_to_their_end() -> None:
    split = b'data: {"n": 1}\n\n: ping\n\ndata: {"n"', b": 2}\n\nda", b"ta: [DONE]\n\n"
    assert read(Raw(reply(split[0]), *split[1:])) == [{"n": 1}, {"n": 2}]


def test_chunked_answers_are_read() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(one), one) for one in (b'data: {"n"', b": 1}\n", b"\ndata: [DONE]\n\n", b"")
    )
    assert read(Raw(head + chunks)) == [{"n": 1}]


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (Raw(), "gave no answer that is HTTP"),
        (Raw(b"SSH-2.0-x\r\n"), "gave no answer that is HTTP"),
        (Raw(waits=True), "said nothing for 0.3 s"),
        (Raw(reply(b"{}", kind="application/json")), "answered with something else than events"),
        (Raw(reply(b"data: {not json\n\n")), "sent something that is not JSON"),
        (Raw(reply(b"data: " + b"[" * 100_000 + b"\n\n")), "sent something that is not JSON"),
        (Raw(reply(b'data: {"error": {"message": "out of\\nmemory"}}\n\n')), "failed: out of memory"),
        (Raw(reply(b'data: {"n": 1}\n\n')), "ended an answer without its end"),
        (Raw(reply(b'data: {"n": 1}\n\n'), waits=True), "said nothing for 0.3 s"),
        (Raw(reply(b""), *[b": ping\n\n" * 1000] * 200), "sent more than 1048576 bytes"),
        (Raw(reply(b"data: " + b"x" * 2_000_000)), "sent more than 1048576 bytes"),
        (Raw(reply(b"", "302 Found")), "refused with status 302"),
        (Raw(reply(b"<html>", "500 Oh")), "refused with status 500"),
        (Raw(reply(b'{"error": {"message": "no\\u0007 such"}}', "400 Bad")), "refused with status 400: no such"),
        (Raw(reply(b"x" * 200_000, "400 Bad")), "refused with status 400"),
        (Raw(reply(b'{"error": "Unauthorized"}', "401 No")), "asks for another API key (status 401)"),
    ],
)
def test_what_makes_no_sense_is_one_line(raw: Raw, line: str) -> None:
    with pytest.raises(DecoderFailed) as caught:
        read(raw)
    assert not isinstance(caught.value, DecoderAway)
    assert str(caught.value).startswith("the decoder at http://127.0.0.1:")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("status", ["429 Slow", "503 Full"])
def test_a_server_that_is_busy_may_be_asked_again(status: str) -> None:
    with pytest.raises(DecoderAway, match="too much to do"):
        read(Raw(reply(b"", status)))


def test_a_server_that_is_not_there_may_be_asked_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for host in (f"127.0.0.1:{port}", "no.such.host.invalid"):
        with pytest.raises(DecoderAway, match="cannot be reached"):
            Wire(DecoderAddress(f"http://{host}/v1")).get("/models")


def test_a_line_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "_LONGEST_LINE", 1000)
    with pytest.raises(DecoderFailed, match="a line of more than 1000 bytes"):
        read(Raw(reply(b"data: " + b"x" * 5000), waits=True))


def test_a_server_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes come all the time, and no event."""
    clock = iter(range(1000))
    monkeypatch.setattr(wire_module.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(DecoderFailed, match="said nothing"):
        read(Raw(reply(b": "), b"x", waits=True))


def test_closing_the_events_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        events: Iterator[Any] = Wire(DecoderAddress(f"http://127.0.0.1:{port}/v1")).events("/c", {}, most=MOST)
        client = None

        def serve() -> None:
            nonlocal client
            client, _ = listening.accept()
            client.recv(1 << 16)
            client.sendall(reply(b'data: {"n": 1}\n\n'))

        thread = threading.Thread(target=serve)
        thread.start()
        assert next(events) == {"n": 1}
        events.close()  # type: ignore[attr-defined]
        thread.join()
        assert client is not None
        client.settimeout(60)
        while client.recv(1 << 16):
            pass  # what it still had sent
        client.close()


def test_a_key_is_sent_and_the_path_is_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        got: list[bytes] = []

        def serve() -> None:
            client, _ = listening.accept()
            with client:
                got.append(client.recv(1 << 16))
                client.sendall(reply(json.dumps({"data": []}).encode(), kind="application/json"))

        thread = threading.Thread(target=serve)
        thread.start()
        address = DecoderAddress(f"http://127.0.0.1:{listening.getsockname()[1]}/behind/v1")
        assert Wire(address, "k").get("/models") == {"data": []}
        thread.join()
    assert got[0].startswith(b"GET /behind/v1/models HTTP/1.1\r\n")
    assert b"authorization: Bearer k\r\n" in got[0]
