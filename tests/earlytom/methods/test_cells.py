"""The method "cells": the vectors of its reference, and what it does around a whole vision part.

    pytest tests/earlytom/methods/test_cells.py --golden DIR

runs the cases of another folder that is laid out as `tests/golden/cells`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import EarlyTomConfig, UserError, encode_video, token_count
from earlytom.cells.config import CellsConfig
from earlytom.cells.merge import CellPlan, merge_marks, plan_cells
from earlytom.cells.select import affinity, likeness, saliency, select_greedy, select_rounds, token_sizes
from earlytom.encoder import VisualTokens, encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.methods.cells import Cells, EachCells
from earlytom.methods.earlytom import EarlyTom
from earlytom.micro.data import labelled_clip
from earlytom.standing import places, size_bias
from runtime.checkpoint import describe, load_vision
from tests.earlytom.tiny import FAMILIES, made_video, tiny_projector, tiny_tower, untouched
from tests.golden_vectors import HOME, folder_of, parametrize, read_cases, tensor

OWN = HOME / "cells" / "cells.npz"
TOLERANCE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}
CONFIG = CellsConfig(retention_ratio=0.3, merge_layers=(0, 2))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = read_cases(metafunc.config, "cells")
    for kind in ("merge", "pick"):
        parametrize(metafunc, f"{kind}_case", [case for case in cases if case["kind"] == kind])


@pytest.fixture
def vectors(request: pytest.FixtureRequest) -> Path:
    return folder_of(request.config, "cells") / "cells.npz"


# --- the reference


def test_every_vector_is_used(request: pytest.FixtureRequest, vectors: Path) -> None:
    import numpy as np

    listed = {f"{case['kind'][0]}{case['case']}" for case in read_cases(request.config, "cells")}
    assert listed == {name.partition("_")[0] for name in np.load(vectors).files}


def planned(vectors: Path, case: dict[str, Any], **changes: Any) -> tuple[CellPlan, Tensor, Tensor, Tensor]:
    """The plan of a case, and what becomes of its hidden states, sizes and times."""
    n, settings = case["case"], {key: case[key] for key in ("frames_out", "power")} | changes
    hidden, size, time = (tensor(vectors, f"m{n}_{name}", torch.float32) for name in ("hidden", "size", "time"))
    plan = plan_cells(hidden, **settings)
    return plan, plan.apply(hidden), *merge_marks(plan, size, time)


def test_merging(vectors: Path, merge_case: dict[str, Any]) -> None:
    _, *merged = planned(vectors, merge_case)
    hidden, size, time = (tensor(vectors, f"m{merge_case['case']}_out_{name}") for name in ("hidden", "size", "time"))
    torch.testing.assert_close(merged[0], hidden, **TOLERANCE)
    assert torch.equal(merged[1], size)
    assert torch.equal(merged[2], time)


def test_merging_tells_another_power_apart() -> None:
    """Negative control."""
    case = {"case": 0, "frames_out": 6, "power": 2.0}
    _, hidden, size, _ = planned(OWN, case)
    assert torch.equal(size, tensor(OWN, "m0_out_size"))
    assert not torch.allclose(hidden, tensor(OWN, "m0_out_hidden"), **TOLERANCE)


def picked(vectors: Path, case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, cells, places and biases of a case."""
    features, time, size = (
        tensor(vectors, f"p{case['case']}_{name}", torch.float32) for name in ("features", "time", "size")
    )
    per_frame = features.shape[1]
    tokens, time = features.flatten(0, 1), time.round()
    affine = affinity(tokens, time.flatten(), case["frames"])
    choice = (saliency(tokens), likeness(affine), case["count"])
    taken = select_greedy(*choice) if case["rounds"] is None else select_rounds(*choice, case["rounds"])
    place = places(time.long(), taken, per_frame)
    return tokens[taken], taken, place, size_bias(token_sizes(affine, size.flatten(), taken))


def test_choosing(vectors: Path, pick_case: dict[str, Any]) -> None:
    tokens, cells, place, bias = picked(vectors, pick_case)
    wanted = [tensor(vectors, f"p{pick_case['case']}_{name}") for name in ("tokens", "cells", "place", "bias")]
    assert torch.equal(cells, wanted[1])
    assert torch.equal(place, wanted[2])
    torch.testing.assert_close(tokens, wanted[0], **TOLERANCE)
    torch.testing.assert_close(bias, wanted[3], **TOLERANCE)


def test_choosing_tells_the_two_forms_apart() -> None:
    """Negative control: cases 0 and 1 are one clip, chosen from in either form."""
    case = {"case": 0, "count": 42, "frames": 16, "rounds": 7}
    _, cells, _, _ = picked(OWN, case)
    assert not torch.equal(cells, tensor(OWN, "p0_cells"))
    assert torch.equal(cells, tensor(OWN, "p1_cells"))


# --- around a vision part


def seen(
    video: Tensor, config: CellsConfig = CONFIG, family: str = "siglip", trace: dict[str, Tensor] | None = None
) -> VisualTokens:
    vision = LLAVA_ONEVISION.vision(tiny_tower(family), tiny_projector())
    return encode(vision, video, Cells(config), trace=trace)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_off_is_the_untouched_tower(family: str) -> None:
    video = made_video("scenes", 6)
    out = seen(video, CellsConfig(retention_ratio=1.0, merge_layers=(0, 1, 2), frame_budget=1.0), family)
    prefix = 1 if family in ("clip", "dinov2") else 0
    want = untouched(tiny_tower(family), video).hidden_states[-1][:, prefix:]
    assert torch.equal(out.hidden, want)
    assert torch.equal(out.positions, torch.arange(6 * 9))
    assert torch.equal(out.sources, torch.eye(6))
    assert out.frames_per_stage == (6, 6, 6, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_merge_is_that_of_the_reference(family: str) -> None:
    """Step by step along the trace; tokens that are no cells are merged like cells, and do not count for the change."""
    trace: dict[str, Tensor] = {}
    out = seen(made_video("scenes", 8), CONFIG, family, trace)
    assert out.frames_per_stage == (8, 6, 4)
    prefix = 1 if family in ("clip", "dinov2") else 0
    made = torch.eye(8)
    size, time = torch.ones(8, 25), torch.arange(8.0)[:, None].expand(8, 25)
    for layer, left in ((0, 6), (2, 4)):
        hidden = trace[f"hidden_{layer}"]
        plan = plan_cells(hidden, left, CONFIG.power, prefix)
        assert torch.equal(trace[f"weights_{layer}"], plan.weights)
        assert torch.equal(plan.member, plan_cells(hidden[:, prefix:], left, CONFIG.power).member)
        made = plan.weights @ made
        size, time = plan.member @ size, time.gather(0, plan.taken[:, prefix:])
    torch.testing.assert_close(out.sources, made[prefix:].mean(0))
    size, time = LLAVA_ONEVISION.pool(torch.stack([size, time], -1)).unbind(-1)
    tokens, time = trace["features"].flatten(0, 1), time.round()
    affine = affinity(tokens, time.flatten(), 8)  # of the video's frames, not of those left
    taken = select_rounds(saliency(tokens), likeness(affine), len(out.tokens), 7)
    assert torch.equal(out.positions, taken)
    assert torch.equal(out.place, places(time.long(), taken, 9))
    torch.testing.assert_close(out.bias, size_bias(token_sizes(affine, size.flatten(), taken)))


@pytest.mark.parametrize("rounds", [None, 1, 7])
@pytest.mark.parametrize("frames", [1, 2, 8])
@pytest.mark.parametrize("kind", ["noise", "still", "scenes"])
def test_as_many_tokens_as_earlytom_for_any_video(kind: str, frames: int, rounds: int | None) -> None:
    config = CONFIG.replace(rounds=rounds)
    out = seen(made_video(kind, frames), config)
    assert len(out.tokens) == token_count(frames, 9, 0.3, merges=2)
    assert out.positions.tolist() == sorted(set(out.positions.tolist()))
    counts = EarlyTom.from_dict({"retention_ratio": 0.3, "merge_layers": (0, 2), "schedule": "budget"})
    assert Cells(config).counts(frames, 9) == counts.counts(frames, 9)


# --- the adaptive schedule

FREE = CONFIG.replace(schedule="adaptive")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["noise", "still", "scenes", "drift"])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.1, 0.5, 2.5])
def test_the_video_decides_and_the_rest_is_the_budget_schedule(kind: str, threshold: float, family: str) -> None:
    """With the counts that the video gave, the budget schedule makes the same of it."""
    video, rounds = made_video(kind, 8), {"clip": None}.get(family, 7)
    free = seen(video, FREE.replace(threshold=threshold, rounds=rounds), family)
    assert Cells(FREE).counts(8, 9) is None
    left = free.frames_per_stage[1:]
    assert len(free.tokens) == token_count(8, 9, 0.3, frames_out=left[-1])
    if threshold in (0.0, 2.5):
        assert left == {0.0: (8, 8), 2.5: (1, 1)}[threshold]
    budget = seen(video, CONFIG.replace(frame_budget=left, rounds=rounds), family)
    for name in ("tokens", "positions", "hidden", "sources", "place", "bias"):
        assert torch.equal(getattr(free, name), getattr(budget, name)), name


def test_videos_differ_in_what_they_keep() -> None:
    """Negative control: with fixed counts they could not."""
    kept = {kind: seen(made_video(kind, 8), FREE).frames_per_stage for kind in ("noise", "still", "scenes")}
    assert kept["noise"] == (8, 8, 8)
    assert kept["still"] == (8, 1, 1)
    assert kept["still"] < kept["scenes"] < kept["noise"]


@pytest.mark.parametrize("frames", [1, 2])
def test_few_frames_and_no_merge(frames: int) -> None:
    video = made_video("still", frames)
    assert seen(video, FREE).frames_per_stage == (frames, 1, 1)
    unmerged = [seen(video, config.replace(merge_layers=())) for config in (FREE, CONFIG)]
    assert torch.equal(unmerged[0].tokens, unmerged[1].tokens)


def test_several_videos_keep_equal_numbers() -> None:
    with pytest.raises(UserError, match="the schedule must be budget, not adaptive"):
        EachCells(Cells(FREE), 2)


@pytest.mark.parametrize("rounds", [None, 3])
def test_several_videos_at_once_are_each_alone(rounds: int | None) -> None:
    videos, method = (
        [made_video(kind, 6) for kind in ("scenes", "drift", "still")],
        Cells(CONFIG.replace(rounds=rounds)),
    )
    vision = LLAVA_ONEVISION.vision(tiny_tower("clip"), tiny_projector())
    trace: dict[str, Tensor] = {}
    together = encode(vision, torch.cat(videos), EachCells(method, 3), trace=trace)
    assert together.frames_per_stage == (6, 4, 3)
    for n, video in enumerate(videos):
        own: dict[str, Tensor] = {}
        alone = encode(vision, video, method, trace=own)
        assert together.positions[n].tolist() == alone.positions.tolist()
        torch.testing.assert_close(together.tokens[n], alone.tokens, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.sources[n], alone.sources, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(trace["weights_2"][n], own["weights_2"], atol=1e-5, rtol=1e-4)


def test_methods_that_run_alike_up_to_the_choice_say_so() -> None:
    def key(**changes: Any) -> Any:
        return Cells(CONFIG.replace(**changes)).tower_key()

    assert key() == key(retention_ratio=0.7) == key(rounds=None)
    for change in ({"power": 2.0}, {"merge_layers": (0, 1)}, {"frame_budget": 0.5}, {"schedule": "adaptive"}):
        assert key() != key(**change)


# --- settings


@given(
    ratio=st.floats(0.001, 1),
    power=st.floats(0, 64),
    rounds=st.one_of(st.none(), st.integers(1, 100)),
    budget=st.one_of(st.floats(0.01, 1), st.just((4, 2))),
    schedule=st.sampled_from(["budget", "adaptive"]),
    threshold=st.one_of(st.just(CellsConfig.threshold), st.floats(0, 3)),
)
def test_settings_there_and_back(
    ratio: float, power: float, rounds: int | None, budget: Any, schedule: Any, threshold: float
) -> None:
    config = CellsConfig(ratio, (1, 3), budget, power, rounds, schedule, threshold)
    assert CellsConfig.from_dict(config.to_dict()) == config


def test_what_was_recorded_before_there_was_a_threshold_is_still_written() -> None:
    assert "threshold" not in CellsConfig().to_dict()
    assert CellsConfig(schedule="adaptive").to_dict()["threshold"] == CellsConfig.threshold


def test_a_layer_that_the_tower_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="merge layer 6 does not exist: the vision tower has layers 0 to 3"):
        seen(made_video("noise", 4), CONFIG.replace(merge_layers=(0, 6)))


# --- the bundled model


def test_on_the_bundled_model_it_costs_what_earlytom_costs() -> None:
    part, values = load_vision(None), describe(None).preprocessing
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (values.mean, values.std))
    pixels = (torch.from_numpy(labelled_clip("validation", 0).frames).float() / 255 - mean) / std
    layers = EarlyTomConfig.layers_for(8)
    methods = [
        EarlyTom(EarlyTomConfig(merge_layers=layers, schedule="budget")),
        Cells(CellsConfig(merge_layers=layers)),
        Cells(CellsConfig(merge_layers=layers, rounds=None)),
    ]
    seen = [encode_video(part.vision_tower, part.projector, pixels, method, depth=8) for method in methods]
    assert [(out.frames_per_stage, len(out.tokens)) for out in seen] == [((16, 12, 9, 7), 42)] * 3
    assert len({tuple(out.positions.tolist()) for out in seen}) == 3


def test_what_an_engine_asks_of_settings() -> None:
    """See `earlytom.settings`: the decoder is told places and biases unless its user says otherwise."""
    assert (CellsConfig.method, CellsConfig.bias, CellsConfig.original_positions) == (Cells.name, True, True)
    assert not {"method", "bias", "original_positions"} & CellsConfig().to_dict().keys()
