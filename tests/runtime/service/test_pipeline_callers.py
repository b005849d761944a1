"""One pipeline and many callers, on a real engine; where a test has to stop a request halfway, its stages wait for it.

The line itself is tested in test_scheduler.py.
"""

from __future__ import annotations

import dataclasses
import gc
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom.errors import UserError
from runtime import pipeline as pipeline_module
from runtime.errors import Cancelled, Closed, DeadlineExceeded, EngineError, Overloaded, VideoError
from runtime.pipeline import Pipeline
from runtime.service.answering import Answering
from runtime.service.requests import Answer, CheckedQuestion, Delta, Provenance, Ready, Seen
from runtime.text.prompt import splice
from runtime.video import Clip
from runtime.vision import Encoded, VisionBackend
from tests import warm
from tests.processes import HANG_SECONDS as LONG
from tests.runtime.service.callers import Caller

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "What happens?"
TOKENS = 6
ROUNDS = 3  # of each of 16 callers; with more the test of the line has them


@pytest.fixture(scope="module")
def pipeline(engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(engine, device="cpu", waiting=20) as made:
        yield made


@pytest.fixture
def opened(engine: Path) -> Iterator[Pipeline]:
    """One for a test that closes it, or fills its line: one request may wait."""
    made = Pipeline.load(engine, device="cpu", waiting=1)
    yield made
    made._scheduler.abort(LONG)


@pytest.fixture(scope="module")
def clip(pipeline: Pipeline, drawn_clip: Path) -> Clip:
    return pipeline._core.prepare(drawn_clip)


@pytest.fixture(scope="module")
def clips(clip: Clip) -> list[Clip]:
    """Sixteen that get answers of their own, most of them."""
    turned = [clip.frames.flip(dims) if dims else clip.frames for dims in ((), (0,), (2,), (3,))]
    kinds = [frames[:, order] for frames in turned for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1])]
    return [dataclasses.replace(clip, frames=frames.contiguous()) for frames in kinds]


@pytest.fixture(scope="module")
def answer(pipeline: Pipeline, clip: Clip) -> Answer:
    return pipeline.ask(clip, QUESTION, max_new_tokens=TOKENS)


def test_frames_on_a_gpu_are_taken_before_they_are_read(
    pipeline: Pipeline, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here nothing is on a GPU: what `as_of_now` would give stands for it."""
    told: list[str] = []
    prepare = pipeline._core.prepare
    monkeypatch.setattr(pipeline_module, "as_of_now", lambda frames: SimpleNamespace(take=lambda: told.append("taken")))
    monkeypatch.setattr(pipeline._core, "prepare", lambda *given: told.append("read") or prepare(*given))
    for video in (clip, clip.frames):
        pipeline.ask(video, QUESTION, max_new_tokens=1)
        with pipeline.watch(video) as watched:
            watched.ask(QUESTION, max_new_tokens=1)
    assert told == ["taken", "read"] * 4


class Gate:
    """Takes the place of a pipeline's second stage: each answer says its clip's number of source frames, waits, and
    says "b"."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, self.through = threading.Event(), threading.Event(), threading.Event()
        monkeypatch.setattr(pipeline._core, "answer", self.answer)

    def answer(self, ready: Ready, **how: Any) -> Generator[Delta, None, None]:
        try:
            assert isinstance(ready.shown, Clip)
            yield Delta(str(ready.shown.source_frames), 0)
            self.begun.set()
            assert self.go.wait(LONG)
            yield Delta("b", 1)
        finally:
            self.through.set()


@pytest.fixture
def gate(opened: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(opened, monkeypatch)
    yield made
    made.go.set()


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("earlytom-")]


# Everybody gets the own answer


def test_sixteen_threads_get_their_own_answers(pipeline: Pipeline, clips: list[Clip]) -> None:
    expected = [pipeline.ask(clip, QUESTION, max_new_tokens=TOKENS).tokens for clip in clips]
    assert len(set(expected)) > 10  # they are told apart

    def call(n: int) -> list[tuple[int, ...]]:
        found = []
        for turn in range(ROUNDS):
            if turn % 2:
                found.append(pipeline.ask(clips[n], QUESTION, max_new_tokens=TOKENS).tokens)
            else:
                deltas = list(pipeline.stream(clips[n], QUESTION, max_new_tokens=TOKENS))
                found.append(tuple(delta.token for delta in deltas if delta.token is not None))
        return found

    callers = [Caller(lambda n=n: call(n)) for n in range(16)]  # type: ignore[misc]
    assert [caller.outcome() for caller in callers] == [[tokens] * ROUNDS for tokens in expected]


def test_a_request_gives_its_deltas_and_its_answer(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    request = pipeline.submit(clip, QUESTION, max_new_tokens=TOKENS)
    assert request.result().tokens == answer.tokens
    assert request.done
    *deltas, last = request
    assert tuple(delta.token for delta in deltas) == answer.tokens
    assert last.answer is request.result(0)


def test_files_are_decoded_by_the_worker(pipeline: Pipeline, drawn_clip: Path, answer: Answer) -> None:
    requests = [pipeline.submit(drawn_clip, QUESTION, max_new_tokens=TOKENS) for _ in range(3)]
    for request in requests:
        found = request.result()
        assert found.tokens == answer.tokens
        times = found.timings
        assert times.waiting + times.decode + times.preprocess + times.vision + times.prefill <= times.first_token
        assert min(times.waiting, times.decode, times.preprocess) > 0


def test_a_reader_that_never_comes_holds_up_nobody(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    ignored = pipeline.submit(clip, QUESTION, max_new_tokens=200)
    slow = pipeline.stream(clip, QUESTION, max_new_tokens=TOKENS)
    first = next(slow)
    assert pipeline.ask(clip, QUESTION, max_new_tokens=TOKENS).tokens == answer.tokens
    assert tuple(delta.token for delta in (first, *slow))[:-1] == answer.tokens
    assert ignored.done


# A batch


class Several:
    """A vision backend of batch 2, made of one of batch 1; refuses an odd clip, and then the whole call."""

    batch = 2

    def __init__(self, vision: VisionBackend) -> None:
        self._vision = vision
        self.name, self.device = vision.name, vision.device
        self.calls: list[int] = []

    def encode(self, frames: Tensor) -> Encoded:
        raise AssertionError("a batched engine takes [B, F, 3, H, W]")

    def encode_several(self, clips: list[Tensor]) -> list[Encoded]:
        self.calls.append(len(clips))
        found = []
        for frames in clips:
            found.append(Encoded(*(value.clone() for value in self._vision.encode(frames))))
        return found

    def close(self) -> None:
        self._vision.close()


def test_an_engine_for_several_videos_gets_those_that_are_ready(
    opened: Pipeline, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = Several(opened.vision)
    expected = [opened.ask(clip, QUESTION, max_new_tokens=TOKENS).tokens for clip in clips[:4]]
    parts = (vision, opened.decoder, opened._core.splicing.closing, opened._core.tokenizer, opened._core.stops)
    core = Answering(opened.manifest, *parts)  # type: ignore[arg-type]
    with Pipeline(core, waiting=4) as pipeline:
        begun, go = threading.Event(), threading.Event()
        plain = pipeline._core.answer

        def held(ready: Ready, **how: Any) -> Generator[Delta, None, None]:
            begun.set()
            assert go.wait(LONG)
            yield from plain(ready, **how)

        monkeypatch.setattr(pipeline._core, "answer", held)
        requests = [pipeline.submit(clips[0], QUESTION, max_new_tokens=TOKENS)]
        assert begun.wait(LONG)
        requests += [pipeline.submit(clip, QUESTION, max_new_tokens=TOKENS) for clip in clips[1:4]]
        bad = pipeline.submit(dataclasses.replace(clips[0], frames=clips[0].frames[:2]), QUESTION)
        while len(pipeline._scheduler._prepared) < 2:
            threading.Event().wait(0.001)
        go.set()
        assert [request.result().tokens for request in requests] == expected
        with pytest.raises(EngineError, match="frames"):
            bad.result()
        # Alone; two together; the last two together, of which one is bad, and then each by itself.
        assert vision.calls == [1, 2, 2, 1, 1]
        waits = requests[2].result().timings
        assert waits.waiting + waits.vision + waits.prefill <= waits.first_token


# What cannot be answered


def test_a_full_line(opened: Pipeline, clip: Clip, gate: Gate) -> None:
    first = opened.submit(clip, QUESTION)
    assert gate.begun.wait(LONG)
    second = opened.submit(clip, QUESTION)
    for call in (opened.submit, opened.ask, lambda *args: next(opened.stream(*args))):
        with pytest.raises(Overloaded, match=r"try again") as caught:
            call(clip, QUESTION)
        assert isinstance(caught.value, UserError)
    second.cancel()
    third = opened.submit(clip, QUESTION)
    gate.go.set()
    assert [delta.token for request in (first, third) for delta in request] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"prompt": " "}, "question is empty"),
        ({"max_new_tokens": 10**9}, "context of 4096"),
        ({"deadline": 0}, r"deadline \(seconds\) must be above 0, got 0"),
        ({"frames": 7}, "7"),
    ],
)
def test_a_bad_question_is_refused_before_it_takes_a_place(
    opened: Pipeline, clip: Clip, gate: Gate, how: dict[str, Any], words: str
) -> None:
    requests = [opened.submit(clip, QUESTION)]
    with pytest.raises(UserError, match=words) as caught:
        opened.submit(**{"video": clip, "prompt": QUESTION, **how})
    assert "\n" not in str(caught.value)
    requests.append(opened.submit(clip, QUESTION))  # there is one place in line, and it is free
    with pytest.raises(Overloaded):
        opened.submit(clip, QUESTION)


def test_the_worker_computes_on_the_decoder_s_gpu(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is one of each thread, and a new one has the first."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    pipeline._core.answer_turns([])
    assert chosen == []
    monkeypatch.setattr(pipeline._core, "decoder", SimpleNamespace(device=torch.device("cuda:1")))
    pipeline._core.answer_turns([])
    assert chosen == [torch.device("cuda:1")]


def test_a_bad_video_is_the_error_of_its_own_request(
    pipeline: Pipeline, clip: Clip, answer: Answer, tmp_path: Path
) -> None:
    with pytest.raises(VideoError, match=r"no-such\.mp4"):
        pipeline.submit("no-such.mp4", QUESTION)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    bad = pipeline.submit(text, QUESTION)
    odd = pipeline.submit(dataclasses.replace(clip, frames=clip.frames[:2]), QUESTION)
    good = pipeline.submit(clip, QUESTION, max_new_tokens=TOKENS)
    with pytest.raises(VideoError, match=r"text\.mp4"):
        next(bad)
    with pytest.raises(EngineError, match="frames"):
        odd.result()
    assert good.result().tokens == answer.tokens


def test_a_deadline(opened: Pipeline, clip: Clip, gate: Gate) -> None:
    first = opened.submit(clip, QUESTION, deadline=LONG)
    assert gate.begun.wait(LONG)
    late = opened.submit(clip, QUESTION, deadline=0.01)
    with pytest.raises(DeadlineExceeded, match=r"0\.01 s passed"):
        late.result()
    gate.go.set()
    assert len(list(first)) == 2


# Requests that nobody wants any more


def test_a_generator_that_is_not_started_takes_no_place(opened: Pipeline, clip: Clip, gate: Gate) -> None:
    waiting = [opened.stream(clip, QUESTION) for _ in range(5)]
    with pytest.raises(UserError, match="empty"):
        next(opened.stream(clip, ""))
    opened.stream("no-such.mp4", "")  # not even looked at
    first, second = opened.submit(clip, QUESTION), opened.submit(clip, QUESTION)
    gate.go.set()
    assert len([*first, *second]) == 4
    assert [delta.text for delta in waiting[0]] == [str(clip.source_frames), "b"]


def _close(stream: Generator[Delta, None, None]) -> None:
    stream.close()


def _throw(stream: Generator[Delta, None, None]) -> None:
    with pytest.raises(ZeroDivisionError):
        stream.throw(ZeroDivisionError)


@pytest.mark.parametrize("end", [_close, _throw, None])
def test_a_generator_that_is_dropped_ends_its_request(
    opened: Pipeline, clip: Clip, gate: Gate, end: Callable[[Any], None] | None
) -> None:
    """Closed, left by an error, or let go: the worker leaves it before its next token."""
    stream = opened.stream(clip, QUESTION)
    next(stream)
    assert gate.begun.wait(LONG)
    (job,) = opened._scheduler._group
    if end is not None:
        end(stream)
    del stream
    assert job.done
    gate.go.set()
    assert gate.through.wait(LONG)
    with pytest.raises(Cancelled):
        job.last()
    assert job._last == Delta(str(clip.source_frames), 0)


@pytest.mark.parametrize("how", ["dropped", "left"])
def test_a_request_that_is_dropped_frees_its_place_and_its_video(
    opened: Pipeline, clip: Clip, gate: Gate, how: str
) -> None:
    opened.submit(clip, QUESTION).result  # noqa: B018 - dropped at once: nobody can read it
    first = opened.submit(clip, QUESTION)
    assert gate.begun.wait(LONG)
    frames = clip.frames.clone()
    freed = threading.Event()
    weakref.finalize(frames, freed.set)
    with opened.submit(dataclasses.replace(clip, frames=frames), QUESTION) as request:
        with pytest.raises(Overloaded):
            opened.submit(clip, QUESTION)
        if how == "dropped":
            request.__del__()
    del request, frames
    second = opened.submit(clip, QUESTION)
    assert freed.wait(LONG)  # while the first is still answered
    gate.go.set()
    assert len([*first, *second]) == 4


def test_ctrl_c_in_ask_cancels(opened: Pipeline, clip: Clip, gate: Gate) -> None:
    def interrupt() -> None:
        assert gate.begun.wait(LONG)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    Caller(interrupt)
    with pytest.raises(KeyboardInterrupt):
        opened.ask(clip, QUESTION)
    (job,) = opened._scheduler._group
    with pytest.raises(Cancelled):
        job.last(0)
    gate.begun.clear()
    waits = opened.submit(clip, QUESTION)
    gate.go.set()
    assert len(list(waits)) == 2


# Closing


def test_a_closed_pipeline_says_so(opened: Pipeline, clip: Clip) -> None:
    waiting = opened.stream(clip, QUESTION)
    opened.close()
    opened.close()
    for call in (opened.submit, opened.ask, lambda *args: next(opened.stream(*args)), lambda *args: next(waiting)):
        with pytest.raises(Closed, match="closed") as caught:
            call(clip, QUESTION)
        assert isinstance(caught.value, RuntimeError)
    assert opened.decoder is None
    assert not [worker for worker in opened._scheduler._workers if worker.is_alive()]


@pytest.mark.parametrize("drain", [True, False])
def test_close_while_callers_wait(opened: Pipeline, clip: Clip, gate: Gate, drain: bool) -> None:
    callers = [Caller(lambda: list(opened.submit(clip, QUESTION)))]
    assert gate.begun.wait(LONG)
    second = opened.submit(clip, QUESTION)
    callers.append(Caller(lambda: list(second)))
    closing = Caller(lambda: opened.close(drain=drain))
    if not drain:
        assert isinstance(callers[1].outcome(), Closed)  # at once
    gate.go.set()
    assert closing.outcome() is None
    assert [delta.token for delta in callers[0].outcome()] == [0, 1]
    assert isinstance(callers[1].outcome(), list) == drain


def test_leaving_the_block_by_an_error_ends_the_answer_that_is_under_way(
    opened: Pipeline, clip: Clip, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborting, ring = threading.Event(), opened._scheduler._ring

    def rung() -> None:
        ring()
        if opened._scheduler._aborting:
            aborting.set()

    monkeypatch.setattr(opened._scheduler, "_ring", rung)
    request = opened.submit(clip, QUESTION)
    assert gate.begun.wait(LONG)
    Caller(lambda: gate.go.set() if aborting.wait(LONG) else None)
    with pytest.raises(ZeroDivisionError), opened:
        raise ZeroDivisionError
    assert next(request).token == 0
    with pytest.raises(Closed):
        next(request)


def test_no_thread_is_left(engine: Path, clip: Clip) -> None:
    before = workers()
    for _ in range(3):
        with Pipeline.load(engine, device="cpu") as pipeline:
            pipeline.ask(clip, QUESTION, max_new_tokens=1)
            assert len(workers()) == len(before) + 2
    assert workers() == before


def test_a_pipeline_that_is_let_go_frees_all(engine: Path, clip: Clip) -> None:
    before = workers()
    pipeline = Pipeline.load(engine, device="cpu")
    pipeline.ask(clip, QUESTION, max_new_tokens=1)
    decoder, started = weakref.ref(pipeline.decoder), [each for each in workers() if each not in before]
    request = pipeline.submit(clip, QUESTION, max_new_tokens=TOKENS)
    del pipeline
    gc.collect()
    assert len(request.result().tokens) == TOKENS  # a request keeps it
    del request
    gc.collect()
    for thread in started:
        thread.join(LONG)
        assert not thread.is_alive()
    gc.collect()
    assert decoder() is None


EXIT = """
import sys
from pathlib import Path
from runtime.pipeline import Pipeline
pipeline = Pipeline.load(sys.argv[1], device="cpu")
stream = pipeline.stream(Path(sys.argv[2]), "What happens?", max_new_tokens=3000)
waiting = pipeline.submit(Path(sys.argv[2]), "What happens?", max_new_tokens=3000)
print(next(stream).token is not None)
"""


def test_the_interpreter_ends_though_nobody_closed_it(engine: Path, drawn_clip: Path) -> None:
    words = [sys.executable, "-c", EXIT, str(engine), str(drawn_clip)]
    done = warm.run(words, LONG)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# A video that was read before


def seen(pipeline: Pipeline, clip: Clip, question: CheckedQuestion) -> Seen:
    core = pipeline._core
    assert core.decoder is not None
    found = core.vision.encode(clip.frames)
    whole = splice(question.words, torch.cat([found.tokens, core.splicing.closing[None]]), core.decoder.embed)
    before = whole[:, : whole.shape[1] - len(question.words.suffix_ids)]
    kept = Provenance(found.positions.clone(), found.sources.clone(), found.place.clone())
    return Seen(core.decoder.prefill(before), question.words.prefix_ids, len(found.tokens), kept, clip.times())


def test_a_video_that_was_read_before_gets_the_same_answers(pipeline: Pipeline, clip: Clip, answer: Answer) -> None:
    read = seen(pipeline, clip, pipeline._core.question(QUESTION))
    other = "How many balls are there?"
    for question in (QUESTION, other, QUESTION):
        found = pipeline.ask(read, question, max_new_tokens=TOKENS)
        assert found.tokens == pipeline.ask(clip, question, max_new_tokens=TOKENS).tokens
        assert found.visual_tokens == answer.visual_tokens
        assert (found.timings.decode, found.timings.preprocess, found.timings.vision) == (0, 0, 0)
    changed = seen(pipeline, dataclasses.replace(clip, frames=clip.frames.flip(0)), pipeline._core.question(QUESTION))
    assert pipeline.ask(changed, QUESTION, max_new_tokens=TOKENS).tokens != answer.tokens  # negative control


def test_a_video_that_was_read_after_another_text_is_refused(pipeline: Pipeline, clip: Clip) -> None:
    read = seen(pipeline, clip, pipeline._core.question(QUESTION, system="Answer briefly."))
    assert pipeline.ask(read, QUESTION, system="Answer briefly.", max_new_tokens=1).tokens
    with pytest.raises(UserError, match="same system message"):
        pipeline.ask(read, QUESTION)


# Before the first request


def test_a_warm_up_leaves_nothing_to_do_for_the_first_request(engine: Path, clip: Clip, answer: Answer) -> None:
    with Pipeline.load(engine, device="cpu", warm_up=True) as warm:
        assert warm.decoder is not None
        caches = dict(warm.decoder._caches)
        assert warm.ask(clip, QUESTION, max_new_tokens=TOKENS).tokens == answer.tokens
        assert warm.decoder._caches == caches != {}


def test_on_a_cpu_the_first_request_is_the_warm_up(engine: Path) -> None:
    with Pipeline.load(engine, device="cpu") as cold:
        assert cold.decoder is not None
        assert cold.decoder._caches == {}


def test_a_warm_up_that_fails_leaves_no_thread_behind(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())

    def fail(self: Any, works: Any) -> Any:
        raise EngineError("the engine broke")

    monkeypatch.setattr(Answering, "answer_turns", fail)
    with pytest.raises(EngineError, match="the engine broke"):
        Pipeline.load(engine, device="cpu", warm_up=True)
    assert set(threading.enumerate()) <= before
