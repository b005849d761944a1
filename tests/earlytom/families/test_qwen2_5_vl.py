"""Qwen2.5-VL's tower: windows of every size, their order, and transformers' own tokens to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from earlytom import EarlyTomConfig, UserError
from earlytom.encoder import encode
from earlytom.families.qwen2_5_vl.tower import Qwen25VlTower, Qwen25VlVision, WindowedTrunk
from earlytom.families.qwen2_5_vl.windows import bands, order
from earlytom.families.qwen3_vl.pixels import packed
from earlytom.methods.earlytom import EarlyTom
from tests.earlytom.tiny import made_video, randomise

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
ON = EarlyTomConfig(retention_ratio=0.4, merge_layers=(0, 2), schedule="budget")
# In windows of two cells on a side: whole ones alone, a rest on the right, below, both, and nothing but rests.
GRIDS = ((8, 12), (8, 10), (6, 8), (10, 6), (2, 2), (2, 10))


def visual(full: tuple[int, ...] = (2, 4)) -> Any:
    config = Qwen2_5_VLVisionConfig(
        depth=5, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, window_size=16, out_hidden_size=24,
        fullatt_block_indexes=list(full), image_size=[24, 40],
    )  # fmt: skip
    return randomise(Qwen2_5_VisionTransformerPretrainedModel(config), 0)


def vision(model: Any) -> Qwen25VlVision:
    return Qwen25VlVision(Qwen25VlTower(WindowedTrunk(model)), model.merger)


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_are_transformers_own(grid: tuple[int, int]) -> None:
    index, ends = get_vision_window_index(torch.tensor([[1, *grid]]), 2, 16, 4)
    assert order(grid, 2).tolist() == index.tolist()
    sizes = ends.diff().tolist()
    mine = [
        n for band in bands(grid, 2) for n in ([band.size] * band.whole + [band.rest] * (band.rest > 0)) * band.rows
    ]
    assert mine == sizes
    assert sum(band.pairs for band in bands(grid, 2)) == sum(n * n for n in sizes)
    assert sum(band.patches for band in bands(grid, 2)) == grid[0] * grid[1]


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
def test_off_is_transformers_own_tokens_bit_for_bit(grid: tuple[int, int]) -> None:
    model, pixels = visual(), made_video("scenes", 6, grid=grid)
    patches, shape = packed(pixels, 4)
    wanted = model(patches, grid_thw=shape).pooler_output
    assert torch.equal(encode(vision(model), pixels, EarlyTom(OFF)).tokens, wanted)


@torch.no_grad()
def test_windows_matter() -> None:
    pixels = made_video("scenes", 6, grid=(8, 10))
    some, all_ = (encode(vision(visual(full)), pixels, EarlyTom(OFF)).tokens for full in ((2, 4), (0, 1, 2, 3, 4)))
    assert not torch.allclose(some, all_, atol=1e-3)


@torch.no_grad()
def test_a_still_video_keeps_its_own_tokens_in_their_cells() -> None:
    model, pixels = visual(), made_video("still", 12, grid=(6, 10))
    patches, shape = packed(pixels[:2], 4)
    one = model(patches, grid_thw=shape).pooler_output
    seen = encode(vision(model), pixels, EarlyTom(ON))
    assert len(seen.sources) < 6
    torch.testing.assert_close(seen.tokens, one[seen.positions % len(one)], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("config", "layer"), [(ON.replace(merge_layers=(0, 1)), 1), (OFF, 4)])
def test_a_layer_with_windows_selects_nothing(config: EarlyTomConfig, layer: int) -> None:
    with pytest.raises(UserError, match=f"layer {layer} of this tower attends within windows.*--merge-layers end with"):
        encode(vision(visual((2,))), made_video("noise", 4, grid=(6, 10)), EarlyTom(config))
