"""`python -m runtime.bench --service`: every figure it shows is of requests that were answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from runtime import bench, cli
from runtime.measure.service import Service
from runtime.pipeline import Pipeline
from runtime.vision.chunked import ChunkedVision
from runtime.vision.live import LiveClip
from tests.processes import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def chunked(build_engine: Callable[..., Path]) -> Path:
    return build_engine(*["--frames", "8", "--chunk", "2", "--ratio", "0.3", "--fp32", "--no-verify"])


@pytest.fixture(scope="module")
def service(chunked: Path, drawn_clip: Path, one_thread: None) -> Iterator[Service]:
    with Pipeline.load(chunked, device="cpu") as pipeline:
        yield Service(pipeline, drawn_clip, "Why?", 3)


def test_the_command(chunked: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--service --engine {chunked} --video {drawn_clip} --device cpu --warmup 1 --repeats 2 --requests 3"
    assert cli.run(bench.main, [*words.split(), "--concurrency", "1,2", "--max-new-tokens", "3"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    fresh, ready, watched = (record["service"][name] for name in ("fresh", "ready", "watched"))
    assert min(fresh[stage] for stage in ("decode", "preprocess", "vision", "prefill")) > 0
    assert (ready["decode"], watched["decode"], watched["vision"]) == (0, 0, 0)
    assert min(ready["vision"], watched["prefill"]) > 0
    assert record["watched_bytes"] > 0
    assert record["live"]["after_last_frame"] < record["live"]["first_token_after_last_frame"]
    assert 0 <= record["live"]["share_before"] <= 0.75  # how far the encoder came is the machine's affair
    assert [(one["callers"], one["requests"]) for one in record["callers"]] == [(1, 3), (2, 3)]
    assert all(one["requests_per_second"] > 0 for one in record["callers"])
    text = "\n".join(lines)
    assert all(word in text for word in ("fresh", "ready", "watched", "live, a frame every", "callers"))


def test_all_kinds_of_requests_get_the_same_answer(service: Service) -> None:
    fresh = service.fresh()
    assert fresh.timings.decode > 0
    _, watched, kept = service.watched(2)
    assert {answer.tokens for answer in (service.ready(), *watched)} == {fresh.tokens}
    assert kept > 0
    assert len(service.pipeline.watched) == 0  # and nothing stays behind


def test_live_frames_are_encoded_while_others_come(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LiveClip.push

    def push(clip: LiveClip, frames: Tensor) -> None:
        plain(clip, frames)
        assert clip._worker is not None
        clip._worker.submit(int).result(HANG_SECONDS)  # what was pushed is encoded, however slow the machine

    monkeypatch.setattr(LiveClip, "push", push)
    vision = service.pipeline.vision
    assert isinstance(vision, ChunkedVision)
    found = service.live(vision, 2)
    assert (found["chunk"], found["share_before"]) == (2, 0.75)  # of 8 frames all but the last chunk
    assert found["after_last_frame"] < found["first_token_after_last_frame"]


def test_so_many_callers_ask_so_often(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = service.fresh
    monkeypatch.setattr(service, "fresh", lambda: asked.append(1) or plain())
    found = service.callers(3, 7)
    assert len(asked) == 7
    assert found["requests_per_second"] > 0
    assert found["waiting"]["p99"] <= found["first_token"]["p99"]
