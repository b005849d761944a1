"""Positions on three axes: those of transformers where all tokens are left, and where what is left had them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from earlytom.families import INTERNVL, QWEN3_VL, FrameTimes
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
STILL = (0,) * FRAMES
FLOATS = {"allow_nan": False, "allow_infinity": False}


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
    found = on_axes(words, ALL, EVERY, CELLS, STILL, original=original)
    assert torch.equal(found.positions, wanted[:, 0])
    assert found.end == ids.shape[1] + int(delta)
    assert following(found.end, 2, EVERY.device).tolist() == [[found.end, found.end + 1]] * 3
    assert not torch.equal(on_axes(words, ALL, EVERY, (3, 2), STILL, original=original).positions, wanted[:, 0])


@given(st.data())
def test_what_is_left_keeps_row_and_column_and_where_asked_its_time(data: st.DataObject) -> None:
    words = prompt()
    left = [0, *data.draw(st.lists(st.integers(1, FRAMES - 1), unique=True).map(sorted))]
    kept = [data.draw(st.lists(st.integers(0, EACH - 1), unique=True, min_size=1).map(sorted)) for _ in left]
    place = torch.tensor([frame * EACH + cell for frame, cells in zip(left, kept, strict=True) for cell in cells])
    spans = [FrameSpan(frame, len(cells)) for frame, cells in zip(left, kept, strict=True)]
    visual = list(words.visual_span(len(place), spans))
    whole = on_axes(words, ALL, EVERY, CELLS, STILL, original=True)
    spots = torch.tensor(list(words.visual_span(FRAMES * EACH, ALL)))
    original = on_axes(words, spans, place, CELLS, STILL, original=True)
    assert torch.equal(original.positions[:, visual], whole.positions[:, spots[place]])
    assert original.end == whole.end
    close = on_axes(words, spans, place, CELLS, STILL, original=False)
    names = sum(len(ids) for ids, _ in words.pieces(len(place), spans))
    assert close.end == names + len(left) * max(CELLS) + len(words.suffix_ids)
    inside = close.positions[:, visual]
    assert torch.equal(inside[1:] - inside[0], original.positions[1:, visual] - original.positions[0, visual])
    text = [at for at in range(words.length(len(place), spans)) if at not in visual]
    for found in (close, original):
        assert (found.positions[:, text] == found.positions[0, text]).all()
        assert (found.positions[0, text].diff() > 0).all()


@functools.cache
def timed_model(tokens_per_second: int) -> Any:
    """transformers' model whose videos have one span each and take time, without weights."""
    text = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "intermediate_size": 32, "rope_parameters": {"mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "tokens_per_second": tokens_per_second}
    with torch.device("meta"):
        return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision, video_token_id=VIDEO_TOKEN))


class OneSpan(NamedTuple):
    """A video between texts, and every second of how many tokens a position: what its frames stand at."""

    words: Prompt
    frames: int
    cells: tuple[int, int]
    seconds: float
    per_second: int

    @property
    def place(self) -> Tensor:
        return torch.arange(self.frames * self.cells[0] * self.cells[1])

    @property
    def steps(self) -> tuple[int, ...]:
        times = FrameTimes((0.0,) * (2 * self.frames), self.seconds * self.frames)  # two pictures a frame
        return QWEN3_VL.time_steps(self.frames, self.per_second, times)


@st.composite
def one_span(draw: st.DrawFn) -> OneSpan:
    before, after = draw(st.integers(1, 5)), draw(st.integers(0, 5))
    words = Prompt((1,) * before, (2,) * after, VIDEO_TOKEN)
    cells = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    seconds = draw(st.sampled_from([1.0, 0.5, 1 / 3, 2 / 24]) | st.floats(0.01, 20, **FLOATS))
    return OneSpan(words, draw(st.integers(1, 6)), cells, seconds, draw(st.sampled_from([1, 2, 4, 25])))


@given(one_span(), st.booleans())
def test_a_video_of_one_span_stands_where_transformers_has_it(video: OneSpan, original: bool) -> None:
    words, (rows, columns) = video.words, video.cells
    ids = words.input_ids(len(video.place))
    grid, kinds = torch.tensor([[video.frames, rows * 2, columns * 2]]), torch.where(ids == VIDEO_TOKEN, 2, 0)
    model = timed_model(video.per_second)
    wanted, _ = model.get_rope_index(ids, kinds, None, grid, torch.tensor([video.seconds]))
    found = on_axes(words, None, video.place, video.cells, video.steps, original=original)
    assert torch.equal(found.positions, wanted[:, 0])


@given(one_span(), st.data())
def test_what_is_left_of_one_span_keeps_its_place(video: OneSpan, data: st.DataObject) -> None:
    """Against every position by itself, in plain numbers."""
    words, (rows, columns), whole = video.words, video.cells, len(video.place)
    kept = data.draw(st.lists(st.integers(0, whole - 1), unique=True, min_size=1).map(sorted))
    found = on_axes(words, None, torch.tensor(kept), video.cells, video.steps, original=False)
    begin = len(words.prefix_ids)
    wanted = [(at, at, at) for at in range(begin)]
    for place in kept:
        frame, cell = divmod(place, rows * columns)
        time = math.floor(np.float32(frame) * (np.float32(video.per_second) * np.float32(video.seconds)))
        wanted.append((begin + time, begin + cell // columns, begin + cell % columns))
    end = begin + max(rows, columns)
    wanted += [(end + at,) * 3 for at in range(len(words.suffix_ids))]
    assert found.positions.T.tolist() == [list(one) for one in wanted]
    assert found.end == end + len(words.suffix_ids)


def test_an_answer_is_behind_the_text_though_the_video_lasts_longer() -> None:
    words = Prompt((1, 1), (2,), VIDEO_TOKEN)
    found = on_axes(words, None, torch.arange(3), (1, 1), QWEN3_VL.time_steps(3, 4.0), original=False)
    assert found.positions.tolist() == [[0, 1, 2, 6, 10, 3], [0, 1, 2, 2, 2, 3], [0, 1, 2, 2, 2, 3]]
    assert found.end == 4
    bias = weights_of(words, None, torch.tensor([1.0, 2.0, 3.0]))
    assert bias.tolist() == [0, 0, 1, 2, 3, 0]


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
