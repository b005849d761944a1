"""What a caller gets beside text: messages, stop strings, counts of tokens and of requests; and reading in a loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from earlytom.errors import UserError
from runtime.errors import Cancelled, Closed, DeadlineExceeded
from runtime.pipeline import Pipeline
from runtime.service.requests import Answer, Delta
from runtime.text.messages import ChatMessage
from runtime.video import Clip
from tests.processes import HANG_SECONDS as LONG

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "What happens?"
TOKENS = 12
TALK = [
    ChatMessage("user", QUESTION),
    ChatMessage("assistant", "a red ball rolls"),
    ChatMessage("user", "Where to?"),
]


@pytest.fixture(scope="module")
def pipeline(engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(engine, device="cpu", waiting=40) as made:
        yield made


@pytest.fixture(scope="module")
def clip(pipeline: Pipeline, drawn_clip: Path) -> Clip:
    return pipeline._core.prepare(drawn_clip)


@pytest.fixture(scope="module")
def answer(pipeline: Pipeline, clip: Clip) -> Answer:
    return pipeline.ask(clip, QUESTION, max_new_tokens=TOKENS)


@pytest.fixture
def held(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The pipeline answers nothing until this is set."""
    go = threading.Event()
    turns = pipeline._scheduler._serve

    def wait(*given: Any) -> Any:
        assert go.wait(LONG)
        return turns(*given)

    monkeypatch.setattr(pipeline._scheduler, "_serve", wait)
    yield go
    go.set()


def run(*awaitables: Any) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*awaitables), LONG)

    return asyncio.run(all_of_them())


# Messages


def test_a_question_and_the_conversation_of_it_get_one_answer(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    found = pipeline.ask(clip, TALK[:1], max_new_tokens=TOKENS)
    assert (found.tokens, found.prompt_tokens) == (answer.tokens, answer.prompt_tokens)
    system = [ChatMessage("system", "Be brief."), TALK[0]]
    plain = pipeline.ask(clip, QUESTION, system="Be brief.", max_new_tokens=TOKENS)
    assert pipeline.ask(clip, system, max_new_tokens=TOKENS).tokens == plain.tokens


def test_what_was_said_before_is_part_of_the_prompt(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    later = pipeline.ask(clip, TALK, max_new_tokens=TOKENS)
    assert later.tokens != answer.tokens
    assert later.prompt_tokens > answer.prompt_tokens
    assert pipeline.embed(clip, TALK).shape[1] == later.prompt_tokens
    assert "".join(delta.text for delta in pipeline.stream(clip, TALK, max_new_tokens=TOKENS)) == later.text


# Counts of tokens


def test_an_answer_counts_its_tokens(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    assert answer.prompt_tokens == pipeline.embed(clip, QUESTION).shape[1]
    assert answer.generated_tokens == len(answer.tokens) == TOKENS
    assert answer.cached_tokens == 0


def test_a_watched_video_saves_what_was_read(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    before = len(pipeline._core.question(QUESTION).words.prefix_ids)
    with pipeline.watch(clip) as watched:
        found = watched.ask(QUESTION, max_new_tokens=TOKENS)
        talk = watched.ask(TALK, max_new_tokens=TOKENS)
    assert found.cached_tokens == talk.cached_tokens == before + found.visual_tokens + 1
    assert (found.prompt_tokens, found.tokens) == (answer.prompt_tokens, answer.tokens)


def test_what_is_remembered_is_read_by_the_first_question(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    with pipeline.remember(clip) as watched:
        assert not watched.held
        first, second = (watched.ask(QUESTION, max_new_tokens=TOKENS) for _ in range(2))
        assert watched.held
    assert first.tokens == second.tokens == answer.tokens
    assert (first.cached_tokens, first.timings.vision > 0) == (0, True)
    assert (second.cached_tokens > answer.visual_tokens, second.timings.vision) == (True, 0)


def test_a_remembered_video_can_stand_later_in_a_conversation(pipeline: Pipeline, clip: Clip) -> None:
    shown = [*TALK[:2], ChatMessage("user", "Where to?", video=True)]
    wanted = pipeline.ask(clip, shown, max_new_tokens=TOKENS)
    with pipeline.remember(clip, shown) as watched:
        for cached in (False, True):
            found = watched.ask(shown, max_new_tokens=TOKENS)
            assert (found.tokens, found.cached_tokens > 0) == (wanted.tokens, cached)
        with pytest.raises(UserError, match="read after another text"):
            watched.submit(TALK)
        with pytest.raises(UserError, match="read after another text"):
            watched.submit(QUESTION)


# Stop strings


def test_a_stop_string_ends_the_answer_before_it(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    stop = answer.text[len(answer.text) // 2 :][:4]
    found = pipeline.ask(clip, QUESTION, max_new_tokens=TOKENS, stop=("never said", stop))
    assert found.text == answer.text.partition(stop)[0]
    assert found.finish == "stop"
    assert answer.finish == "length"  # negative control
    assert found.tokens == answer.tokens[: len(found.tokens)]
    deltas = list(pipeline.stream(clip, QUESTION, max_new_tokens=TOKENS, stop=[stop]))
    assert "".join(delta.text for delta in deltas) == found.text
    assert deltas[-1].finish == "stop"


def test_a_stop_string_that_does_not_come_changes_nothing(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    found = pipeline.ask(clip, QUESTION, max_new_tokens=TOKENS, stop=(answer.text[-3:] + "x",))
    assert (found.text, found.tokens, found.finish) == (answer.text, answer.tokens, "length")


@pytest.mark.parametrize("stop", ["end", [""], [3], None, {"a"}])
def test_stop_strings_that_are_none_are_refused(pipeline: Pipeline, clip: Clip, stop: Any) -> None:
    with pytest.raises(UserError, match="stop must be a list of texts"):
        pipeline.submit(clip, QUESTION, stop=stop)


# Counts of requests


def test_requests_are_counted(pipeline: Pipeline, clip: Clip, held: threading.Event) -> None:
    assert (pipeline.running, pipeline.queued) == (0, 0)
    asked = [pipeline.submit(clip, QUESTION, max_new_tokens=2) for _ in range(5)]
    _until(lambda: pipeline.running == 1)
    assert pipeline.queued == 4
    asked[-1].cancel()
    assert pipeline.queued == 3
    held.set()
    for one in asked[:-1]:
        one.result(LONG)
    assert (pipeline.running, pipeline.queued) == (0, 0)


# In an event loop


async def read(request: Any) -> list[Delta]:
    async with request:
        return [delta async for delta in request]


def test_deltas_come_in_a_loop_as_they_do_in_a_thread(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    asked = [pipeline.submit(clip, QUESTION, max_new_tokens=TOKENS) for _ in range(8)]
    for deltas in run(*map(read, asked)):
        assert tuple(delta.token for delta in deltas[:-1]) == answer.tokens
        assert deltas[-1].answer is not None
        assert deltas[-1].answer.text == answer.text


def test_a_loop_goes_on_while_a_request_waits(pipeline: Pipeline, clip: Clip, held: threading.Event) -> None:
    async def together() -> int:
        task = asyncio.create_task(read(pipeline.submit(clip, QUESTION, max_new_tokens=2)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        held.set()
        return len(await task)

    assert run(together()) == [3]


def test_an_answer_that_is_there_is_read_at_once(pipeline: Pipeline, clip: Clip) -> None:
    request = pipeline.submit(clip, QUESTION, max_new_tokens=2)
    request.result(LONG)
    (deltas,) = run(read(request))
    assert len(deltas) == 3


def test_a_task_that_is_cancelled_cancels_its_request(pipeline: Pipeline, clip: Clip, held: threading.Event) -> None:
    async def leave() -> None:
        request = pipeline.submit(clip, QUESTION)
        task = asyncio.create_task(read(request))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert request.done

    run(leave())


def test_a_request_that_is_cancelled_elsewhere_ends_its_reader(
    pipeline: Pipeline, clip: Clip, held: threading.Event
) -> None:
    async def cancelled() -> None:
        request = pipeline.submit(clip, QUESTION)
        task = asyncio.create_task(read(request))
        await asyncio.sleep(0)
        await asyncio.to_thread(request.cancel)
        with pytest.raises(Cancelled):
            await task

    run(cancelled())


def test_a_deadline_ends_a_request_that_nobody_works_on(pipeline: Pipeline, clip: Clip, held: threading.Event) -> None:
    with pytest.raises(DeadlineExceeded, match=r"deadline of 0\.05 s"):
        run(read(pipeline.submit(clip, QUESTION, deadline=0.05)))


def test_the_end_of_the_loop_does_not_reach_the_worker(
    pipeline: Pipeline, clip: Clip, answer: Answer, held: threading.Event
) -> None:
    request = pipeline.submit(clip, QUESTION, max_new_tokens=TOKENS)

    async def leave() -> None:
        await anext(request.__aiter__())

    loop = asyncio.new_event_loop()
    task = loop.create_task(leave())
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    held.set()
    assert request.result(LONG).tokens == answer.tokens


def test_what_a_closed_pipeline_says_reaches_the_loop(engine: Path, clip: Clip) -> None:
    other = Pipeline.load(engine, device="cpu")
    go = threading.Event()
    other._scheduler._serve = lambda turns: go.wait(LONG) and []
    first, second = (other.submit(clip, QUESTION) for _ in range(2))
    _until(lambda: other.running == 1)
    closing = threading.Thread(target=other.close)
    closing.start()
    with pytest.raises(Closed):
        run(read(second))
    first.cancel()
    go.set()
    closing.join(LONG)


def _until(reached: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(int(LONG * 100)):
        if reached():
            return
        waited.wait(0.01)
    raise AssertionError("it did not come to that")
