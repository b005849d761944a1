"""Qwen3.5's own: what its language model is made of and costs."""

from __future__ import annotations

from typing import Any

import pytest

from earlytom import UserError, flops
from earlytom.families import geometry
from earlytom.families.qwen3_5 import QWEN3_5
from tests.earlytom.tiny import tiny_qwen3_5


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"layer_types": ["linear_attention"] * 3}, "layer_types must be 3 of linear_attention and full_attention"),
        ({"linear_num_value_heads": 3}, "must be a multiple of linear_num_key_heads, 2, got 3"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim must be"),
    ],
)
def test_language_models_that_cannot_run_are_refused(change: dict[str, Any], line: str) -> None:
    raw = tiny_qwen3_5().config.to_dict()
    raw["text_config"] |= change
    with pytest.raises(UserError, match=line):
        geometry(QWEN3_5.config(raw))


def test_prefill_counts_both_kinds_of_layers() -> None:
    """Against the products of the modules themselves; the rest grows with the square of the prompt in one layer."""
    model = tiny_qwen3_5()
    text = model.config.text_config
    layers = model.get_decoder().layers
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)
    once, twice = (flops.prefill(text, tokens) - 2 * 32 * text.vocab_size for tokens in (10, 20))
    convolution, state = 2 * 4 * (2 * 16 + 32), 6 * 32 * 8
    square = 2 * 4 * 32  # one layer that attends, half of two products
    assert once == 10 * (2 * weights + 2 * (convolution + state)) + 100 * square
    assert twice - 2 * once == 200 * square


def test_the_published_one_is_what_transformers_says_by_itself() -> None:
    config = QWEN3_5.published["qwen3.5-9b"]()
    frame = geometry(config)
    assert (frame.depth, frame.width, frame.llm_width, frame.streams) == (27, 1152, 4096, 0)
    assert config.text_config.layer_types.count("full_attention") == 8
