"""Where what closes visual tokens stands: golden cases, then what holds for any tokens that are left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom.families.closings import Closes, Closings

CELLS = (2, 3)  # P = 6
CLOSING = torch.tensor([-1.0])
POSITIONS = torch.tensor([0, 2, 3, 6, 7, 8, 10, 23])
PLACE = torch.tensor([0, 2, 3, 12, 13, 14, 16, 29])  # the second frame that is left is the third of the video


def closed(closes: Closes | None, positions: Tensor) -> list[int]:
    tokens = positions[:, None].float()
    return Closings(closes, CELLS).closed(tokens, positions, CLOSING)[:, 0].int().tolist()


@pytest.mark.parametrize(
    ("closes", "wanted"),
    [
        ("row", [0, 2, -1, 3, -1, 6, 7, 8, -1, 10, -1, 23, -1]),
        ("frame", [0, 2, 3, -1, 6, 7, 8, 10, -1, 23, -1]),
        ("video", [0, 2, 3, 6, 7, 8, 10, 23, -1]),
        (None, [0, 2, 3, 6, 7, 8, 10, 23]),
    ],
)
def test_a_row_or_a_frame_is_closed_where_a_token_of_it_is_left(closes: Closes | None, wanted: list[int]) -> None:
    assert closed(closes, POSITIONS) == wanted
    one = Closings(closes, CELLS)
    assert one.closed(POSITIONS[:, None], POSITIONS, None).shape == (8, 1)  # nothing to close with
    half = one.closed(POSITIONS[:, None].half(), POSITIONS, CLOSING.bfloat16())
    assert half.dtype == torch.float16


@pytest.mark.parametrize(
    ("closes", "wanted"),
    [
        # A row takes four positions, a frame eight; what closes the row stands in its fourth.
        ("row", [0, 2, 3, 4, 7, 16, 17, 18, 19, 21, 23, 38, 39]),
        ("frame", [0, 2, 3, 6, 14, 15, 16, 18, 20, 33, 34]),
        ("video", PLACE.tolist()),
        (None, PLACE.tolist()),
    ],
)
def test_they_stand_where_they_stood_in_the_whole_video(closes: Closes | None, wanted: list[int]) -> None:
    place, bias = Closings(closes, CELLS).placed(PLACE, torch.arange(1.0, 9.0), POSITIONS)
    assert place.tolist() == wanted
    assert bias[bias > 0].tolist() == list(range(1, 9))
    assert len(bias) == len(place)


def test_how_many_there_are_of_a_whole_video() -> None:
    found = {closes: Closings(closes, CELLS) for closes in ("row", "frame", "video", None)}
    assert {closes: one.most(24, 4) for closes, one in found.items()} == {"row": 8, "frame": 4, "video": 1, None: 0}
    assert found["row"].most(3, 4) == found["frame"].most(3, 4) == 3
    assert {closes: one.span(4) for closes, one in found.items()} == {"row": 32, "frame": 28, "video": 24, None: 24}
    assert {closes: one.behind for closes, one in found.items()} == {"row": 0, "frame": 0, "video": 1, None: 0}


@given(st.sets(st.integers(0, 23), min_size=1), st.sampled_from(["row", "frame"]))
def test_any_tokens_are_closed_as_all_of_them_are(left: set[int], closes: Closes) -> None:
    """What is left of the whole closed video, but for what closes rows and frames of which nothing is."""
    positions, whole = torch.tensor(sorted(left)), closed(closes, torch.arange(24))
    run = 3 if closes == "row" else 6
    wanted, kept = [], False
    for one in whole:
        if one >= 0 and one in left:
            wanted.append(one)
            kept = True
        elif one < 0 and kept:
            wanted.append(one)
            kept = False
    found = closed(closes, positions)
    assert found == wanted
    closings = Closings(closes, CELLS)
    ones = len({position // run for position in left})
    assert len(found) == len(left) + ones <= len(left) + closings.most(len(left), 4)
    place, _ = closings.placed(positions, torch.zeros(len(left)), positions)
    assert [whole[at] for at in place.tolist()] == found
    assert int(place.max()) < closings.span(4) == len(whole)
