"""Qwen2.5-VL's own: windows of every size and their order, times on the axis of time, released files, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from earlytom import EarlyTomConfig, UserError, apply_earlytom
from earlytom.cells.config import CellsConfig
from earlytom.encoder import encode
from earlytom.families import geometry
from earlytom.families.qwen2_5_vl import QWEN2_5_VL
from earlytom.families.qwen2_5_vl.tower import Qwen25VlTower, Qwen25VlVision
from earlytom.families.qwen2_5_vl.windows import bands, order, pairs
from earlytom.families.qwen3_vl.pixels import packed
from earlytom.families.qwen3_vl.reading import positions_of
from earlytom.families.qwen3_vl.tower import parted
from earlytom.methods import method_of
from earlytom.methods.earlytom import EarlyTom
from earlytom.methods.published.tempme import ToMe
from tests.earlytom.tiny import VIDEO_TOKEN, made_video, randomise, tiny_qwen2_5_vl

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
ON = EarlyTomConfig(retention_ratio=0.4, merge_layers=(0, 2), schedule="budget")
CELLS = CellsConfig(retention_ratio=0.4, merge_layers=(0, 1))
# In windows of two cells on a side: whole ones alone, a rest on the right, below, both, and nothing but rests.
GRIDS = ((8, 12), (8, 10), (6, 8), (10, 6), (2, 2), (2, 10))
GRID = (4, 6)


def visual(full: tuple[int, ...] = (2, 4)) -> Any:
    config = Qwen2_5_VLVisionConfig(
        depth=5, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, window_size=16, out_hidden_size=24,
        fullatt_block_indexes=list(full), image_size=[24, 40],
    )  # fmt: skip
    return randomise(Qwen2_5_VisionTransformerPretrainedModel(config), 0)


def vision(model: Any) -> Qwen25VlVision:
    trunk, projector = parted(model)
    return Qwen25VlVision(Qwen25VlTower(trunk), projector)


def batch(*videos: Tensor, seconds: tuple[float, ...] | None = (1.3, 0.4)) -> dict[str, Any]:
    """What `generate` is given of a prompt about each video, padded on the left."""
    given = [packed(video, 4) for video in videos]
    texts = [[1, 2, 124, *[VIDEO_TOKEN] * (len(patches) // 4), 125, 50, 4] for patches, _ in given]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in texts])
    found = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in texts]),
        "pixel_values_videos": torch.cat([patches for patches, _ in given]),
        "video_grid_thw": torch.cat([grid for _, grid in given]),
        "mm_token_type_ids": (ids == VIDEO_TOKEN).int() * 2,
    }
    return found if seconds is None else found | {"second_per_grid_ts": torch.tensor(seconds[: len(videos)])}


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
@pytest.mark.parametrize("seconds", [(1.3, 0.4), (0.1, 7.0), None])
def test_positions_of_a_whole_prompt_are_transformers_own(seconds: tuple[float, ...] | None) -> None:
    model = tiny_qwen2_5_vl(grid=GRID)
    given = batch(made_video("scenes", 10, grid=GRID), made_video("scenes", 4, grid=(2, 4)), seconds=seconds)
    wanted, delta = model.model.get_rope_index(
        **{name: value for name, value in given.items() if name != "pixel_values_videos"}
    )
    with apply_earlytom(model, OFF) as applied:
        ids, mask = given.pop("input_ids"), given.pop("attention_mask")
        prompt, _ = applied._shortened(ids, mask, given.pop("pixel_values_videos"), given)
        with applied._announced(prompt):
            model._prepare_position_ids_for_generation(prompt.ids, {"attention_mask": mask})
            assert torch.equal(model.model.rope_deltas, delta)  # the answer begins behind all of them
    assert torch.equal(positions_of(prompt), wanted)
    assert not torch.equal(positions_of(prompt._replace(time=prompt.time * 0)), wanted)  # negative control


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_a_batch_answers_as_transformers_do_and_each_as_if_alone(how: dict[str, Any]) -> None:
    model = tiny_qwen2_5_vl(grid=GRID)
    videos = [made_video("scenes", 10, grid=GRID, seed=1), made_video("scenes", 4, grid=(8, 4), seed=2)]
    how = {"max_new_tokens": 6, "do_sample": False, **how}
    wanted = model.generate(**batch(*videos, seconds=(7.0, 0.4)), **how)
    with apply_earlytom(model, OFF):
        assert torch.equal(model.generate(**batch(*videos, seconds=(7.0, 0.4)), **how), wanted)
    with apply_earlytom(model, ON):
        both = model.generate(**batch(*videos, seconds=(7.0, 0.4)), **how)
        for row, video, seconds in zip(both, videos, (7.0, 0.4), strict=True):
            alone = model.generate(**batch(video, seconds=(seconds,)), **how)[0]
            assert torch.equal(row[-6:], alone[-6:])
    assert not torch.equal(both, wanted)  # negative control: it sees less


@torch.no_grad()
def test_a_forward_pass_is_the_models_own() -> None:
    model, given = tiny_qwen2_5_vl(grid=GRID), batch(made_video("scenes", 6, grid=GRID))
    wanted = model(**given).logits
    with apply_earlytom(model, OFF):
        assert torch.equal(model(**given).logits, wanted)
    with apply_earlytom(model, ON):
        assert model(**given).logits.shape[1] < wanted.shape[1]


@torch.no_grad()
def test_a_merged_frame_keeps_the_time_of_its_largest_share() -> None:
    model, given = tiny_qwen2_5_vl(grid=GRID), batch(made_video("scenes", 12, grid=GRID))
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
