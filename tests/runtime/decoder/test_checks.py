"""What a decoder refuses of positions, biases and what they meet, in one line that says what to use instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom.errors import UserError
from runtime.decoder.checks import broken_prompt, checked_length, overflow
from runtime.decoder.eager import Decoder, InnerMerge
from runtime.decoder.placing import Placed
from tests.runtime.decoder.test_placing import bias_of, positions_of
from tests.runtime.decoder.tiny_decoder import BUCKETS, SLIDING, WIDTH, answer, make_qwen, prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def qwen() -> Any:
    return make_qwen().double()


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_inner_merging_and_a_bias_exclude_each_other() -> None:
    decoder = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS, inner=InnerMerge(2))
    with pytest.raises(UserError, match=r"--inner-layer .*--no-bias") as error:
        decoder.stream(prompt(12), max_new_tokens=4, visual=range(2, 9), bias=bias_of(12))
    one_line(error)
    plain = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS)
    with_bias = answer(decoder, prompt(12), bias=bias_of(12))  # nothing to merge in it
    assert with_bias == answer(plain, prompt(12), bias=bias_of(12))


def test_sliding_windows_take_positions_and_no_bias() -> None:
    model = make_qwen(**SLIDING).double()
    decoder = Decoder.from_model(model, buckets=BUCKETS)
    with pytest.raises(UserError, match=r"sliding windows.*--no-bias") as error:
        decoder.stream(prompt(12), max_new_tokens=4, bias=torch.zeros(12))
    one_line(error)
    with pytest.raises(UserError, match="--no-bias"):
        decoder.prefill(prompt(12), bias=torch.zeros(12))
    shifted = answer(decoder, prompt(12), positions=torch.arange(12) + 40)
    assert shifted == answer(decoder, prompt(12)) != answer(decoder, prompt(12), positions=positions_of(12))


def test_attention_without_masks_is_refused() -> None:
    model = make_qwen()
    decoder = Decoder.from_model(model, buckets=BUCKETS)
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    for how in ({"bias": torch.zeros(5)}, {"positions": torch.arange(5)}):
        with pytest.raises(UserError, match=r"this model's is flash_attention_2.*'sdpa'.*--no-bias") as error:
            decoder.stream(prompt(5), max_new_tokens=3, **how)
        one_line(error)


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": torch.arange(4)},
        {"positions": torch.arange(5.0)},
        {"positions": torch.arange(5)[None]},
        {"bias": torch.zeros(6)},
        {"bias": torch.zeros(5, dtype=torch.int64)},
        {"bias": torch.zeros(1, 5)},
    ],
)
def test_other_shapes_are_refused_at_once(qwen: Any, wrong: dict[str, Tensor]) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    with pytest.raises(ValueError, match=r"must be (int64|float32) \[5\]"):
        decoder.stream(prompt(5), max_new_tokens=3, **wrong)
    with pytest.raises(ValueError, match=r"must be (int64|float32) \[5\]"):
        decoder.prefill(prompt(5), **wrong)


def test_a_bias_that_is_not_finite_is_named(qwen: Any) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    bias = bias_of(WIDTH)
    bias[3] = torch.nan
    with pytest.raises(UserError, match=r"attention bias.*not finite.*check the vision engine") as error:
        answer(decoder, prompt(WIDTH), bias=bias)
    one_line(error)
    with pytest.raises(UserError, match=r"attention bias.*not finite"):
        decoder.prefill(prompt(WIDTH), bias=bias)
    assert decoder.prefill(prompt(WIDTH), bias=bias_of(WIDTH)).length == WIDTH


def test_prompts_are_measured() -> None:
    assert checked_length(torch.zeros(1, 7, 4), 4) == 7
    for wrong in (torch.zeros(7, 4), torch.zeros(2, 7, 4), torch.zeros(1, 7, 5), torch.zeros(1, 0, 4)):
        with pytest.raises(ValueError, match=r"embed"):
            checked_length(wrong, 4)


def test_what_is_broken_is_named() -> None:
    good, spoiled = torch.zeros(1, 3, 4), torch.full((1, 3, 4), torch.inf)
    weights = torch.tensor([0.0, torch.nan, 0.0])
    placed = Placed(torch.arange(3), torch.zeros(3))
    assert [broken_prompt(good, one) for one in (None, placed, Placed(torch.arange(3), None))] == [None] * 3
    assert str(broken_prompt(spoiled, placed)).startswith("the prompt's embeddings hold values that are not finite")
    said = str(broken_prompt(good, Placed(torch.arange(3), weights)))
    assert said.startswith("the prompt's attention bias holds values that are not finite")
    assert "token 4 in float16" in overflow(torch.float16, 4)
