"""The door, before a real uvicorn: keys, sizes, deadlines, places."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.errors import UserError
from runtime.serve import gate
from runtime.serve.errors import ServeError
from runtime.serve.gate import Door, key_id, load_keys
from runtime.serve.http.connection import connections
from tests.processes import HANG_SECONDS
from tests.runtime.serve.servers import answered, connected, error_of, received, request, serving

KEY = "k1"
CHAT, FILES = "/v1/chat/completions", "/v1/files"
BEARER = {"Authorization": f"Bearer {KEY}"}


class Echo:
    """Answers with the length of the body and the caller's key; under /v1/files it reads the body as it comes."""

    def __init__(self) -> None:
        self.seen: list[str] = []  # paths
        self.entered = threading.Event()
        self.left = threading.Event()  # the client of /wait
        self.hold: threading.Event | None = None
        self.fails: BaseException | None = None
        self.answers = b""
        self.names: set[str] = set()  # of the last request's headers, as they are when it is answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.seen.append(scope["path"])
        self.entered.set()
        if self.fails is not None:
            raise self.fails
        size, more = 0, scope["path"] != "/unread"
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        while scope["path"] == "/wait" and not self.left.is_set():
            if (await receive())["type"] == "http.disconnect":
                self.left.set()
        self.names = {name.decode() for name, _ in scope["headers"]}
        while self.hold is not None and scope["method"] == "POST" and not self.hold.is_set():
            await asyncio.sleep(0.01)
        content = self.answers or json.dumps({"bytes": size, "key": scope["state"]["key"]}).encode()
        length = str(len(content)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": content})


@pytest.fixture
def echo() -> Echo:
    return Echo()


class Served:
    """A served gate and its settings."""

    def __init__(self, port: int, guarded: Door, statuses: list[int]) -> None:
        self.port, self.gate, self.statuses = port, guarded, statuses

    def ask(self, *parts: bytes) -> tuple[int, dict[str, str], bytes]:
        with connected(self.port) as client:
            for part in parts:
                client.sendall(part)
            return answered(client)

    def refusal(self, *parts: bytes) -> tuple[int, str]:
        status, _, content = self.ask(*parts)
        return status, error_of(content)["code"]


@pytest.fixture
def door(echo: Echo, request: pytest.FixtureRequest) -> Iterator[Served]:
    statuses: list[int] = []
    given = dict(getattr(request, "param", {}))
    protocol = given.pop("protocol", {"header_seconds": 60.0})
    settings = {"keys": (KEY, "second"), "max_body": 1000, "body_seconds": 60.0, **given}
    guarded = Door(echo, refused=statuses.append, **settings)
    with serving(guarded, http=connections(**protocol), lifespan="off") as port:
        yield Served(port, guarded, statuses)


def with_settings(**settings: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("door", [settings], indirect=True)


# Keys


def test_a_key_opens_and_is_known_by_its_id(door: Served) -> None:
    status, _, content = door.ask(request(body=b"12345", **BEARER))
    assert (status, json.loads(content)) == (200, {"bytes": 5, "key": key_id(KEY)})
    other = json.loads(door.ask(request(body=b"", Authorization="bearer second"))[2])["key"]
    assert other == key_id("second") != key_id(KEY)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer nope"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": f"Bearer {KEY}\r\nAuthorization: Bearer nope"},
        {"Authorization": f"Bearer {KEY}, Bearer nope"},
        {"Authorization": "Bearer \xe9"},
        {"X-Api-Key": KEY},
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/V1/chat/completions", "//v1/files", "/%761/files"])
def test_without_a_key_nothing_under_v1_is_reached(
    door: Served, echo: Echo, headers: dict[str, str], path: str
) -> None:
    assert door.refusal(request(path=path, **headers)) == (401, "invalid_api_key")
    assert not echo.seen
    assert door.statuses == [401]


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/nothing"])
def test_other_paths_need_no_key(door: Served, echo: Echo, path: str) -> None:
    assert door.ask(request("GET", path))[0] == 200
    assert echo.seen == [path]


def test_a_refused_body_is_not_read(door: Served, echo: Echo) -> None:
    """The answer comes while the client has sent nothing of what it has announced."""
    assert door.refusal(request(length=900)) == (401, "invalid_api_key")
    assert door.refusal(request(length=900, Transfer_Encoding="chunked"))[0] == 400  # and length: smuggling


@with_settings(keys=())
def test_without_keys_everyone_may_come_in(door: Served) -> None:
    assert json.loads(door.ask(request(body=b"1"))[2]) == {"bytes": 1, "key": ""}


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n k1 \nk2\r\n")
    assert load_keys(file) == ("k1", "k2")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no key"),
        (b"# k\n", "no key"),
        (b"a b\n", "line 1"),
        (b"a\n\na\n", "line 3"),
        (b"\xff", "UTF-8"),
        ("schlüssel".encode(), "line 1"),
    ],
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"--api-key-file.*{said}"):
        load_keys(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--api-key-file .* cannot be read"):
        load_keys(tmp_path / "none")


@given(st.binary())
def test_no_header_opens_but_the_key(header: bytes) -> None:
    """As the application is asked it: no header has an effect but a refusal."""
    refused = _statuses_of([(b"authorization", b"Bearer " + header)])
    assert refused == ([] if header.strip() == KEY.encode() else [401])


def _statuses_of(headers: list[tuple[bytes, bytes]]) -> list[int]:
    refused: list[int] = []

    async def nothing(*_: Any) -> None: ...

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    guarded = Door(nothing, keys=(KEY,), refused=refused.append)
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": headers}
    asyncio.run(guarded(scope, receive, nothing))
    return refused


# Sizes


@pytest.mark.parametrize("path", [CHAT, FILES])
def test_a_body_of_the_limit_passes_and_one_byte_more_does_not(door: Served, echo: Echo, path: str) -> None:
    assert door.ask(request(path=path, body=b"x" * 1000, **BEARER))[0] == 200
    assert door.refusal(request(path=path, length=1001, **BEARER)) == (413, "request_too_large")
    assert echo.seen == [path]  # the second did not come that far


@pytest.mark.parametrize("path", [CHAT, FILES])
def test_a_body_without_a_length_is_counted(door: Served, echo: Echo, path: str) -> None:
    head = request(path=path, **BEARER).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    part = b"64\r\n" + b"x" * 100 + b"\r\n"
    assert json.loads(door.ask(head, part * 10, b"0\r\nX-Trailer: y\r\n\r\n")[2])["bytes"] == 1000
    assert "x-trailer" not in echo.names  # they may be without end, and nobody has looked at them
    assert door.refusal(head, part * 11) == (413, "request_too_large")  # and the end never comes


@with_settings(max_upload=5000)
def test_uploads_have_a_limit_of_their_own(door: Served) -> None:
    assert door.ask(request(path=FILES, body=b"x" * 5000, **BEARER))[0] == 200
    assert door.refusal(request(path=FILES, length=5001, **BEARER))[0] == 413
    assert door.refusal(request(path=CHAT, length=1001, **BEARER))[0] == 413


@pytest.mark.parametrize("length", ["1e3", "-1", "0x10", "9" * 400, "10, 10", "+5", ""])
def test_odd_lengths_are_refused(door: Served, echo: Echo, length: str) -> None:
    head = request(**BEARER).replace(b"Content-Length: 0", f"Content-Length: {length}".encode())
    status, _, content = door.ask(head)
    assert status in (400, 413)
    assert error_of(content)["message"]
    assert not echo.seen


def test_a_body_that_is_packed_is_refused(door: Served, echo: Echo) -> None:
    assert door.refusal(request(body=b"x", Content_Encoding="gzip", **BEARER)) == (400, "invalid_request")
    assert door.ask(request(body=b"x", Content_Encoding="identity", **BEARER))[0] == 200
    assert echo.seen == [CHAT]


def test_a_client_that_sends_on_hears_why_it_was_refused(door: Served) -> None:
    """The connection is not closed on a client that is busy sending."""
    body = b"x" * 5_000_000  # more than the buffers in between hold
    with connected(door.port) as client:
        sender = threading.Thread(target=_send_all, args=(client, request(body=body, **BEARER)))
        sender.start()
        status, headers, content = answered(client)
        assert (status, error_of(content)["code"], headers["connection"]) == (413, "request_too_large", "close")
        client.close()
        sender.join(HANG_SECONDS)


def _send_all(client: socket.socket, content: bytes) -> None:
    with contextlib.suppress(OSError):
        client.sendall(content)


def test_what_is_left_of_a_body_is_no_request(door: Served, echo: Echo) -> None:
    """An answer before the body's end, and the rest of the body looks like a request of its own."""
    hidden = request("GET", "/hidden")
    with connected(door.port) as client:
        client.sendall(request(path="/unread", body=hidden, length=len(hidden) + 5))
        client.sendall(b"12345")
        assert b"200 OK" in received(client)
    assert echo.seen == ["/unread"]


@pytest.mark.parametrize("path", [CHAT, FILES, "/nothing"])
@with_settings(body_seconds=0.3)
def test_a_body_that_does_not_come_is_408(door: Served, path: str) -> None:
    lying = request(path=path, body=b"x" * 10, length=20, **BEARER)
    assert door.refusal(lying) == (408, "request_timeout")
    assert door.gate.inside == 0


@with_settings(body_seconds=0.3, max_body=10**6)
def test_a_body_that_dribbles_is_408(door: Served) -> None:
    with connected(door.port) as client:
        client.sendall(request(length=1000, **BEARER))
        dribble = threading.Thread(target=_dribble, args=(client,))
        dribble.start()
        status, _, content = answered(client)
        assert (status, error_of(content)["code"]) == (408, "request_timeout")
        client.close()
        dribble.join(HANG_SECONDS)


def _dribble(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            client.sendall(b"x")
            threading.Event().wait(0.02)


@with_settings(body_seconds=0.05, max_body=10**9)
def test_a_long_body_that_comes_fast_may_take_longer(door: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_LEAST_RATE", 10)
    with connected(door.port) as client:
        client.sendall(request(length=30_000, **BEARER))
        for _ in range(30):  # 1.5 s of it
            client.sendall(b"x" * 1000)
            threading.Event().wait(0.05)
        assert answered(client)[0] == 200


def test_a_client_that_leaves_in_its_body_is_let_go(door: Served, echo: Echo) -> None:
    with connected(door.port) as client:
        client.sendall(request(body=b"x", length=500, **BEARER))
    for _ in range(1000):
        if door.gate.inside == 0:
            break
        threading.Event().wait(0.01)
    assert door.gate.inside == 0
    assert door.ask(request(**BEARER))[0] == 200
    assert echo.seen == [CHAT]


def test_a_client_that_waits_to_be_told_is_told(door: Served) -> None:
    with connected(door.port) as client:
        client.sendall(request(length=5, Expect="100-continue", **BEARER))
        assert client.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"12345")
        assert answered(client)[0] == 200
    assert door.refusal(request(length=5, Expect="100-continue"))[0] == 401


# Places


@with_settings(places=2, keys=())
def test_more_than_the_places_are_refused_before_their_bodies(door: Served, echo: Echo) -> None:
    echo.hold = threading.Event()
    with connected(door.port) as first, connected(door.port) as second:
        first.sendall(request())
        assert echo.entered.wait(HANG_SECONDS)
        second.sendall(request(length=5))  # one that still reads its body has a place, too
        while door.gate.inside < 2:
            threading.Event().wait(0.01)
        status, headers, content = door.ask(request(length=900))
        assert (status, headers["retry-after"], error_of(content)["code"]) == (429, "1", "overloaded")
        assert door.ask(request("GET", "/health"))[0] == door.ask(request("GET", CHAT))[0] == 200
        second.sendall(b"12345")
        echo.hold.set()
        assert answered(first)[0] == answered(second)[0] == 200
    assert door.ask(request())[0] == 200
    assert door.gate.inside == 0


@with_settings(uploads=1, keys=())
def test_uploads_have_places_of_their_own(door: Served, echo: Echo) -> None:
    with connected(door.port) as first:
        first.sendall(request(path=FILES, length=5))
        assert echo.entered.wait(HANG_SECONDS)
        assert door.refusal(request(path=FILES, length=5)) == (429, "overloaded")
        assert door.ask(request())[0] == door.ask(request("GET", FILES))[0] == 200
        first.sendall(b"12345")
        assert answered(first)[0] == 200


@pytest.mark.parametrize(
    ("door", "status", "code"),
    [
        ({"room": lambda: False, "retry_after": 7}, 429, "overloaded"),
        ({"draining": lambda: True, "retry_after": 7}, 503, "draining"),
    ],
    indirect=["door"],
)
def test_a_full_line_and_a_server_that_shuts_down(door: Served, echo: Echo, status: int, code: str) -> None:
    got, headers, content = door.ask(request(length=900, **BEARER))
    assert (got, error_of(content)["code"], headers["retry-after"]) == (status, code, "7")
    assert door.refusal(request(length=900))[0] == 401  # strangers are not told of the line
    assert not echo.seen
    assert door.ask(request("GET", "/v1/models", **BEARER))[0] == 200


# The application


@pytest.mark.parametrize(
    ("fails", "status", "code"),
    [
        (RuntimeError("secret"), 500, "internal_error"),
        (ServeError(404, "model_not_found", "no"), 404, "model_not_found"),
        (asyncio.CancelledError(), 503, "draining"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
def test_what_the_application_raises(
    door: Served, echo: Echo, path: str, fails: BaseException, status: int, code: str
) -> None:
    echo.fails = fails
    got, _, content = door.ask(request(path=path, **BEARER))
    assert (got, error_of(content)["code"]) == (status, code)
    assert b"secret" not in content
    assert door.gate.inside == 0


def test_an_application_that_hides_a_refusal_does_not() -> None:
    """Frameworks turn what reading the body raises into an error of their own."""
    sent: list[Any] = []

    async def framework(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
        except ServeError:
            await send({"type": "http.response.start", "status": 400, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"123456", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": FILES, "headers": [(b"transfer-encoding", b"chunked")]}
    counted: list[int] = []
    asyncio.run(Door(framework, max_body=5, refused=counted.append)(scope, receive, send))
    assert next(message.get("status") for message in sent) == 413
    assert counted == [413]


# Other origins


@with_settings(cors=("https://ours.example",))
def test_pages_of_allowed_origins_may_call(door: Served, echo: Echo) -> None:
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization, x-stainless-os"}
    status, headers, _ = door.ask(request("OPTIONS", Origin="https://ours.example", **asks))
    assert (status, headers["access-control-allow-origin"]) == (200, "https://ours.example")
    status, headers, _ = door.ask(request(Origin="https://ours.example"))  # without a key
    assert (status, headers["access-control-allow-origin"]) == (401, "https://ours.example")
    status, headers, _ = door.ask(request("OPTIONS", Origin="https://evil.example", **asks))
    assert (status, "access-control-allow-origin" in headers) == (400, False)
    assert not echo.seen


def test_by_default_no_other_origin_may(door: Served) -> None:
    _, headers, _ = door.ask(request("GET", "/health", Origin="https://ours.example"))
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["ours.example", "https://ours.example/", "https://*.example", "", "null", "file://"]
)
def test_what_is_no_origin_is_refused(echo: Echo, origin: str) -> None:
    with pytest.raises(UserError, match="--cors"):
        Door(echo, cors=(origin,))


@pytest.mark.parametrize("setting", [{"max_body": 0}, {"body_seconds": 0}, {"max_upload": True}, {"body_seconds": "3"}])
def test_settings_that_make_no_sense_are_refused(echo: Echo, setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        Door(echo, **setting)


# Connections


@pytest.mark.parametrize("sent", [b"", b"P", b"POST /v1", request()[:-1], b"\r\n"])
@with_settings(protocol={"header_seconds": 0.3})
def test_headers_that_do_not_come_end_the_connection(door: Served, sent: bytes) -> None:
    with connected(door.port) as client:
        client.sendall(sent)
        content = received(client)  # ends: the server closes
    assert not content or (b" 408 " in content and error_of(content.partition(b"\r\n\r\n")[2]))


@with_settings(protocol={"header_seconds": 0.3})
def test_headers_that_dribble_end_the_connection(door: Served, echo: Echo) -> None:
    with connected(door.port) as client:
        client.sendall(request("GET", "/health"))  # a good one before does not change it
        assert answered(client)[0] == 200
        client.sendall(b"GET /health HTTP/1.1\r\nX: ")
        dribble = threading.Thread(target=_dribble, args=(client,))
        dribble.start()
        assert b" 408 " in received(client)
        dribble.join(HANG_SECONDS)
    assert len(echo.seen) == 1


def test_without_this_protocol_headers_may_dribble(echo: Echo) -> None:
    """Negative control: uvicorn alone waits."""
    with serving(echo, lifespan="off", http="httptools") as port, connected(port) as client:
        client.settimeout(1.0)
        client.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(TimeoutError):
            client.recv(1)


@with_settings(protocol={"header_seconds": 0.3})
def test_a_request_that_takes_longer_than_its_headers_may(door: Served, echo: Echo) -> None:
    echo.hold = threading.Event()
    with connected(door.port) as client:
        client.sendall(request(**BEARER) + b"GET /he")  # and the beginning of a next one
        assert echo.entered.wait(HANG_SECONDS)
        threading.Event().wait(0.8)
        echo.hold.set()
        assert answered(client)[0] == 200
        client.sendall(b"alth HTTP/1.1\r\nHost: here\r\n\r\n")
        assert answered(client)[0] == 200


@with_settings(protocol={"max_header": 2000, "header_seconds": 60.0})
def test_headers_have_a_limit(door: Served, echo: Echo) -> None:
    for many in (b"X: " + b"x" * 3000, b"X: y\r\n" * 500):
        with connected(door.port) as client:
            client.sendall(b"GET / HTTP/1.1\r\n" + many)
            assert b" 431 " in received(client)
    with connected(door.port) as client:
        for _ in range(3):  # bodies are no headers
            client.sendall(request(body=b"x" * 900, **BEARER))
            assert answered(client)[0] == 200


@with_settings(protocol={"most": 2, "header_seconds": 60.0})
def test_connections_have_a_limit(door: Served) -> None:
    with connected(door.port), connected(door.port) as second:
        second.sendall(request("GET", "/"))
        assert answered(second)[0] == 200
        with connected(door.port) as third:
            assert b" 503 " in received(third)
        second.sendall(request("GET", "/"))
        assert answered(second)[0] == 200


@with_settings(protocol={"write_seconds": 0.3})
def test_a_client_that_does_not_read_is_let_go(door: Served, echo: Echo) -> None:
    echo.answers = b"x" * 50_000_000
    with connected(door.port) as client:
        client.sendall(request(**BEARER))
        assert echo.entered.wait(HANG_SECONDS)
        threading.Event().wait(1.5)
        assert len(received(client)) < 50_000_000
    assert door.gate.inside == 0


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http_is_told_so(door: Served, sent: bytes) -> None:
    with connected(door.port) as client:
        client.sendall(sent)
        content = received(client)
    assert b" 400 " in content
    assert error_of(content.partition(b"\r\n\r\n")[2])


def test_a_client_that_leaves_with_another_request_sent_is_noticed(door: Served, echo: Echo) -> None:
    with connected(door.port) as client:
        client.sendall(request(path="/wait") + request("GET", "/"))
        assert echo.entered.wait(HANG_SECONDS)
    assert echo.left.wait(HANG_SECONDS)


def test_requests_before_an_answer_have_a_limit(door: Served, echo: Echo) -> None:
    """Each would take kilobytes for its forty bytes, and be read on while others are answered."""
    for many, statuses in ((30, {b"200"}), (5000, {b"200", b"400"})):
        with connected(door.port) as client:
            client.sendall(request("GET", "/") * many + request("GET", "/", Connection="close"))
            assert set(re.findall(rb"HTTP/1.1 (\d+)", received(client))) | {b"200"} == statuses
    assert len(echo.seen) < 1000


@pytest.mark.parametrize("setting", [{"header_seconds": 0}, {"most": 0}, {"max_header": 0.5}, {"write_seconds": None}])
def test_connections_need_numbers(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        connections(**setting)


def test_an_offer_of_http_2_is_ignored(door: Served) -> None:
    """As Java's client makes it with every request."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": "AAMAAABkAAQCAAAAAAIAAAAA"}
    body = b"1\r\nUpgrade: 2"
    with connected(door.port) as client:
        for _ in range(2):
            client.sendall(request(body=body, **offer, **BEARER))
            status, _, content = answered(client)
            assert (status, json.loads(content)["bytes"]) == (200, len(body))
