"""A video that is asked about while it comes answers as the whole video does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from earlytom import UserError
from runtime.pipeline import Pipeline
from runtime.video import load_clip

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION, OTHER = "What happens?", "How many balls are there?"
TOKENS = 16


@pytest.fixture(scope="module")
def pipeline(chunked_engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(chunked_engine, device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def frames(drawn_clip: Path) -> Tensor:
    """uint8 [30, 3, 120, 160]."""
    return load_clip(drawn_clip, 30, (120, 160)).frames


@pytest.mark.parametrize("total", [30, None])
def test_it_answers_as_the_whole_video_does(pipeline: Pipeline, frames: Tensor, total: int | None) -> None:
    wanted = pipeline.ask(frames, QUESTION, max_new_tokens=TOKENS)
    assert wanted.tokens != pipeline.ask(frames.flip(0), QUESTION, max_new_tokens=TOKENS).tokens
    with pipeline.open_stream(total=total) as video:
        assert video.timings is None
        for frame in frames:
            video.push(frame)
        found = video.ask(QUESTION, max_new_tokens=TOKENS)
        assert (found.tokens, found.visual_tokens) == (wanted.tokens, wanted.visual_tokens)
        assert (
            video.ask(OTHER, max_new_tokens=TOKENS).tokens == pipeline.ask(frames, OTHER, max_new_tokens=TOKENS).tokens
        )
        deltas = list(video.stream(QUESTION, max_new_tokens=TOKENS))
        assert tuple(delta.token for delta in deltas[:-1]) == wanted.tokens
        assert video.timings is not None
        assert video.timings.after_last_frame > 0
        with video.watch() as watched:
            assert watched.ask(QUESTION, max_new_tokens=TOKENS).tokens == wanted.tokens


def test_two_come_at_once_while_others_are_answered(pipeline: Pipeline, frames: Tensor) -> None:
    wanted = [pipeline.ask(each, QUESTION, max_new_tokens=TOKENS).tokens for each in (frames, frames.flip(0))]
    with pipeline.open_stream(total=30) as one, pipeline.open_stream(total=30) as other:
        for frame, last in zip(frames, frames.flip(0), strict=True):
            one.push(frame)
            other.push(last)
        assert pipeline.ask(frames, QUESTION, max_new_tokens=TOKENS).tokens == wanted[0]
        assert [video.ask(QUESTION, max_new_tokens=TOKENS).tokens for video in (one, other)] == wanted


def test_a_video_that_ends_early(pipeline: Pipeline, frames: Tensor) -> None:
    with pipeline.open_stream(total=30) as video:
        video.push(frames[:20])
        with pytest.raises(UserError, match="total is 30 frames and 20 were pushed"):
            video.ask(QUESTION)
        video.push(frames[20:])
        assert video.ask(QUESTION, max_new_tokens=TOKENS).tokens
        with pytest.raises(RuntimeError, match="finished or closed"):
            video.push(frames[0])


def test_after_it_was_closed(pipeline: Pipeline, frames: Tensor) -> None:
    video = pipeline.open_stream()
    video.push(frames[:4])
    video.close()
    video.close()
    with pytest.raises(RuntimeError, match="finished or closed"):
        video.ask(QUESTION)
