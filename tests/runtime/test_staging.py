"""Frames reach the GPU as they were, whatever happens to their memory meanwhile."""

from __future__ import annotations

import pytest
import torch

from runtime.staging import Upload

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")


def test_on_a_cpu_frames_stay_where_they_are() -> None:
    frames = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert Upload(torch.device("cpu"))(frames).take() is frames


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
