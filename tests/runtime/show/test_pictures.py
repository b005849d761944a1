"""Pictures of an answer: what is drawn over frames, and files that hold it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from earlytom.errors import UserError
from runtime.show.colours import rgb
from runtime.show.figure import check_picture
from runtime.show.frames import shade
from runtime.show.kept import KeptCells
from runtime.show.pictures import Story, clip_frames, draw_image


def story(frames: int = 3, said: tuple[tuple[str, str], ...] = (("What?", "A $5 <b>ball</b> \u7403 $"),)) -> Story:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 3, 24, 36), np.uint8)
    kept = KeptCells.of([0, 5, 6 * frames - 1], np.eye(frames).tolist(), (2, 3))
    return Story(pixels, kept, said, (("vision", 0.03), ("prefill", 0.01)), "3 of 18 tokens")


def test_kept_cells_are_framed_and_the_others_dimmed() -> None:
    frame = np.zeros((20, 30, 3), np.uint8)
    found = shade(frame, {0, 5}, (2, 3))
    assert found[0, 0].tolist() == found[10, 29].tolist() == list(rgb("accent"))
    assert found[5, 5].tolist() == [0, 0, 0]
    assert found[5, 15].tolist() == [round(0.74 * part) for part in rgb("paper")]
    assert not frame.any()  # a copy


def test_a_frame_whose_cells_are_all_kept_has_its_pixels() -> None:
    """Negative control: only the lines between cells are drawn."""
    frame = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    found = shade(frame, range(4), (2, 2))
    assert np.array_equal(found[2:18, 2:18], frame[2:18, 2:18])


@pytest.mark.parametrize("frames", [1, 3, 20])
@pytest.mark.parametrize("texts", [0, 1, 40])
def test_an_image_holds_its_frames(frames: int, texts: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("matplotlib")
    image_library = pytest.importorskip("PIL.Image")
    draw_image(story(frames, (("long " * texts, "words " * texts), ("?", "!"))), tmp_path / "a.png")
    width, height = image_library.open(tmp_path / "a.png").size
    assert width == 960
    assert 200 < height < 2000
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


def test_a_clip_has_every_frame_once() -> None:
    pytest.importorskip("matplotlib")
    found = list(clip_frames(story()))
    assert [frame.shape for frame in found] == [(540, 960, 3)] * 3
    assert len({frame.tobytes() for frame in found}) == 3


@pytest.mark.parametrize(
    ("name", "word"), [("a.gif", ".png or .mp4"), ("a", ".png or .mp4"), ("nowhere/a.png", "its folder does not exist")]
)
def test_what_cannot_be_written_is_refused(name: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        check_picture(tmp_path / name, "--picture")
