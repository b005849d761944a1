"""Qwen3-VL's own: frames of two pictures and any shape, states of earlier layers, rows and columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from earlytom import UserError, apply_earlytom
from earlytom.encoder import encode
from earlytom.families import FrameTimes, geometry
from earlytom.families.qwen3_vl import QWEN3_VL
from earlytom.families.qwen3_vl.pixels import packed, unpacked
from earlytom.families.qwen3_vl.reading import axes_of
from earlytom.merge import apply_weights
from earlytom.methods import method_of
from earlytom.methods.controls import EvenFrames, TopK
from earlytom.methods.earlytom import EarlyTom
from tests.earlytom.families.test_on_axes import CELLS, GRID, OFF, ON, batch
from tests.earlytom.tiny import made_video, tiny_qwen3_vl

E = 32


def model_of(**how: Any) -> Any:
    return tiny_qwen3_vl(grid=GRID, layers=3, **how)


def test_patches_are_the_processors_there_and_back() -> None:
    videos = [made_video("noise", 4, grid=GRID), made_video("noise", 6, grid=(8, 4))]
    for video in videos:
        processor: Any = object()
        patches, *grid = Qwen3VLVideoProcessor.patchify(processor, video[None], 4, 2, 2)
        mine, own_grid = packed(video, 4)
        assert torch.equal(mine, patches[0])
        assert own_grid.tolist() == [grid]
    patches, grids = (torch.cat(values) for values in zip(*(packed(video, 4) for video in videos), strict=True))
    assert all(torch.equal(*pair) for pair in zip(unpacked(patches, grids, 4), videos, strict=True))


@torch.no_grad()
def test_a_frame_need_not_be_square_and_its_size_is_that_of_the_pixels() -> None:
    model = model_of()
    for grid in (GRID, (8, 4), (2, 2)):
        video = made_video("scenes", 6, grid=grid)
        seen = encode(QWEN3_VL.vision_of(model.model), video, EarlyTom(OFF))
        assert torch.equal(seen.tokens, QWEN3_VL.own_tokens(model, video))
        frame = geometry(QWEN3_VL.sized(model.config, (video.shape[2], video.shape[3])))
        assert (frame.grid, frame.cells, frame.streams) == (grid, (grid[0] // 2, grid[1] // 2), 2)
        assert seen.tokens.shape == (3 * frame.tokens_per_frame, 3 * E)
    assert geometry(model.config).grid == GRID  # and not what was shown last


@torch.no_grad()
@pytest.mark.parametrize("config", [ON, CELLS])
def test_states_of_earlier_layers_are_merged_and_kept_as_their_tokens_are(config: Any) -> None:
    """What stands behind a token is the projected state of the same cell, merged by the weights that came after it."""
    model, video = model_of(deepstack_visual_indexes=[0]), made_video("scenes", 8, grid=GRID)
    vision, trace = QWEN3_VL.vision_of(model.model), dict[str, Tensor]()
    seen = encode(vision, video, method_of(config), trace=trace, every_layer=True)
    weights: list[Tensor] = [trace["weights_0"], trace["weights_1"]]
    state = trace["hidden_0"]  # after its layer, before the first merge
    for one in weights:
        merged = one.to(state) @ state.transpose(0, 1) if one.dim() == 3 else None
        state = apply_weights(one, state) if merged is None else merged.transpose(0, 1)
    wanted = vision.projector.deepstack[0](state.contiguous())[seen.positions]  # type: ignore[attr-defined]
    torch.testing.assert_close(seen.tokens[:, E:], wanted, atol=1e-5, rtol=0)
    without = model_of(deepstack_visual_indexes=[])
    without.load_state_dict(model.state_dict(), strict=False)
    alone = encode(QWEN3_VL.vision_of(without.model), video, method_of(config))
    assert torch.equal(alone.positions, seen.positions)  # they decide nothing
    assert torch.equal(alone.tokens, seen.tokens[:, :E])
    assert alone.bias.equal(seen.bias)


def test_a_token_that_is_left_keeps_its_row_and_column() -> None:
    visual = [False, True, True, False, True, False]
    found = axes_of(visual, torch.tensor([1, 5, 2]), torch.tensor([[2, 3]] * 3), torch.tensor([0, 0, 0]))
    assert found.tolist() == [[0, 1, 1, 4, 5, 8], [0, 1, 2, 4, 5, 8], [0, 2, 3, 4, 7, 8]]


@torch.no_grad()
def test_a_frame_is_named_by_the_middle_of_its_pictures() -> None:
    assert QWEN3_VL.before_frame(1, FrameTimes((0.0, 0.4, 2.0, 3.0), 4.0)) == "<2.5 seconds><|vision_start|>"


def test_frames_that_do_not_enter_are_pairs_of_pictures() -> None:
    model, video = model_of(), made_video("noise", 10, grid=GRID)
    seen = encode(QWEN3_VL.vision_of(model.model), video, EvenFrames(3))
    pairs = video.unflatten(0, (5, 2))[[0, 2, 4]].flatten(0, 1)
    assert torch.equal(seen.tokens, QWEN3_VL.own_tokens(model, pairs))
    assert seen.sources.tolist() == torch.eye(5)[[0, 2, 4]].tolist()


@pytest.mark.parametrize(
    ("pictures", "method", "line"),
    [
        (5, EarlyTom(ON), "a frame is 2 pictures here, so their number must be a multiple, got 5"),
        (4, TopK(3, 1), "method 'top-k' knows nothing of the states of earlier layers"),
    ],
)
def test_what_cannot_be_encoded_is_refused(pictures: int, method: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        encode(QWEN3_VL.vision_of(model_of().model), made_video("noise", pictures, grid=GRID), method)


@pytest.mark.parametrize(
    ("vision", "line"),
    [
        ({"image_size": [12, 16]}, "frames are 12x16, expected multiples of 8 pixels"),
        ({"deepstack_visual_indexes": [2, 0]}, "must be different layers from 0 to 2, ascending"),
        ({"deepstack_visual_indexes": [0, 3]}, "must be different layers from 0 to 2, ascending"),
        ({"deepstack_visual_indexes": [0, 1, 2]}, "need as many layers of the language model, which has 2"),
        ({"out_hidden_size": 16}, "out_hidden_size must be that of the language model, 32, got 16"),
    ],
)
def test_configurations_that_cannot_run_are_refused(vision: dict[str, Any], line: str) -> None:
    raw = model_of().config.to_dict()
    raw["vision_config"] |= vision
    with pytest.raises(UserError, match=line):
        geometry(QWEN3_VL.config(raw))


@pytest.mark.parametrize(
    "section", [None, 0, True, "x", {}, [], [2, 1], [2, 1, 0], [2, 1, 1.0], [True, 1, 1], ["a"] * 3], ids=str
)
def test_frequencies_of_axes_are_three_numbers(section: Any) -> None:
    raw = model_of().config.to_dict()
    raw["text_config"]["rope_parameters"]["mrope_section"] = section
    with pytest.raises(UserError, match="mrope_section must be three numbers from 1 on, got"):
        geometry(QWEN3_VL.config(raw))
    del raw["text_config"]["rope_parameters"]["mrope_section"]
    assert geometry(QWEN3_VL.config(raw)).step == 2  # transformers has a default


@pytest.mark.parametrize("change", [{"temporal_patch_size": 1}, {"spatial_merge_size": 3}])
def test_other_towers_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be 2, got"):
        QWEN3_VL.check({"vision_config": change})


@pytest.mark.parametrize(("frames", "prompt"), [((6,), (4,)), ((6, 4), (6,))])
def test_pixels_that_do_not_fit_the_prompt_are_refused(frames: tuple[int, ...], prompt: tuple[int, ...]) -> None:
    shown, asked = (
        batch("qwen3_vl", *(made_video("noise", n, grid=GRID) for n in counts)) for counts in (frames, prompt)
    )
    ids, mask = asked["input_ids"], asked["attention_mask"]
    pixels, grid = shown["pixel_values_videos"], shown["video_grid_thw"]
    with apply_earlytom(model_of(), ON) as applied:
        with pytest.raises(UserError, match="make it with the model's own processor"):
            applied.shorten(ids, mask, pixels, video_grid_thw=grid)
        with pytest.raises(UserError, match="need video_grid_thw beside them"):
            applied.shorten(ids, mask, pixels)
