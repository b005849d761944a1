"""The adapters: every layer of every family exactly as the untouched tower runs it, and what a token receives."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel

from earlytom import EarlyTomConfig, UserError, encode_video
from earlytom.families.adapters import TOWERS, tower_of
from tests.earlytom.tiny import FAMILIES, made_video, tiny_projector, tiny_tower, untouched


def with_attention(model: Any) -> Any:
    """A copy that can report its attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_layer_equals_the_untouched_tower(family: str) -> None:
    model, pixels = tiny_tower(family), made_video("scenes", 3)
    tower, want = tower_of(model), untouched(model, pixels).hidden_states
    hidden = tower.embed(pixels)
    assert torch.equal(hidden, want[0])
    assert len(tower.layers) == len(want) - 1 == 4
    for layer, after in zip(tower.layers, want[1:], strict=True):
        hidden, received = tower.run_layer(layer, hidden)
        assert received is None
        assert torch.equal(hidden, after)
    assert hidden.shape[1] == 25 + tower.prefix


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_received_attention_is_the_mean_of_the_attention_matrix(family: str) -> None:
    model, pixels = tiny_tower(family), made_video("noise", 3)
    tower = tower_of(model)
    out = untouched(with_attention(model), pixels, output_attentions=True)
    for index, layer in enumerate(tower.layers):
        attention = out.attentions[index]  # [F, H, T, T], rows are queries
        want = attention.mean(dim=(1, 2))[:, tower.prefix :]
        hidden, received = tower.run_layer(layer, out.hidden_states[index], receive=True)
        assert received is not None
        assert received.dtype == torch.float32
        assert torch.allclose(received, want, atol=1e-6)
        assert torch.allclose(hidden, out.hidden_states[index + 1], atol=2e-5)
        assert torch.allclose(tower.received(layer, out.hidden_states[index]), want, atol=1e-6)
        # Negative control: attention is uneven, and what a token gives is not what it receives.
        assert float(want.std()) > 1e-3
        assert not torch.allclose(attention.mean(dim=(1, 3))[:, tower.prefix :], want, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_received_attention_sums_to_one_but_for_the_class_token(family: str) -> None:
    tower = tower_of(tiny_tower(family))
    hidden = tower.embed(made_video("noise", 2))
    total = tower.received(tower.layers[0], hidden).sum(1)
    if tower.prefix == 0:
        assert torch.allclose(total, torch.ones(2), atol=1e-5)
    else:
        assert bool((total < 0.999).all())


@pytest.mark.parametrize("merge_layers", [(), (1,), (0, 2), (3,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_fused_everywhere_but_in_the_last_merge_layer(family: str, merge_layers: tuple[int, ...]) -> None:
    config = EarlyTomConfig(retention_ratio=0.5, merge_layers=merge_layers)
    fused, matrix = nn.functional.scaled_dot_product_attention, torch.softmax
    with (
        patch.object(nn.functional, "scaled_dot_product_attention", wraps=fused) as fused_calls,
        patch.object(torch, "softmax", wraps=matrix) as matrix_calls,
    ):
        encode_video(tiny_tower(family), tiny_projector(), made_video("noise", 3), config)
    assert fused_calls.call_count == (3 if merge_layers else 4)  # of 4 layers; with merging off the tower is untouched
    assert matrix_calls.call_count == 1  # received attention is computed once


@pytest.mark.parametrize("shape", [(20, 20), (28, 28), (12, 20)])
@torch.no_grad()
def test_siglip2_at_another_resolution(shape: tuple[int, int]) -> None:
    model = tiny_tower("siglip2")
    pixels = torch.randn(2, 3, *shape)
    assert torch.allclose(tower_of(model).embed(pixels), untouched(model, pixels).hidden_states[0], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_found_by_its_name(family: str) -> None:
    model = tiny_tower(family, layers=1)
    assert type(tower_of(model)) is TOWERS[model.config.model_type]


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="vision tower 'Linear' is not supported: EarlyTom runs on siglip_vision_model"):
        tower_of(nn.Linear(2, 2))
    small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    whole = SiglipModel(SiglipConfig(text_config=small | {"vocab_size": 9}, vision_config=small))
    with pytest.raises(UserError, match="vision tower 'siglip' is not supported"):
        tower_of(whole)
    assert tower_of(whole.vision_model).layers  # the part that is meant
    stranger: Any = SimpleNamespace(config=SimpleNamespace(model_type="internvit"))
    with pytest.raises(UserError, match="'internvit' is not supported"):
        tower_of(stranger)


def test_a_video_of_oblong_frames_is_refused() -> None:
    pixels: Tensor = torch.randn(2, 3, 12, 20)
    with pytest.raises(UserError, match="15 patch tokens"):
        encode_video(tiny_tower("siglip2"), tiny_projector(), pixels, EarlyTomConfig(merge_layers=(1,)))
