"""The client against servers that say what they like."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from earlytom.errors import UserError
from runtime.measure.serving.client import ServedAnswer, ServerClient
from tests.runtime.serve.servers import serving

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
MORE = {"video": "abc", "timings": {"total": 0.5}}


def chunk(text: str = "", **more: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}], **more})


def event(told: Any) -> bytes:
    return b"data: " + (told if isinstance(told, bytes) else json.dumps(told).encode()) + b"\n\n"


LAST = event({"choices": [], "usage": USAGE})
DONE = event(b"[DONE]")
ERROR = event({"error": {"message": "it broke", "type": "x", "param": None, "code": "internal_error"}})
WHOLE = {"choices": [{"message": {"content": "a b"}}], "usage": USAGE, "earlytom": MORE}
ANSWERS: dict[str, tuple[int, list[bytes]]] = {
    "events": (200, [chunk(), chunk("a"), b": ping\n\n" + chunk(" b"), chunk(earlytom=MORE), LAST, DONE]),
    "halves": (200, [(chunk("a") + chunk(" b"))[:30], (chunk("a") + chunk(" b"))[30:], DONE]),
    "error": (200, [chunk("a"), ERROR, DONE]),
    "cut": (200, [chunk("a")]),
    "no-json": (200, [event(b"{"), DONE]),
    "whole": (200, [json.dumps(WHOLE).encode()]),
    "overloaded": (429, [json.dumps({"error": {"message": "too many", "code": "overloaded"}}).encode()]),
    "proxy": (502, [b"<html>"]),
    "nothing": (200, [b"{}"]),
}  # fmt: skip


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Does what the request's body says."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/v1/models":
        word, told = dict(scope["headers"]).get(b"authorization", b""), {"data": [{"id": "tom"}]}
        status, parts = {b"": (401, [b""]), b"Bearer k": (200, [json.dumps(told).encode()])}.get(word, (200, [b"{}"]))
    else:
        status, parts = ANSWERS[(await receive())["body"].decode()]
    await send({"type": "http.response.start", "status": status, "headers": []})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0.01)
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(app, lifespan="off") as port:
        yield f"http://127.0.0.1:{port}"


def ask(url: str, what: str, *, stream: bool = True) -> ServedAnswer:
    async def one() -> ServedAnswer:
        async with ServerClient(url) as client:
            return await client.ask(what.encode(), stream=stream)

    return asyncio.run(one())


def test_events(url: str) -> None:
    got = ask(url, "events")
    assert (got.status, got.text, got.tokens, got.prompt_tokens, got.cached_tokens) == ("200", "a b", 3, 9, 4)
    assert (got.video, got.inside) == ("abc", 0.5)
    assert got.first is not None
    assert got.per_token == pytest.approx((got.seconds - got.first) / 2)
    (gap,) = got.gaps
    assert 0 < gap < got.seconds - got.first < got.seconds


def test_events_in_halves(url: str) -> None:
    got = ask(url, "halves")
    assert (got.status, got.text, len(got.gaps)) == ("200", "a b", 1)


def test_a_whole_answer(url: str) -> None:
    got = ask(url, "whole", stream=False)
    assert (got.status, got.text, got.tokens, got.video, got.inside) == ("200", "a b", 3, "abc", 0.5)
    assert (got.first, got.gaps, got.per_token) == (None, (), None)


@pytest.mark.parametrize(
    ("what", "stream", "status", "text"),
    [
        ("error", True, "200 internal_error", "it broke"),
        ("cut", True, "broken", "a"),
        ("no-json", True, "broken", ""),
        ("overloaded", True, "429", "too many"),
        ("overloaded", False, "429", "too many"),
        ("proxy", True, "502", ""),
        ("nothing", False, "broken", ""),
    ],
)
def test_what_goes_wrong_has_a_status(url: str, what: str, stream: bool, status: str, text: str) -> None:
    got = ask(url, what, stream=stream)
    assert (got.status, got.text, got.good) == (status, text, False)


def test_nobody_there_and_nobody_who_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]

        async def one() -> str:
            async with ServerClient(f"http://127.0.0.1:{port}", seconds=0.05) as client:
                return (await client.ask(b"x", stream=True)).status

        assert asyncio.run(one()) == "timeout"
    assert ask(f"http://127.0.0.1:{port}", "events").status == "connect"


def test_the_model(url: str) -> None:
    async def name(url: str, key: str | None) -> str:
        async with ServerClient(url, key) as client:
            return await client.model()

    assert asyncio.run(name(url, "k")) == asyncio.run(name(url + "/v1/", "k")) == "tom"
    for key, says in ((None, "asks for a key"), ("other", "is no server of chat completions")):
        with pytest.raises(UserError, match=says):
            asyncio.run(name(url, key))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UserError, match=r"no server answers at .*python -m runtime\.serve"):
        asyncio.run(name(f"http://127.0.0.1:{port}", None))
