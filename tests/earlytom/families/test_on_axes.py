"""What holds for every family whose language model places tokens by time, row and column, against transformers."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom import EarlyTomConfig, apply_earlytom
from earlytom.cells.config import CellsConfig
from earlytom.families import FAMILIES
from earlytom.families.qwen3_vl.pixels import packed
from earlytom.families.qwen3_vl.reading import positions_of
from tests.earlytom.tiny import MODELS, VIDEO_TOKEN, made_video

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
ON = EarlyTomConfig(retention_ratio=0.4, merge_layers=(0, 1), schedule="budget")
CELLS = CellsConfig(retention_ratio=0.4, merge_layers=(0, 1))
GRID = (4, 6)
TIMED = "qwen2_5_vl"  # a video is one span, and seconds count
ON_AXES = [name for name, found in FAMILIES.items() if found.on_axes]
every = pytest.mark.parametrize("name", ON_AXES)


def batch(name: str, *videos: Tensor, seconds: tuple[float, ...] | None = None) -> dict[str, Any]:
    """What `generate` is given of a prompt about each video, padded on the left; span n stands after 50 + n."""
    given = [packed(video, 4) for video in videos]
    texts = []
    for video, (patches, _) in zip(videos, given, strict=True):
        spans = len(video) // 2 if FAMILIES[name].span_a_frame else 1
        visual = [VIDEO_TOKEN] * (len(patches) // 4 // spans)
        texts.append([1, 2, *chain(*([50 + number, 124, *visual, 125] for number in range(spans))), 4])
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


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "seconds"), [*((name, None) for name in ON_AXES), (TIMED, (1.3, 0.4)), (TIMED, (0.1, 7.0))]
)
def test_positions_of_a_whole_prompt_are_transformers_own(name: str, seconds: tuple[float, ...] | None) -> None:
    model = MODELS[name](grid=GRID)
    given = batch(name, made_video("scenes", 10, grid=GRID), made_video("scenes", 4, grid=(2, 4)), seconds=seconds)
    pixels = given.pop("pixel_values_videos")
    wanted, delta = model.model.get_rope_index(**given)
    with apply_earlytom(model, OFF) as applied:
        ids, mask = given.pop("input_ids"), given.pop("attention_mask")
        prompt, _ = applied._shortened(ids, mask, pixels, given)
        with applied._announced(prompt):
            model._prepare_position_ids_for_generation(prompt.ids, {"attention_mask": mask})
            assert torch.equal(model.model.rope_deltas, delta)  # the answer begins behind all of them
    assert torch.equal(positions_of(prompt), wanted)
    assert not torch.equal(positions_of(prompt._replace(cells=prompt.cells.roll(1))), wanted)  # negative controls
    if name == TIMED:
        assert not torch.equal(positions_of(prompt._replace(time=prompt.time * 0)), wanted)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
@every
def test_a_batch_answers_as_transformers_do_and_each_as_if_alone(name: str, how: dict[str, Any]) -> None:
    model = MODELS[name](grid=GRID)
    videos = [made_video("scenes", 10, grid=GRID, seed=1), made_video("scenes", 4, grid=(8, 4), seed=2)]
    seconds = (7.0, 0.4) if name == TIMED else None

    def answers(*which: int) -> Tensor:
        times = None if seconds is None else tuple(seconds[one] for one in which)
        given = batch(name, *(videos[one] for one in which), seconds=times)
        return model.generate(**given, max_new_tokens=6, do_sample=False, **how)

    wanted = answers(0, 1)
    with apply_earlytom(model, OFF):
        assert torch.equal(answers(0, 1), wanted)
    for config in (ON, CELLS):
        with apply_earlytom(model, config):
            both = answers(0, 1)
            for row in range(2):
                assert torch.equal(both[row, -6:], answers(row)[0, -6:])
        assert not torch.equal(both, wanted)  # negative control: it sees less
    assert torch.equal(answers(0, 1), wanted)


@torch.no_grad()
@every
def test_a_forward_pass_is_the_models_own(name: str) -> None:
    model = MODELS[name](grid=GRID)
    given = batch(name, made_video("scenes", 6, grid=GRID))
    wanted = model(**given).logits
    with apply_earlytom(model, OFF):
        assert torch.equal(model(**given).logits, wanted)
    with apply_earlytom(model, ON):
        assert model(**given).logits.shape[1] < wanted.shape[1]
