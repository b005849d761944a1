"""What is true of LLaVA-OneVision alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlavaOnevisionConfig

from earlytom import UserError
from earlytom.families.llava_onevision import feature_depth, grid_side, pooled_side
from earlytom.families.llava_video.layout import pooled, side_of


def test_pooled_side_rounds_up() -> None:
    assert [pooled_side(grid) for grid in (27, 24, 9, 8, 2, 1)] == [14, 12, 5, 4, 1, 1]


@pytest.mark.parametrize(("how", "of"), [("average", torch.mean), ("max", torch.amax)])
def test_an_odd_row_is_left_out_of_other_poolings(how: str, of: Any) -> None:
    values = torch.randn(2, 49, 3)
    blocks = values.unflatten(1, (7, 7))[:, :6, :6].unflatten(1, (3, 2)).unflatten(3, (3, 2))
    assert torch.allclose(pooled(values, how), of(blocks, dim=(2, 4)).flatten(1, 2), atol=1e-6)
    assert side_of(7, how) == 3


@pytest.mark.parametrize("side", [1, 2, 9, 27])
def test_the_side_of_a_square_frame(side: int) -> None:
    assert grid_side(side * side) == side


@pytest.mark.parametrize("tokens", [2, 80, 730])
def test_a_frame_that_is_not_square_is_refused(tokens: int) -> None:
    with pytest.raises(UserError, match=f"frames must be square: a frame has {tokens} patch tokens"):
        grid_side(tokens)


@pytest.mark.parametrize(("layer", "depth"), [(-1, 26), (-2, 25), (3, 3), (26, 26)])
def test_depth_follows_the_feature_layer(layer: int, depth: int) -> None:
    assert feature_depth(LlavaOnevisionConfig(vision_feature_layer=layer)) == depth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer must be one layer, got \[-1, -2\]"),
        ({"vision_feature_layer": 27}, "vision_feature_layer 27 does not exist in a tower of 26 layers"),
        ({"vision_feature_layer": -27}, "vision_feature_layer -27 does not exist"),
        ({"vision_feature_layer": 0}, "vision_feature_layer 0 does not exist"),
        ({"vision_feature_select_strategy": "default"}, "strategy 'default' .* set it to 'full'"),
    ],
)
def test_feature_layers_that_cannot_be_merged_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        feature_depth(LlavaOnevisionConfig(**change))
