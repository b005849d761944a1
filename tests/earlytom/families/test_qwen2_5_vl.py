"""Qwen2.5-VL's own: windows of every size and their order, times of merged frames, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from earlytom import EarlyTomConfig, UserError, apply_earlytom
from earlytom.encoder import encode
from earlytom.families import geometry
from earlytom.families.qwen2_5_vl import QWEN2_5_VL
from earlytom.families.qwen2_5_vl.tower import Qwen25VlTower, Qwen25VlVision
from earlytom.families.qwen2_5_vl.windows import bands, order, pairs
from earlytom.families.qwen3_vl.pixels import packed
from earlytom.families.qwen3_vl.tower import parted
from earlytom.methods import method_of
from earlytom.methods.earlytom import EarlyTom
from earlytom.methods.published.tempme import ToMe
from tests.earlytom.families.test_on_axes import CELLS, GRID, OFF, batch
from tests.earlytom.tiny import made_video, randomise, tiny_qwen2_5_vl

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
    trunk, projector = parted(model)
    return Qwen25VlVision(Qwen25VlTower(trunk), projector)


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_are_transformers_own(grid: tuple[int, int]) -> None:
    index, ends = get_vision_window_index(torch.tensor([[1, *grid]]), 2, 16, 4)
    assert order(grid, 2).tolist() == index.tolist()
    sizes = ends.diff().tolist()
    mine = [
        n for band in bands(grid, 2) for n in ([band.size] * band.whole + [band.rest] * (band.rest > 0)) * band.rows
    ]
    assert mine == sizes
    assert pairs(grid, 2) == sum(n * n for n in sizes)
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
@pytest.mark.parametrize("config", [ON, CELLS])
def test_a_still_video_keeps_its_own_tokens_in_their_cells(config: Any) -> None:
    model, pixels = visual(), made_video("still", 12, grid=(6, 10))
    patches, shape = packed(pixels[:2], 4)
    one = model(patches, grid_thw=shape).pooler_output
    seen = encode(vision(model), pixels, method_of(config))
    assert len(seen.sources) < 6
    torch.testing.assert_close(seen.tokens, one[seen.positions % len(one)], rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_merged_frame_keeps_the_time_of_its_largest_share() -> None:
    model, given = tiny_qwen2_5_vl(grid=GRID), batch("qwen2_5_vl", made_video("scenes", 12, grid=GRID), seconds=(1.3,))
    with apply_earlytom(model, ON) as applied:
        seen = applied.encode(made_video("scenes", 12, grid=GRID))
        ids, mask = given.pop("input_ids"), given.pop("attention_mask")
        prompt, _ = applied._shortened(ids, mask, given.pop("pixel_values_videos"), given)
    shares = seen.sources.argmax(1)[seen.positions // 6]
    assert prompt.time.tolist() == [int(frame * 2 * 1.3) for frame in shares.tolist()]
    assert len(set(prompt.time.tolist())) == len(seen.sources) < 6


def test_a_layer_with_windows_selects_nothing() -> None:
    config = ON.replace(merge_layers=(0, 1))
    line = "layer 1 of this tower attends within windows.*--merge-layers end with one of 2, 4"
    with pytest.raises(UserError, match=line):
        encode(vision(visual()), made_video("noise", 4, grid=(6, 10)), EarlyTom(config))
    with pytest.raises(UserError, match=r"layer 0 of this tower .*one of 1, 2, 3"):
        apply_earlytom(tiny_qwen2_5_vl(), ON.replace(merge_layers=(0,)))
    with pytest.raises(UserError, match="method 'tome' merges tokens of a frame inside the tower"):
        encode(vision(visual()), made_video("noise", 4, grid=(6, 10)), ToMe(0.5, each=2, depth=5))


def test_merge_layers_end_with_one_that_sees_whole_frames() -> None:
    assert EarlyTomConfig.layers_for(32) == (7, 17, 25)
    assert EarlyTomConfig.layers_for(32, (7, 15, 23, 31)) == (7, 17, 23)
    assert EarlyTomConfig.layers_for(26, range(26)) == EarlyTomConfig.layers_for(26) == (6, 14, 20)
    assert EarlyTomConfig.layers_for(1, (0,)) == ()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"fullatt_block_indexes": [2, 1]}, "must be different layers, ascending"),
        ({"fullatt_block_indexes": []}, "must be different layers, ascending"),
        ({"fullatt_block_indexes": [4]}, "each of fullatt_block_indexes must be"),
        ({"window_size": 12}, "window_size must be a multiple of 8 pixels, got 12"),
        ({"out_hidden_size": 16}, "out_hidden_size must be that of the language model, 32, got 16"),
    ],
)
def test_configurations_that_cannot_run_are_refused(change: dict[str, Any], line: str) -> None:
    raw = tiny_qwen2_5_vl().config.to_dict()
    raw["vision_config"] |= change
    with pytest.raises(UserError, match=line):
        geometry(QWEN2_5_VL.config(raw))


@pytest.mark.parametrize("name", QWEN2_5_VL.published)
def test_published_sizes(name: str) -> None:
    config: Any = QWEN2_5_VL.published[name]()
    frame, text = geometry(config), config.text_config
    assert (frame.depth, frame.width, frame.inner, frame.heads) == (32, 1280, 3420, 16)
    assert (frame.full, frame.cells, frame.llm_width) == ((7, 15, 23, 31), (16, 16), text.hidden_size)
    assert text.hidden_size // text.num_attention_heads == 128
