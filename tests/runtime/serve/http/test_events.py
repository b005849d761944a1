"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runtime.serve.http.events import Events, while_there
from tests.processes import HANG_SECONDS as LONG


class Wire:
    """What was sent."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.pinged = asyncio.Event()

    async def __call__(self, message: Any) -> None:
        self.messages.append(message)
        if b": ping" in message.get("body", b""):
            self.pinged.set()

    @property
    def text(self) -> str:
        return b"".join(one.get("body", b"") for one in self.messages).decode()


def test_events_are_lines_with_one_between() -> None:
    async def talk() -> None:
        wire = Wire()
        events = Events(wire)
        assert not events.started
        await events.event({"text": "日本\n\n"})
        assert events.started
        await events.event({"n": 1})
        await events.done()
        assert wire.text == 'data: {"text": "日本\\n\\n"}\n\ndata: {"n": 1}\n\ndata: [DONE]\n\n'
        assert [one["type"] for one in wire.messages].count("http.response.start") == 1
        assert [one.get("more_body") for one in wire.messages[1:]] == [True, True, True, False]

    asyncio.run(talk())


def test_a_line_that_is_quiet_is_kept_open() -> None:
    async def talk() -> None:
        wire = Wire()
        events = Events(wire, ping_seconds=0.01)
        await events.event({})
        await asyncio.wait_for(wire.pinged.wait(), LONG)
        await events.done()
        sent = len(wire.messages)
        await asyncio.sleep(0.05)
        assert len(wire.messages) == sent
        assert wire.text.startswith("data: {}\n\n: ping\n\n")

    asyncio.run(talk())


def test_nothing_is_sent_that_is_no_json() -> None:
    async def talk() -> None:
        wire = Wire()
        with pytest.raises(ValueError, match="JSON"):
            await Events(wire).event({"n": float("nan")})
        assert wire.messages == []

    asyncio.run(talk())


class Connection:
    """A client that may leave."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.listening = False

    async def __call__(self) -> dict[str, Any]:
        self.listening = True
        try:
            await self.left.wait()
        finally:
            self.listening = False
        return {"type": "http.disconnect"}


def test_work_that_ends_before_its_client_leaves() -> None:
    async def talk() -> None:
        connection, done = Connection(), []

        async def work() -> None:
            await asyncio.sleep(0)
            done.append(connection.listening)

        await while_there(work(), connection)
        await asyncio.sleep(0)
        assert (done, connection.listening) == ([True], False)

    asyncio.run(talk())


def test_work_is_cancelled_when_its_client_leaves() -> None:
    async def talk() -> None:
        connection, steps = Connection(), []

        async def work() -> None:
            try:
                connection.left.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.sleep(0)  # cleaning up takes a while
                steps.append("cleaned")
                raise

        await while_there(work(), connection)
        assert steps == ["cleaned"]

    asyncio.run(talk())


def test_what_the_work_fails_with_is_told() -> None:
    async def talk() -> None:
        async def work() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            await while_there(work(), Connection())

    asyncio.run(talk())


def test_a_server_that_is_stopped_stops_the_work() -> None:
    async def talk() -> None:
        steps = []

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                steps.append("cleaned")

        task = asyncio.create_task(while_there(work(), Connection()))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == ["cleaned"]

    asyncio.run(talk())
