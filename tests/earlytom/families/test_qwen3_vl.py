"""Qwen3-VL's own: frames of two pictures and any shape, states of earlier layers, positions on three axes, batches."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from earlytom import EarlyTomConfig, UserError, apply_earlytom
from earlytom.cells.config import CellsConfig
from earlytom.encoder import encode
from earlytom.families import FAMILIES, geometry
from earlytom.families.qwen3_vl import QWEN3_VL
from earlytom.families.qwen3_vl.pixels import packed, unpacked
from earlytom.families.qwen3_vl.reading import axes_of, positions_of
from earlytom.merge import apply_weights
from earlytom.methods import method_of
from earlytom.methods.controls import EvenFrames, TopK
from earlytom.methods.earlytom import EarlyTom
from tests.earlytom.tiny import VIDEO_TOKEN, made_video, tiny_qwen3_vl

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
ON = EarlyTomConfig(retention_ratio=0.4, merge_layers=(0, 1), schedule="budget")
CELLS = CellsConfig(retention_ratio=0.4, merge_layers=(0, 1))
GRID = (4, 6)
E = 32


def model_of(**how: Any) -> Any:
    return tiny_qwen3_vl(grid=GRID, layers=3, **how)


def text(frames: int, cells: int, first: int = 50) -> list[int]:
    """A prompt of a video of so many frames, frame n after `first + n`."""
    spans = [[first + number, 124, *[VIDEO_TOKEN] * cells, 125] for number in range(frames)]
    return [1, 2, *chain(*spans), 4]


def batch(*videos: Tensor) -> dict[str, Any]:
    """What `generate` is given of a prompt about each video, padded on the left."""
    given = [packed(video, 4) for video in videos]
    texts = [text(len(video) // 2, video[0, 0].numel() // 64) for video in videos]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in texts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in texts])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": torch.cat([patches for patches, _ in given]),
        "video_grid_thw": torch.cat([grid for _, grid in given]),
        "mm_token_type_ids": (ids == VIDEO_TOKEN).int() * 2,
    }


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


@torch.no_grad()
def test_positions_of_a_whole_prompt_are_transformers_own() -> None:
    model = model_of()
    videos = [made_video("scenes", 6, grid=GRID), made_video("scenes", 4, grid=(2, 4))]
    given = batch(*videos)
    wanted, _ = model.model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], None, given["video_grid_thw"], given["attention_mask"]
    )
    with apply_earlytom(model, OFF) as applied:
        ids, mask = given.pop("input_ids"), given.pop("attention_mask")
        prompt, _ = applied._shortened(ids, mask, given.pop("pixel_values_videos"), given)
    assert torch.equal(positions_of(prompt), wanted)
    assert not torch.equal(positions_of(prompt._replace(cells=prompt.cells.roll(1))), wanted)  # negative control


def test_a_token_that_is_left_keeps_its_row_and_column() -> None:
    visual = [False, True, True, False, True, False]
    found = axes_of(visual, torch.tensor([1, 5, 2]), torch.tensor([[2, 3]] * 3), torch.tensor([0, 0, 0]))
    assert found.tolist() == [[0, 1, 1, 4, 5, 8], [0, 1, 2, 4, 5, 8], [0, 2, 3, 4, 7, 8]]


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_a_batch_answers_as_transformers_do_and_each_as_if_alone(how: dict[str, Any]) -> None:
    model = model_of()
    videos = [made_video("scenes", 6, grid=GRID, seed=1), made_video("scenes", 4, grid=(8, 4), seed=2)]
    how = {"max_new_tokens": 6, "do_sample": False, **how}
    wanted = model.generate(**batch(*videos), **how)
    with apply_earlytom(model, OFF):
        assert torch.equal(model.generate(**batch(*videos), **how), wanted)
    with apply_earlytom(model, ON):
        both = model.generate(**batch(*videos), **how)
        for row, video in zip(both, videos, strict=True):
            alone = model.generate(**batch(video), **how)[0]
            assert torch.equal(row[-6:], alone[-6:])
    assert not torch.equal(both, wanted)  # negative control: it sees less
    assert torch.equal(model.generate(**batch(*videos), **how), wanted)


@torch.no_grad()
def test_a_forward_pass_is_the_models_own() -> None:
    model, given = model_of(), batch(made_video("scenes", 6, grid=GRID))
    wanted = model(**given).logits
    with apply_earlytom(model, OFF):
        assert torch.equal(model(**given).logits, wanted)
    with apply_earlytom(model, ON):
        assert model(**given).logits.shape[1] < wanted.shape[1]


@torch.no_grad()
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
    shown, asked = (batch(*(made_video("noise", n, grid=GRID) for n in counts)) for counts in (frames, prompt))
    ids, mask = asked["input_ids"], asked["attention_mask"]
    pixels, grid = shown["pixel_values_videos"], shown["video_grid_thw"]
    with apply_earlytom(model_of(), ON) as applied:
        with pytest.raises(UserError, match="make it with the model's own processor"):
            applied.shorten(ids, mask, pixels, video_grid_thw=grid)
        with pytest.raises(UserError, match="need video_grid_thw beside them"):
            applied.shorten(ids, mask, pixels)


def test_it_is_a_family() -> None:
    assert FAMILIES["qwen3_vl"] is QWEN3_VL
