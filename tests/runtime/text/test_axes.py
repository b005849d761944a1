"""Positions on three axes: those of transformers where all tokens are left, and where what is left had them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlytom.families import INTERNVL
from earlytom.micro.random_model import published_tokenizer
from earlytom.standing import FrameSpan
from runtime.checkpoint import load_tokenizer
from runtime.text.axes import following, on_axes, states_of, weights_of
from runtime.text.prompt import Prompt, build_prompt
from tests.earlytom.tiny import VIDEO_TOKEN, tiny_internvl, tiny_qwen3_vl

FRAMES, CELLS = 5, (2, 3)
EACH = CELLS[0] * CELLS[1]
ALL = [FrameSpan(number, EACH) for number in range(FRAMES)]
EVERY = torch.arange(FRAMES * EACH)


@functools.cache
def prompt() -> Prompt:
    """One whose frames have names; whose they are does not matter here."""
    tokenizer: Any = published_tokenizer(load_tokenizer(), tiny_internvl(bundled=True).config)
    return build_prompt(tokenizer, "What?", family=INTERNVL)


@pytest.mark.parametrize("original", [False, True])
def test_a_whole_video_stands_where_transformers_has_it(original: bool) -> None:
    words = prompt()
    ids = words.input_ids(FRAMES * EACH, ALL)
    visual = ids == words.video_token_id
    model = tiny_qwen3_vl()
    grid = torch.tensor([[FRAMES, CELLS[0] * 2, CELLS[1] * 2]])
    kinds = torch.where(visual, 2, 0)
    wanted, delta = model.model.get_rope_index(torch.where(visual, VIDEO_TOKEN, 1), kinds, None, grid)
    found = on_axes(words, ALL, EVERY, CELLS, FRAMES, original=original)
    assert torch.equal(found.positions, wanted[:, 0])
    assert found.next == ids.shape[1] + int(delta)
    assert following(found.next, 2, EVERY.device).tolist() == [[found.next, found.next + 1]] * 3
    assert not torch.equal(on_axes(words, ALL, EVERY, (3, 2), FRAMES, original=original).positions, wanted[:, 0])


@given(st.data())
def test_what_is_left_keeps_row_and_column_and_where_asked_its_time(data: st.DataObject) -> None:
    words = prompt()
    left = [0, *data.draw(st.lists(st.integers(1, FRAMES - 1), unique=True).map(sorted))]
    kept = [data.draw(st.lists(st.integers(0, EACH - 1), unique=True, min_size=1).map(sorted)) for _ in left]
    place = torch.tensor([frame * EACH + cell for frame, cells in zip(left, kept, strict=True) for cell in cells])
    spans = [FrameSpan(frame, len(cells)) for frame, cells in zip(left, kept, strict=True)]
    visual = list(words.visual_span(len(place), spans))
    whole = on_axes(words, ALL, EVERY, CELLS, FRAMES, original=True)
    spots = torch.tensor(list(words.visual_span(FRAMES * EACH, ALL)))
    original = on_axes(words, spans, place, CELLS, FRAMES, original=True)
    assert torch.equal(original.positions[:, visual], whole.positions[:, spots[place]])
    assert original.next == whole.next
    close = on_axes(words, spans, place, CELLS, FRAMES, original=False)
    names = sum(len(ids) for ids, _ in words.pieces(len(place), spans))
    assert close.next == names + len(left) * max(CELLS) + len(words.suffix_ids)
    inside = close.positions[:, visual]
    assert torch.equal(inside[1:] - inside[0], original.positions[1:, visual] - original.positions[0, visual])
    text = [at for at in range(words.length(len(place), spans)) if at not in visual]
    for found in (close, original):
        assert (found.positions[:, text] == found.positions[0, text]).all()
        assert (found.positions[0, text].diff() > 0).all()


def test_states_and_a_bias_stand_where_their_tokens_do() -> None:
    words, spans = prompt(), [FrameSpan(0, 1), FrameSpan(3, 2)]
    tokens = torch.arange(18.0).view(3, 6)  # itself, and two states of width 2
    visual, length = words.visual_span(3, spans), words.length(3, spans)
    states = states_of(tokens, visual, length, 2)
    assert states is not None
    assert states[:, visual].tolist() == [[[2, 3], [8, 9], [14, 15]], [[4, 5], [10, 11], [16, 17]]]
    assert states.sum() == tokens[:, 2:].sum()
    assert states_of(tokens, visual, length, 6) is None
    weights = weights_of(words, spans, torch.tensor([1.0, 2.0, 3.0]))
    assert weights.shape == (length,)
    assert weights[visual].tolist() == [1, 2, 3]
    assert weights.sum() == 6
