"""Dense labels of frames: what is learned from is what a pixel-by-pixel count finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from builder.micro import see
from builder.micro.labels import (
    CELL_WORDS,
    COLOUR_NAMES,
    IGNORE,
    LOOKS,
    PATCH,
    FrameLabels,
    frame_labels,
    object_cells,
    pooling_matrix,
)
from earlytom.families.llava_onevision import pool
from earlytom.micro.data import labelled_clip
from earlytom.micro.data.render import DOT, NOBODY, render
from earlytom.micro.data.scene import COLOURS, DIGITS, DOT_RADIUS, FRAMES, SHAPES, SIDE, Scene
from earlytom.micro.data.splits import draw

CLIPS = 6
SIDE_PATCHES = SIDE // PATCH
PATCHES, CELLS = SIDE_PATCHES**2, 25
TIMES = np.array([0, 6, 9, 15])


class Member:
    """One object of a scene at one time."""

    def __init__(self, scene: Scene, who: int, time: int) -> None:
        self.digit: int | None = None
        if who == DOT:
            assert scene.dot is not None
            self.colour, self.look, self.radius = scene.dot.colour, "dot", DOT_RADIUS
            self.x, self.y = scene.dot.x, scene.dot.y
            return
        shape = scene.shapes[who]
        self.colour = shape.later_colour if scene.cut is not None and time >= scene.cut else shape.colour
        self.look, self.radius = shape.shape, shape.radius
        self.x, self.y = (
            float(at[time]) + step * (time - 7.5) for at, step in zip((shape.x, shape.y), scene.drift, strict=True)
        )
        if shape.digit_first <= time < shape.digit_last:
            self.digit = shape.digit

    def written(self, row: int, column: int) -> float:
        """The part of its digit's box of 5 x 7 that lies in a patch."""
        if self.digit is None:
            return 0.0
        share = 1.0
        for centre, size, patch in ((self.x, 5, column), (self.y, 7, row)):
            low, high = max(centre - size / 2, patch * PATCH - 0.5), min(centre + size / 2, patch * PATCH + PATCH - 0.5)
            share *= max(high - low, 0) / size
        return share


def everybody(scene: Scene) -> list[int]:
    return [*range(len(scene.shapes)), *([] if scene.dot is None else [DOT])]


def counted(owner: NDArray[np.int8], who: int, row: int, column: int) -> int:
    """Pixels of a patch that somebody owns."""
    patch = owner[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    return sum(pixel == who for pixel in patch.flatten().tolist())


@pytest.fixture(scope="module")
def cases() -> list[tuple[Scene, NDArray[np.int8], FrameLabels]]:
    made = []
    for index in range(CLIPS):
        drawn, _, random = draw("train", index)
        scene = see.with_more_digits(drawn, random)
        owner = render(scene, random, TIMES)[1]
        made.append((scene, owner, frame_labels(scene, owner, TIMES)))
    assert len({scene.dot is None for scene, *_ in made}) == len({scene.cut is None for scene, *_ in made}) == 2
    return made


def test_the_words_name_what_there_is() -> None:
    assert (*COLOURS, *SHAPES, "dot", *map(str, DIGITS)) == CELL_WORDS


def test_shapes_and_types(cases: Any) -> None:
    count = len(TIMES)
    expected = {
        "colour": ((count, PATCHES), np.int64),
        "look": ((count, PATCHES), np.int64),
        "digit": ((count, PATCHES), np.int64),
        "offset": ((count, PATCHES, 3), np.float32),
        "words": ((count, CELLS, len(CELL_WORDS)), np.float32),
        "place": ((count, CELLS, 3), np.float32),
        "present": ((count, len(COLOURS) * len(LOOKS)), np.float32),
    }
    for _, _, labels in cases:
        assert {name: (value.shape, value.dtype) for name, value in vars(labels).items()} == expected


def test_patches_are_labelled_as_a_count_of_their_pixels_says(cases: Any) -> None:
    kinds = {"shown": 0, "none": 0, "unclear": 0, "digit": 0, "part of a digit": 0}
    for scene, owner, labels in cases:
        for at, time in enumerate(TIMES):
            members = {who: Member(scene, who, int(time)) for who in everybody(scene)}
            for patch in range(PATCHES):
                row, column = divmod(patch, SIDE_PATCHES)
                pixels = {who: counted(owner[at], who, row, column) for who in members}
                said = [int(getattr(labels, name)[at, patch]) for name in ("colour", "look", "digit")]
                largest = max(pixels, key=lambda who: pixels[who])
                if pixels[largest] >= 8:
                    member = members[largest]
                    digit = len(DIGITS)
                    if member.digit is not None:
                        enough = member.written(row, column) >= 0.2
                        digit = DIGITS.index(member.digit) if enough else IGNORE
                        kinds["digit" if enough else "part of a digit"] += 1
                    assert said == [COLOUR_NAMES.index(member.colour), LOOKS.index(member.look), digit]
                    centre = (column * PATCH + 3.5, row * PATCH + 3.5)
                    offset = np.array([member.x - centre[0], member.y - centre[1], member.radius]) / 16
                    np.testing.assert_allclose(labels.offset[at, patch], offset, atol=1e-6)
                    kinds["shown"] += 1
                elif sum(pixels.values()) <= 2:
                    assert said == [len(COLOUR_NAMES), len(LOOKS), len(DIGITS)]
                    kinds["none"] += 1
                else:
                    assert said == [IGNORE] * 3
                    kinds["unclear"] += 1
    assert min(kinds.values()) > 0  # every case came up
    assert kinds["none"] > kinds["shown"] > kinds["unclear"]


def test_cells_are_labelled_as_the_model_pools_patches(cases: Any) -> None:
    found = {0.0: 0, 1.0: 0}
    unclear = 0
    for scene, owner, labels in cases:
        for at, time in enumerate(TIMES):
            members = {who: Member(scene, who, int(time)) for who in everybody(scene)}
            places = [divmod(patch, SIDE_PATCHES) for patch in range(PATCHES)]
            strength = np.zeros((CELLS, len(CELL_WORDS)))
            parts = {}
            for who, member in members.items():
                covered = [counted(owner[at], who, *place) / PATCH**2 for place in places]
                parts[who] = pooled(covered)
                digits = 0.7 * pooled([member.written(*place) for place in places])
                said = [(member.colour, parts[who]), (member.look, parts[who])]
                for word, part in [*said, *([] if member.digit is None else [(str(member.digit), digits)])]:
                    column = CELL_WORDS.index(word)
                    strength[:, column] = np.maximum(strength[:, column], part)
            expected = np.where(strength >= 0.09, 1.0, np.where(strength <= 0.025, 0.0, np.nan))
            decided = (abs(strength - 0.09) > 1e-6) & (abs(strength - 0.025) > 1e-6)  # else rounding says
            np.testing.assert_array_equal(labels.words[at][decided], expected[decided])
            unclear += int(np.isnan(expected).sum())
            for value in found:
                found[value] += int((expected == value).sum())
            for cell in range(CELLS):
                who = max(parts, key=lambda who: parts[who][cell])
                if parts[who][cell] >= 0.09 + 1e-6:
                    place = np.array([members[who].x, members[who].y, members[who].radius]) / SIDE
                    np.testing.assert_allclose(labels.place[at, cell], place, atol=1e-6)
                elif parts[who][cell] < 0.09 - 1e-6:
                    assert np.isnan(labels.place[at, cell]).all()
    assert found[0.0] > 10 * found[1.0] > unclear > 0


def pooled(patches: list[float]) -> NDArray[np.float64]:
    """[25]: what the model's own pooling makes of a value for each patch."""
    return pool(torch.tensor(patches, dtype=torch.float64)[None, :, None])[0, :, 0].numpy()


def test_the_pairs_of_a_frame_are_those_of_which_enough_is_seen(cases: Any) -> None:
    for scene, owner, labels in cases:
        for at, time in enumerate(TIMES):
            expected = {
                (member.colour, member.look)
                for who in everybody(scene)
                if (owner[at] == who).sum() > 0.4 * PATCH**2
                for member in [Member(scene, who, int(time))]
            }
            present = labels.present[at].reshape(len(COLOURS), len(LOOKS))
            assert {(COLOUR_NAMES[colour], LOOKS[look]) for colour, look in np.argwhere(present)} == expected
            assert set(np.unique(present)) <= {0.0, 1.0}


def test_a_frame_without_anybody_shows_nothing_at_all() -> None:
    """Nor does a clip without a dot show one that nobody drew."""
    nobody = np.full((2, SIDE, SIDE), NOBODY, np.int8)
    for scene in (labelled_clip("train", 0, times=TIMES).scene, Scene((), None, None, (0.0, 0.0))):
        empty = replace(scene, shapes=tuple(replace(shape, digit_last=0) for shape in scene.shapes), dot=None)
        labels = frame_labels(empty, nobody, np.array([0, 15]))
        assert (labels.look == len(LOOKS)).all()
        assert (labels.digit == len(DIGITS)).all()
        assert (labels.words == 0).all()
        assert (labels.present == 0).all()
        assert np.isnan(labels.place).all()


def test_labels_follow_the_frame_number_and_not_the_place_in_the_batch() -> None:
    whole = labelled_clip("train", 1)
    labels = frame_labels(whole.scene, whole.owner, np.arange(FRAMES))
    times = np.array([13, 2, 7])
    some = frame_labels(whole.scene, whole.owner[times], times)
    for name, value in vars(some).items():
        np.testing.assert_array_equal(value, getattr(labels, name)[times])
    other = frame_labels(whole.scene, whole.owner[times], times[::-1].copy())
    assert not np.array_equal(other.offset, some.offset)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4))
def test_the_pooling_matrix_is_the_pooling_of_the_encoder(seed: int, frames: int, width: int) -> None:
    features = torch.randn(frames, PATCHES, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = torch.from_numpy(pooling_matrix())
    torch.testing.assert_close(matrix @ features, pool(features))
    assert not torch.allclose(matrix.flip(1) @ features, pool(features))


def test_the_pooling_matrix_takes_averages() -> None:
    matrix = pooling_matrix()
    assert matrix.shape == (CELLS, PATCHES)
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(1), 1)
    assert (matrix > 0).sum(1).max() == 4


def test_a_batch_of_the_first_stage_has_labels_for_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(see, "CLIPS", 2)
    monkeypatch.setattr(see, "FRAMES_A_CLIP", 3)
    batch, same, other = see.make_batch(4), see.make_batch(4), see.make_batch(5)
    assert set(batch) == {*FrameLabels.__dataclass_fields__, "frames"}
    assert all(len(tensor) == 6 for tensor in batch.values())
    assert batch["frames"].dtype == torch.uint8
    assert all(torch.equal(batch[name].nan_to_num(9.0), same[name].nan_to_num(9.0)) for name in batch)
    assert not torch.equal(batch["frames"], other["frames"])
    assert (batch["digit"] < len(DIGITS)).any()  # nearly all of those who can wear a digit do


def test_more_digits_are_worn_by_those_that_can_carry_them() -> None:
    random = np.random.default_rng(0)
    more = before = 0
    for index in range(40):
        scene = labelled_clip("train", index, times=np.array([0])).scene
        dressed = see.with_more_digits(scene, random)
        for one, other in zip(scene.shapes, dressed.shapes, strict=True):
            before += one.digit is not None
            more += other.digit is not None
            if other.digit is not None:
                assert other.shape in ("circle", "square")
                assert other.digit in DIGITS
            if one.shape not in ("circle", "square"):
                assert other is one
    assert more > 1.5 * before


def test_a_cell_shows_an_object_that_covers_nine_percent_of_it() -> None:
    owner = np.full((3, SIDE, SIDE), NOBODY, np.int8)
    owner[1, :24, :24] = 0  # a shape in a corner
    owner[2, 34:38, 34:38] = DOT  # 16 pixels in the middle of the frame
    shown = object_cells(owner).reshape(3, 5, 5)
    assert not shown[0].any()
    assert shown[1, 0, 0]
    assert not shown[1, 3:].any()
    assert not shown[1, :, 3:].any()
    assert shown[2, 2, 2]
    assert shown[2].sum() == 1


def test_one_token_in_six_of_a_test_clip_shows_an_object() -> None:
    shares = [object_cells(labelled_clip("test", index).owner).mean() for index in range(20)]
    assert 0.1 < np.mean(shares) < 0.25
