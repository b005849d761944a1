"""A video that nobody waits for any more is not read to its end: asked for every packet and frame, and not timed.

The video is one group of pictures, of which only the last frames are sampled: it has to be decoded from its start.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from runtime.errors import Cancelled, Closed, DeadlineExceeded
from runtime.pipeline import Pipeline
from runtime.service import answering
from runtime.service.scheduler import UnwantedError
from runtime.video import load_clip
from tests.warm import WarmPopen

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "What happens?"
FRAMES = 240
LONG = 60.0  # seconds until a test that hangs fails


@pytest.fixture(scope="module")
def long_group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 of one keyframe: 240 frames of 64x48."""
    path = tmp_path_factory.mktemp("videos") / "long.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 100_000
        for index in range(FRAMES):
            image = np.full((48, 64, 3), index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


class Reading:
    """Counts the checks of a reading, and stops at one of them until it is let go."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at, self.checks = stop_at, 0
        self.there, self.go, self.through = threading.Event(), threading.Event(), threading.Event()
        self.error: BaseException | None = None

    def __call__(self, *args: Any, check: Callable[[], None], **how: Any) -> Any:
        def counted() -> None:
            self.checks += 1
            if self.checks == self.stop_at:
                self.there.set()
                assert self.go.wait(LONG)
            check()

        try:
            return load_clip(*args, check=counted, **how)
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.through.set()


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reading]:
    made = Reading(stop_at=FRAMES + 20)  # the packets were read, and some frames are decoded
    monkeypatch.setattr(answering, "load_clip", made)
    yield made
    made.go.set()


@pytest.fixture
def opened(engine: Path) -> Iterator[Pipeline]:
    made = Pipeline.load(engine, device="cpu", waiting=0)
    yield made
    made._scheduler.abort(LONG)


def ends_at_the_next_check(reading: Reading) -> None:
    reading.go.set()
    assert reading.through.wait(LONG)
    assert isinstance(reading.error, UnwantedError)
    assert reading.checks == reading.stop_at


def test_a_video_that_is_wanted_is_read_to_its_end(opened: Pipeline, reading: Reading, long_group: Path) -> None:
    reading.go.set()
    assert opened.ask(long_group, QUESTION, max_new_tokens=1).tokens
    assert reading.checks >= 2 * FRAMES
    assert reading.error is None


@pytest.mark.parametrize("how", ["cancel", "left", "dropped", "generator"])
def test_a_request_that_nobody_wants(opened: Pipeline, reading: Reading, long_group: Path, how: str) -> None:
    request = opened.submit(long_group, QUESTION)
    job = request._job
    assert reading.there.wait(LONG)
    if how == "cancel":
        request.cancel()
    elif how == "left":
        with request:
            pass
    elif how == "dropped":
        del request
        gc.collect()
    else:
        job.abandon()  # what closing a stream does
    ends_at_the_next_check(reading)
    reading.stop_at = 0
    assert opened.ask(long_group, QUESTION, max_new_tokens=1).tokens  # there is one place, and it is free
    with pytest.raises(Cancelled):
        job.last(LONG)


def test_a_deadline(opened: Pipeline, reading: Reading, long_group: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="being prepared"):
        opened.ask(long_group, QUESTION, deadline=0.5)
    ends_at_the_next_check(reading)


def test_a_deadline_that_nobody_waits_for(opened: Pipeline, reading: Reading, long_group: Path) -> None:
    """The reading itself sees it, though no caller looks."""
    now = [0.0]
    opened._scheduler._clock = lambda: now[0]
    request = opened.submit(long_group, QUESTION, deadline=LONG)
    assert reading.there.wait(LONG)
    now[0] = LONG
    ends_at_the_next_check(reading)
    with pytest.raises(DeadlineExceeded, match="being prepared"):
        request.result(LONG)


@pytest.mark.parametrize("how", ["close", "left by an error", "collected", "exit"])
def test_a_pipeline_that_ends(
    opened: Pipeline, reading: Reading, long_group: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = opened.submit(long_group, QUESTION)
    assert reading.there.wait(LONG)
    scheduler = opened._scheduler

    def leave() -> None:
        with contextlib.suppress(ZeroDivisionError), opened:
            raise ZeroDivisionError

    ends: dict[str, Callable[[], None]] = {
        "close": opened.close,
        "left by an error": leave,
        "collected": scheduler.abandon,
        "exit": lambda: scheduler.abort(LONG),
    }
    ending = threading.Thread(target=ends[how], daemon=True)
    ending.start()
    while not (request._job._ended or scheduler._abandoned):
        threading.Event().wait(0.001)
    ends_at_the_next_check(reading)
    ending.join(LONG)
    assert not ending.is_alive()
    with pytest.raises(Closed):
        request.result(LONG)
    for worker in scheduler._workers:
        worker.join(LONG)
        assert not worker.is_alive()


def test_watching_is_ended_too(opened: Pipeline, reading: Reading, long_group: Path) -> None:
    with pytest.raises(DeadlineExceeded):
        opened.watch(long_group, deadline=0.5)
    ends_at_the_next_check(reading)


INTERRUPTED = """
import sys, threading, time
from runtime.service import answering
from runtime.pipeline import Pipeline
from runtime.video import load_clip
from tests.warm import WarmPopen

def slow(*args, check, **how):
    def counted():
        print("reading", flush=True)
        time.sleep(0.01)
        check()
    while True:  # a video without an end
        load_clip(*args, check=counted, **how)

answering.load_clip = slow
with Pipeline.load(sys.argv[1], device="cpu") as pipeline:
    pipeline.ask(sys.argv[2], "What happens?")
"""


def test_ctrl_c_while_a_video_is_read(engine: Path, long_group: Path) -> None:
    words = [sys.executable, "-c", INTERRUPTED, str(engine), str(long_group)]
    with WarmPopen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "reading\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=LONG)
    assert child.returncode != 0
    assert "KeyboardInterrupt" in err
