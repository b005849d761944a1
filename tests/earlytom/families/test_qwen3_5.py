"""Qwen3.5's own: no states of earlier layers, positions on axes in batches, and what its language model costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from earlytom import UserError, apply_earlytom, flops
from earlytom.families import FAMILIES, geometry
from earlytom.families.qwen3_5 import QWEN3_5
from earlytom.families.qwen3_vl.reading import positions_of
from tests.earlytom.families.test_qwen3_vl import CELLS, OFF, ON, batch
from tests.earlytom.tiny import made_video, tiny_qwen3_5

GRID = (4, 6)


@torch.no_grad()
def test_positions_of_a_whole_prompt_are_transformers_own() -> None:
    model = tiny_qwen3_5()
    given = batch(made_video("scenes", 6, grid=GRID), made_video("scenes", 4, grid=(2, 4)))
    wanted, _ = model.model.get_rope_index(
        input_ids=given["input_ids"],
        mm_token_type_ids=given["mm_token_type_ids"],
        video_grid_thw=given["video_grid_thw"],
        attention_mask=given["attention_mask"],
    )
    with apply_earlytom(model, OFF) as applied:
        ids, mask = given.pop("input_ids"), given.pop("attention_mask")
        prompt, _ = applied._shortened(ids, mask, given.pop("pixel_values_videos"), given)
    assert torch.equal(positions_of(prompt), wanted)
    assert not torch.equal(positions_of(prompt._replace(cells=prompt.cells.roll(1))), wanted)  # negative control


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_a_batch_answers_as_transformers_do(how: dict[str, Any]) -> None:
    model = tiny_qwen3_5()
    videos = [made_video("scenes", 6, grid=GRID, seed=1), made_video("scenes", 4, grid=(8, 4), seed=2)]
    how = {"max_new_tokens": 6, "do_sample": False, **how}
    wanted = model.generate(**batch(*videos), **how)
    with apply_earlytom(model, OFF):
        assert torch.equal(model.generate(**batch(*videos), **how), wanted)
    for config in (ON, CELLS):
        with apply_earlytom(model, config):
            assert not torch.equal(model.generate(**batch(*videos), **how), wanted)  # negative control


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
    assert FAMILIES["qwen3_5"] is QWEN3_5
