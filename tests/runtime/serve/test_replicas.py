"""What a front does with replicas that die, refuse, hang or are busy: with a handle that says what a test tells it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.decoder.sampling import GREEDY, Sampling
from runtime.serve.backend import Asked, ModelFacts, Sampled
from runtime.serve.errors import ServeError
from runtime.serve.media import TakenVideo
from runtime.serve.settings import Settings
from runtime.service.requests import Answer, Delta, Timings
from runtime.text.messages import ChatMessage
from runtime.video import Clip
from tests.processes import HANG_SECONDS as LONG
from tests.runtime.serve import ray_stand_in

FACTS = ModelFacts((16,), (126,), (400,), 0.3, 4096, "engine", (5, 5))
TIMES = Timings(0.1, 0.0, 0.0, 0.2, 0.3, 0.6, 0.05, 1.0)
HANGS = "hangs"
DRAWN = Sampling(temperature=1.0)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = ray_stand_in.imported(monkeypatch)
    monkeypatch.setattr(found, "_PAUSE_SECONDS", 0.0)
    return found


def died(module: Any) -> BaseException:
    return module.RayActorError()


def delta(token: int) -> Delta:
    return Delta(f"<{token}>", token)


def last(*tokens: int) -> Delta:
    answer = Answer("".join(f"<{t}>" for t in tokens), tokens, "stop", TIMES, 126, 140, 0)
    return Delta("", None, "stop", answer)


class Replies:
    """What one replica says, item by item; an error is raised, `HANGS` never ends.

    As Ray's, what was refused before it reached a replica is raised by `cancel` again.
    """

    def __init__(self, script: Sequence[Any]) -> None:
        self.script, self.cancelled = script, False
        self.refused: BaseException | None = None

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        return self._items()

    async def _items(self) -> AsyncGenerator[Any, None]:
        for at, one in enumerate(self.script):
            if one == HANGS:
                await asyncio.sleep(LONG)
            if isinstance(one, BaseException):
                self.refused = None if at else one
                raise one
            yield one

    def cancel(self) -> None:
        self.cancelled = True
        if self.refused is not None:
            raise self.refused


class Handle:
    """Of replicas that are asked one after the other."""

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.replies = [Replies(script) for script in scripts]
        self.sessions: list[str] = []
        self.shipped: list[Any] = []
        self.answer = SimpleNamespace(remote=self._asked)

    def options(self, *, stream: bool, session_id: str) -> Handle:
        assert stream
        self.sessions.append(session_id)
        return self

    def _asked(self, shipped: Any) -> Replies:
        self.shipped.append(shipped)
        return self.replies[len(self.shipped) - 1]


class Decoding:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, taken: TakenVideo, counts: Sequence[int], size: tuple[int, int], sampling: str) -> Clip:
        self.count += 1
        return Clip(torch.zeros(16, 3, *size, dtype=torch.uint8), (), 16, 0.0, 2.0, 0.5)


def asked(sampling: Sampling = GREEDY, *, seconds: float = LONG, owner: str = "k1") -> Asked:
    messages = (ChatMessage("user", "What?", video=True),)
    return Asked(messages, sampling, (), None, None, 8, False, owner, time.monotonic() + seconds)


def front(module: Any, handle: Handle, decode: Any = None, **settings: Any) -> Any:
    told = Settings(Path("engine"), **{"ray": True, "replicas": 2, **settings})
    frames = SimpleNamespace(size=(8, 8), sampling="a way")
    return module.Replicas(handle, FACTS, frames, decode or Decoding(), settings=told)


def ask(replicas: Any, question: Asked, sha256: str = "abc") -> list[Sampled | Delta]:
    async def all_of_it() -> list[Sampled | Delta]:
        return [one async for one in replicas.deltas(question, TakenVideo(sha256, 1))]

    return asyncio.run(asyncio.wait_for(all_of_it(), LONG))


def tokens(items: Sequence[Sampled | Delta]) -> list[int | None]:
    return [item.token for item in items if isinstance(item, Delta)]


def begun(module: Any, usage: float = 0.25) -> Any:
    return module.Begun((0.0, 1.0), "r1", usage)


def refused(module: Any, *scripts: Sequence[Any], sampling: Sampling = GREEDY) -> tuple[int, str, list[Any]]:
    """Status and code of what a client is told, and what it had before."""
    handle, had = Handle(*scripts), []

    async def all_of_it() -> None:
        async for item in front(module, handle).deltas(asked(sampling), TakenVideo("abc", 1)):
            had.append(item)

    with pytest.raises(ServeError) as caught:
        asyncio.run(asyncio.wait_for(all_of_it(), LONG))
    assert len(handle.shipped) == len(scripts)
    return caught.value.status, caught.value.code, had


def test_an_answer_is_passed_on(module: Any) -> None:
    handle = Handle([begun(module), delta(1), delta(2), last(1, 2)])
    replicas = front(module, handle)
    items = ask(replicas, asked())
    assert items[0] == Sampled((0.0, 1.0))
    assert tokens(items) == [1, 2, None]
    assert (replicas.running, replicas.cache_usage) == (0, 0.25)
    times = items[-1].answer.timings  # type: ignore[union-attr]
    assert (times.decode, times.preprocess) == (2.0, 0.5)  # what the front has done counts
    assert times.total >= TIMES.total
    assert 0 < handle.shipped[0].asked.deadline <= LONG  # from now on: another machine has another clock
    assert handle.replies[0].cancelled


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=3)])
@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_replica_that_dies_costs_no_answer(module: Any, sampling: Sampling, sent: int) -> None:
    before = [delta(number) for number in range(1, sent + 1)]
    handle = Handle(
        [begun(module), *before, died(module)], [begun(module), delta(1), delta(2), delta(3), last(1, 2, 3)]
    )
    items = ask(front(module, handle), asked(sampling))
    assert tokens(items) == [1, 2, 3, None]
    assert sum(isinstance(item, Sampled) for item in items) == 1
    assert handle.sessions[0] == handle.sessions[1]


def test_a_replica_that_dies_at_its_last_word(module: Any) -> None:
    handle = Handle([begun(module), delta(1), died(module)], [died(module)], [begun(module), delta(1), last(1)])
    assert tokens(ask(front(module, handle), asked())) == [1, None]


def test_what_was_drawn_at_random_cannot_be_drawn_again(module: Any) -> None:
    status, code, had = refused(module, [begun(module), delta(1), died(module)], sampling=DRAWN)
    assert (status, code, tokens(had)) == (503, "replica_lost", [1])
    handle = Handle([begun(module), died(module)], [begun(module), delta(7), last(7)])  # nothing was sent yet
    assert tokens(ask(front(module, handle), asked(DRAWN))) == [7, None]


def test_another_answer_is_not_joined_to_the_first(module: Any) -> None:
    script = [begun(module), delta(1), delta(2), died(module)]
    status, code, had = refused(module, script, [begun(module), delta(1), delta(9)])
    assert (status, code, tokens(had)) == (503, "replica_lost", [1, 2])


def test_one_death_after_the_other_is_told(module: Any) -> None:
    assert refused(module, *[[died(module)]] * module.ATTEMPTS)[:2] == (503, "replica_lost")


def test_an_answer_that_ends_without_an_end_is_told(module: Any) -> None:
    assert refused(module, [begun(module), delta(1)])[:2] == (503, "replica_lost")


def test_replicas_that_are_all_busy_are_429(module: Any) -> None:
    assert refused(module, [module.BackPressureError(3, 3)])[:2] == (429, "overloaded")


@pytest.mark.parametrize("status", [400, 429, 502, 504])
def test_a_refusal_keeps_its_status(module: Any, status: int) -> None:
    given = ServeError(status, "word", "one line", param="messages", retry_after=2)
    assert refused(module, [module.Refused.of(given)])[:2] == (status, "word")
    again = module.Refused.of(given).error()
    assert (again.message, again.param, again.retry_after) == ("one line", "messages", 2)
    assert module.Refused.of(ValueError("secret")).message.find("secret") == -1


@pytest.mark.parametrize("said", [0, 1])
def test_a_replica_that_hangs_is_given_up_at_the_deadline(
    module: Any, monkeypatch: pytest.MonkeyPatch, said: int
) -> None:
    monkeypatch.setattr(module, "_LATE_SECONDS", 0.0)
    handle = Handle([*[begun(module), delta(1)][: 2 * said], HANGS])
    with pytest.raises(ServeError) as caught:
        ask(front(module, handle), asked(seconds=0.2))
    assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
    assert handle.replies[0].cancelled


def test_who_leaves_ends_the_answer_there(module: Any) -> None:
    handle = Handle([begun(module), delta(1), HANGS])

    async def leave() -> int:
        replicas = front(module, handle)
        items = replicas.deltas(asked(), TakenVideo("abc", 1))
        await anext(items)
        await anext(items)
        running: int = replicas.running
        await items.aclose()
        assert replicas.running == 0
        return running

    assert asyncio.run(leave()) == 1
    assert handle.replies[0].cancelled


def test_a_video_is_decoded_once_and_apart_for_each_owner(module: Any) -> None:
    answer: Callable[[], list[Any]] = lambda: [begun(module), delta(1), last(1)]  # noqa: E731
    handle, decode = Handle(*[answer() for _ in range(6)]), Decoding()
    replicas = front(module, handle, decode, videos=2)
    for owner, sha256 in (("k1", "a"), ("k1", "a"), ("k2", "a"), ("k1", "b"), ("k1", "b"), ("k1", "a")):
        ask(replicas, asked(owner=owner), sha256)
    assert decode.count == 4  # the last one had to go
    assert len(set(handle.sessions)) == 3
    assert handle.sessions[0] == handle.sessions[1] == handle.sessions[5]
    replicas.close()


def test_there_are_places_for_what_all_replicas_take(module: Any) -> None:
    told = {"waiting": 8, "replicas": 2, "max_replicas": 3}
    assert front(module, Handle(), **told).facts.lanes + 8 == 3 * 9
