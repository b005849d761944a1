"""Videos that are asked more than once: what a fresh request answers, without what only the first has to do."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom import UserError
from runtime.decoder.eager import InnerMerge
from runtime.errors import Closed, VideoError
from runtime.pipeline import Pipeline
from runtime.video import Clip, load_clip
from tests.processes import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = ("What happens?", "How many balls are there?", "Which digit is on the circle?")
TOKENS = 16


@pytest.fixture(scope="module")
def pipeline(engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(engine, device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def clip(pipeline: Pipeline, drawn_clip: Path) -> Clip:
    return load_clip(drawn_clip, pipeline.manifest.frames, pipeline.manifest.model.preprocessing.size)


@pytest.fixture(scope="module")
def backwards(clip: Clip) -> Clip:
    return dataclasses.replace(clip, frames=clip.frames.flip(0).contiguous())


@pytest.fixture
def encoded(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every clip that the engine encodes."""
    calls: list[int] = []
    plain = pipeline.vision.encode

    def count(frames: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(frames))
        return plain(frames)

    monkeypatch.setattr(pipeline.vision, "encode", count)
    return calls


def fresh(pipeline: Pipeline, video: Any, question: str, **how: Any) -> tuple[int, ...]:
    return pipeline.ask(video, question, max_new_tokens=TOKENS, **how).tokens


def test_every_question_gets_the_answer_of_a_fresh_request(
    pipeline: Pipeline, clip: Clip, backwards: Clip, encoded: list[int]
) -> None:
    wanted = {(at, q): fresh(pipeline, video, q) for at, video in enumerate((clip, backwards)) for q in QUESTIONS}
    assert len(set(wanted.values())) > 2  # else anything would do
    encoded.clear()
    with pipeline.watch(clip) as first, pipeline.watch(backwards) as second:
        assert len(encoded) == 2
        for question in (*QUESTIONS, *reversed(QUESTIONS)):
            for at, watched in enumerate((first, second)):
                found = watched.ask(question, max_new_tokens=TOKENS)
                assert found.tokens == wanted[at, question]
                assert (found.timings.decode, found.timings.preprocess, found.timings.vision) == (0, 0, 0)
                deltas = list(watched.stream(question, max_new_tokens=TOKENS))
                assert tuple(delta.token for delta in deltas[:-1]) == wanted[at, question]
    assert len(encoded) == 2


def test_a_file_with_a_system_message(pipeline: Pipeline, drawn_clip: Path) -> None:
    system = "Answer in one word."
    wanted = fresh(pipeline, drawn_clip, QUESTIONS[0], system=system)
    assert wanted != fresh(pipeline, drawn_clip, QUESTIONS[0])
    with pipeline.watch(drawn_clip, system=system) as watched:
        assert watched.ask(QUESTIONS[0], max_new_tokens=TOKENS).tokens == wanted
        assert watched.ask(QUESTIONS[0], max_new_tokens=TOKENS, system=system).tokens == wanted
        with pytest.raises(UserError, match="those it is watched with"):
            watched.ask(QUESTIONS[0], system="Answer at length.")
        with pytest.raises(UserError, match="those it is watched with"):
            watched.ask(QUESTIONS[0], frames=16)


def test_what_had_to_go_is_read_again(engine: Path, clip: Clip, backwards: Clip) -> None:
    with Pipeline.load(engine, device="cpu") as large:
        large.watch(clip)
        one = large.watched.counters.bytes
        wanted = {at: fresh(large, video, QUESTIONS[0]) for at, video in enumerate((clip, backwards))}
    assert one > 0
    with Pipeline.load(engine, device="cpu", watch_bytes=int(1.5 * one)) as pipeline:
        first = pipeline.watch(clip)
        assert first.held
        second = pipeline.watch(backwards)
        assert (first.held, second.held) == (False, True)
        for at, watched, other in ((0, first, second), (1, second, first)) * 2:
            found = watched.ask(QUESTIONS[0], max_new_tokens=TOKENS)
            assert found.tokens == wanted[at]
            assert found.timings.vision > 0
            assert (watched.held, other.held) == (True, False)
            assert pipeline.watched.counters.bytes <= pipeline.watched.limit
        assert pipeline.watched.counters.evictions == 5
    with Pipeline.load(engine, device="cpu", watch_bytes=one - 1) as small:
        with pytest.raises(UserError, match=rf"takes {one:,} bytes and the cache holds {one - 1:,}"):
            small.watch(clip)
        assert fresh(small, clip, QUESTIONS[0]) == wanted[0]


def test_many_questions_at_once_read_it_once(pipeline: Pipeline, clip: Clip, encoded: list[int]) -> None:
    """They come while it is not there: the one that is served first reads it, and the next finds it."""
    watched = pipeline.watch(clip)
    pipeline.watched.clear()
    encoded.clear()
    wanted = {question: fresh(pipeline, clip, question) for question in QUESTIONS}
    assert len(encoded) == 3
    requests = [watched.submit(question, max_new_tokens=TOKENS) for question in (*QUESTIONS, *QUESTIONS)]
    for question, request in zip((*QUESTIONS, *QUESTIONS), requests, strict=True):
        assert request.result().tokens == wanted[question]
    assert len(encoded) == 4


def test_many_threads(pipeline: Pipeline, clip: Clip, backwards: Clip) -> None:
    wanted = {(at, q): fresh(pipeline, video, q) for at, video in enumerate((clip, backwards)) for q in QUESTIONS}
    both = [pipeline.watch(clip), pipeline.watch(backwards)]
    wrong: list[Any] = []

    def ask(at: int, question: str) -> None:
        for _ in range(3):
            found = both[at].ask(question, max_new_tokens=TOKENS).tokens
            if found != wanted[at, question]:
                wrong.append((at, question, found))

    threads = [threading.Thread(target=ask, args=key) for key in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert wrong == []


def test_closing_frees_its_memory_and_ends_it(pipeline: Pipeline, clip: Clip) -> None:
    pipeline.watched.clear()
    with pipeline.watch(clip) as watched:
        assert len(pipeline.watched) == 1
        under_way = watched.submit(QUESTIONS[0], max_new_tokens=TOKENS)
    assert len(pipeline.watched) == 0
    assert under_way.result().tokens == fresh(pipeline, clip, QUESTIONS[0])
    assert len(pipeline.watched) == 0  # nor is it put back
    watched.close()
    with pytest.raises(Closed, match="not watched any more"):
        watched.ask(QUESTIONS[0])


def test_one_that_was_let_go_makes_room_for_the_next(pipeline: Pipeline, clip: Clip, backwards: Clip) -> None:
    pipeline.watched.clear()
    watched = pipeline.watch(clip)
    evictions = pipeline.watched.counters.evictions
    del watched
    gc.collect()
    other = pipeline.watch(backwards)
    assert pipeline.watched.keys() == (other._remembered,)
    assert pipeline.watched.counters.evictions == evictions


def test_a_video_that_cannot_be_used(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="cannot be opened"):
        pipeline.watch(tmp_path / "missing.mp4")
    (tmp_path / "words.mp4").write_text("not a video")
    with pytest.raises(VideoError, match="cannot be read as a video"):
        pipeline.watch(tmp_path / "words.mp4")
    with pytest.raises(UserError, match="frames"):
        pipeline.watch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_inner_merging_needs_the_question_first(bundled_engine: Path, clip: Clip) -> None:
    with (
        Pipeline.load(bundled_engine, device="cpu", inner=InnerMerge(1)) as pipeline,
        pytest.raises(UserError, match="ranks the visual tokens by the question"),
    ):
        pipeline.watch(pipeline._core.prepare(clip.frames))


def test_a_closed_pipeline(engine: Path, clip: Clip) -> None:
    with Pipeline.load(engine, device="cpu") as pipeline:
        watched = pipeline.watch(clip)
    with pytest.raises(Closed):
        watched.ask(QUESTIONS[0])
    with pytest.raises(Closed):
        pipeline.watch(clip)


@pytest.fixture(scope="module")
def many_frames(build_engine: Callable[..., Path], talkative: Path, one_thread: None) -> Iterator[Pipeline]:
    words = f"--model {talkative} --frames 4,8 --batch 2 --ratio 0.3 --fp32 --no-verify".split()
    with Pipeline.load(build_engine(*words), device="cpu") as made:
        yield made


def test_watched_and_other_videos_go_through_an_engine_for_several_together(
    many_frames: Pipeline, clip: Clip, backwards: Clip
) -> None:
    """Encoded in one call; reading one must not disturb the tokens of the next, which the engine still holds."""
    pipeline, frames = many_frames, {"frames": 8}
    wanted = [fresh(pipeline, video.frames, QUESTIONS[0], **frames) for video in (clip, backwards)]
    watched = pipeline.watch(clip.frames, frames=8)
    for _ in range(4):
        pipeline.watched.clear()
        busy = pipeline.submit(clip.frames, QUESTIONS[1], max_new_tokens=TOKENS)  # the others come together meanwhile
        one = watched.submit(QUESTIONS[0], max_new_tokens=TOKENS)
        other = pipeline.submit(backwards.frames, QUESTIONS[0], max_new_tokens=TOKENS, frames=8)
        assert [one.result().tokens, other.result().tokens] == wanted
        busy.result()
