"""One backend for each of several frame counts: which one runs, what is refused, and what is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom.errors import UserError
from runtime.errors import EngineError
from runtime.video import clip_from_frames, frames_for, load_clip
from runtime.vision import Encoded
from runtime.vision.by_frames import ByFrames


class Recorded:
    """A backend that tells what it was asked, and answers with its number of frames."""

    name = "recorded"
    device = torch.device("cpu")

    def __init__(self, frames: int, batch: int = 1) -> None:
        self.frames, self.batch = frames, batch
        self.calls: list[int] = []
        self.closed = 0

    def encode(self, frames: Tensor) -> Encoded:
        assert frames.shape[-4] == self.frames
        self.calls.append(1)
        return self._answer(frames[..., 0, 0, 0, 0])

    def encode_several(self, clips: Sequence[Tensor]) -> list[Encoded]:
        assert {clip.shape[-4] for clip in clips} == {self.frames}
        self.calls.append(len(clips))
        return [self._answer(clip[0, 0, 0, 0]) for clip in clips]

    def _answer(self, mark: Tensor) -> Encoded:
        return Encoded(torch.full((1,), self.frames), mark, *[mark] * 3)

    def close(self) -> None:
        self.closed += 1


def clip(frames: int, mark: int = 0) -> Tensor:
    return torch.full((frames, 3, 4, 4), mark, dtype=torch.uint8)


def backends(batch: int = 1) -> dict[int, Any]:
    return {frames: Recorded(frames, batch) for frames in (16, 8, 32)}


@pytest.mark.parametrize("frames", [8, 16, 32])
def test_a_call_runs_the_backend_for_its_frames(frames: int) -> None:
    vision = ByFrames(each := backends())
    assert (vision.name, vision.batch, vision.counts) == ("recorded", 1, (8, 16, 32))
    assert vision.encode(clip(frames))[0].tolist() == [frames]
    assert {count: len(backend.calls) for count, backend in each.items() if backend.calls} == {frames: 1}
    batched = ByFrames(backends(2))
    assert batched.encode(clip(frames).expand(2, -1, -1, -1, -1))[0].tolist() == [frames]


@pytest.mark.parametrize("shape", [(10, 3, 4, 4), (3, 4, 4), (0, 3, 4, 4), (8,), (16, 4)])
def test_other_counts_are_refused(shape: tuple[int, ...]) -> None:
    vision = ByFrames(backends(2))
    with pytest.raises(EngineError, match=rf"takes clips of 8 or 16 or 32 frames, got frames \{list(shape)}"):
        vision.encode(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(EngineError, match="takes clips of 8 or 16 or 32 frames"):
        vision.encode_several([clip(8), torch.zeros(shape, dtype=torch.uint8)])


def test_clips_of_as_many_frames_run_together_and_come_back_in_order() -> None:
    vision = ByFrames(each := backends(4))
    clips = [clip(16, 1), clip(8, 2), clip(16, 3), clip(32, 4)]
    found = vision.encode_several(clips)
    assert [(int(tokens), int(mark)) for tokens, mark, *_ in found] == [(16, 1), (8, 2), (16, 3), (32, 4)]
    assert {count: backend.calls for count, backend in each.items()} == {16: [2], 8: [1], 32: [1]}
    for wrong in ([], [clip(8)] * 5):
        with pytest.raises(EngineError, match=f"takes 1 to 4 clips at once, got {len(wrong)}"):
            vision.encode_several(wrong)


def test_closing_closes_all() -> None:
    vision = ByFrames(each := backends())
    vision.close()
    assert [backend.closed for backend in each.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("source", "wanted"), [(2, 8), (8, 8), (9, 16), (10, 16), (16, 16), (17, 32), (32, 32), (33, 32), (500, 32)]
)
def test_the_count_that_suits_the_video(source: int, wanted: int) -> None:
    counts = (8, 16, 32)
    assert frames_for(source, counts) == frames_for(source, counts[::-1]) == wanted
    assert frames_for(source, 5) == 5
    pixels = torch.arange(source, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    made = clip_from_frames(pixels, counts, (4, 4))
    assert len(made.frames) == wanted
    assert torch.equal(made.frames, clip_from_frames(pixels, wanted, (4, 4)).frames)


@pytest.mark.parametrize("frames", [(), (8, 0), (8, "16"), [True, 2], "8"])
def test_counts_that_are_none_are_refused(frames: Any) -> None:
    with pytest.raises(UserError, match=r"frames is .*; give a whole number of frames of at least 1"):
        clip_from_frames(clip(9), frames, (4, 4))


def test_a_file_gets_the_count_that_suits_it(tmp_path: Any) -> None:
    from runtime.drawing.clips import draw_clip

    path = draw_clip(tmp_path / "drawn.mp4")
    length = load_clip(path, 2, (32, 32)).source_frames
    for counts, wanted in (
        ((2, length, length + 5), length),
        ((2, length - 1), length - 1),
        ((length + 1, length + 9), length + 1),
    ):
        made = load_clip(path, counts, (32, 32))
        assert len(made.frames) == len(made.timestamps) == wanted
        assert torch.equal(made.frames, load_clip(path, wanted, (32, 32)).frames)
