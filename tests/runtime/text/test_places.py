"""Positions and bias of whole prompts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from earlytom.families import Closings
from runtime.text.places import Placing, fitted, places
from runtime.text.prompt import Prompt
from tests.runtime.gpu.recorded_graph import no_waiting


def test_two_of_six_tokens_between_texts() -> None:
    positions, bias = places(3, torch.tensor([1, 4]), torch.tensor([0.5, -1.0]), 6, 2)
    assert positions.tolist() == [0, 1, 2, 4, 7, 9, 10, 11]
    assert bias.tolist() == [0, 0, 0, 0.5, -1.0, 0, 0, 0]
    assert (positions.dtype, bias.dtype) == (torch.int64, torch.float32)


def test_nothing_before_nothing_after_and_no_token() -> None:
    positions, bias = places(0, torch.tensor([2]), torch.tensor([0.5]), 3, 0)
    assert (positions.tolist(), bias.tolist()) == ([2, 3], [0.5, 0])
    positions, bias = places(2, torch.empty(0, dtype=torch.int64), torch.empty(0), 5, 1)
    assert (positions.tolist(), bias.tolist()) == ([0, 1, 7, 8], [0, 0, 0, 0])


@given(data=st.data())
def test_kept_tokens_and_text_stand_as_in_the_whole_prompt(data: st.DataObject) -> None:
    full, before, after = (data.draw(st.integers(low, 30)) for low in (1, 0, 0))
    place = torch.tensor(data.draw(st.lists(st.integers(0, full - 1), min_size=1, max_size=full, unique=True)))
    weights = torch.rand(len(place))
    with no_waiting():
        positions, bias = places(before, place, weights, full, after)
    whole, _ = places(before, torch.arange(full), torch.zeros(full), full, after)
    assert whole.tolist() == list(range(before + full + 1 + after))  # all tokens: one after the other
    kept = torch.cat((torch.arange(before), before + place, torch.arange(before + full, len(whole))))
    assert torch.equal(positions, whole[kept])
    assert torch.equal(bias[before : before + len(place)], weights)
    assert int((bias != 0).sum()) == int((weights != 0).sum())
    first, weighed = places(before, place, weights, full, 0)  # a prompt that is read up to the newline
    assert torch.equal(first, positions[: len(first)])
    assert torch.equal(weighed, bias[: len(first)])
    assert torch.equal(positions[len(first) :], first[-1] + 1 + torch.arange(after))  # as the decoder goes on


@given(full=st.integers(1, 40), most=st.integers(1, 40), closing=st.integers(0, 1))
def test_a_question_about_a_video_that_was_read_goes_on_where_it_would_have(full: int, most: int, closing: int) -> None:
    placing, place = Placing(original=True, most=most), torch.arange(0, full, 3)
    words = Prompt((1, 2), (3, 4, 5), 9)
    whole, read = (
        placing.of_prompt(2, place, torch.zeros(len(place)), full, after, closing)["positions"] for after in (3, 0)
    )
    begin = placing.after(words, 1, Closings("video" if closing else None, (1, full)))
    assert begin is not None
    assert torch.equal(torch.cat([read, begin + torch.arange(3)]), whole)


@given(full=st.integers(1, 40), most=st.integers(1, 40), before=st.integers(0, 5), after=st.integers(0, 5))
def test_a_long_video_is_fitted_into_the_positions_of_a_shorter_one(
    full: int, most: int, before: int, after: int
) -> None:
    place = torch.arange(full)
    with no_waiting():
        told = Placing(original=True, most=most).of_prompt(before, place, torch.zeros(full), full, after)
    video = told["positions"][before : before + full] - before
    span = min(full, most)
    assert torch.equal(video, place * span // full)
    assert set(video.tolist()) == set(range(span))  # no position is left empty
    assert told["positions"][before + full :].tolist() == list(range(before + span, before + span + 1 + after))
    if full <= most:
        assert torch.equal(video, place)
    assert torch.equal(fitted(place, full, full + 3), place)
