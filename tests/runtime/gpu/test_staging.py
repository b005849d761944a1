"""Frames reach the GPU as they were, whatever happens to their memory meanwhile."""

from __future__ import annotations

import pytest
import torch

from runtime.gpu.staging import Arriving, Upload, as_of_now

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")


def test_on_a_cpu_frames_stay_where_they_are() -> None:
    frames = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert Upload(torch.device("cpu"))(frames).take() is frames


def test_on_a_cpu_nobody_waits_for_frames() -> None:
    assert as_of_now(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)) is None


def test_who_takes_frames_waits_for_who_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of streams: recorded where they were given, waited for and remembered where they are taken."""
    told: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: Event) -> None:
            told.append(("waits", self.name))

    class Event:
        def record(self, stream: Stream) -> None:
            told.append(("recorded", stream.name))

    class Frames:
        is_cuda, device = True, "cuda:0"

        def record_stream(self, stream: Stream) -> None:
            told.append(("used", stream.name))

    streams = iter([Stream("the caller's"), Stream("the worker's")])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
    given = as_of_now(Frames())  # type: ignore[arg-type]
    assert isinstance(given, Arriving)
    given.take()
    assert told == [("recorded", "the caller's"), ("waits", "the worker's"), ("used", "the worker's")]


@pytest.mark.gpu
@no_gpu
def test_frames_that_are_still_being_made_are_waited_for() -> None:
    frames = torch.zeros(8, 3, 64, 64, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    making = torch.cuda.Stream()
    with torch.cuda.stream(making):
        torch.cuda._sleep(200_000_000)
        frames.fill_(7)
        given = as_of_now(frames)
    assert given is not None
    assert not making.query()  # they are still being made
    with torch.cuda.stream(torch.cuda.Stream()):
        assert int(given.take().min()) == 7


@pytest.mark.gpu
@no_gpu
def test_frames_that_are_written_over_arrive_as_they_were() -> None:
    upload, frames = Upload(torch.device("cuda")), torch.zeros(8, 3, 384, 384, dtype=torch.uint8)
    arriving = []
    for value in range(6):  # one pinned buffer for all, and the next copy starts while this one is under way
        arriving.append(upload(frames.fill_(value)))
    with torch.cuda.stream(torch.cuda.Stream()):
        assert [int(one.take().max()) for one in arriving] == list(range(6))
        assert all(int(one.frames.min()) == int(one.frames.max()) for one in arriving)


@pytest.mark.gpu
@no_gpu
def test_taking_frames_waits_for_nothing() -> None:
    upload, frames = Upload(torch.device("cuda")), torch.ones(8, 3, 384, 384, dtype=torch.uint8)
    arriving = upload(frames)
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = arriving.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(taken.sum()) == frames.numel()


@pytest.mark.gpu
@no_gpu
def test_frames_on_the_device_stay_theirs() -> None:
    frames = torch.ones(2, 3, 8, 8, dtype=torch.uint8, device="cuda")
    assert Upload(torch.device("cuda"))(frames).take() is frames
