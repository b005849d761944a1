"""TempMe: the released modules' vectors, and properties of its merges.

    pytest tests/earlytom/methods/test_tempme.py --golden DIR

runs the cases of another folder that is laid out as `tests/golden/tempme`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.bipartite import Matching, match, set_sizes, sides
from earlytom.tempme.block import BlockForm, block
from earlytom.tempme.clip import EPS, LAYER_WEIGHTS, TempMeVideo, quick_gelu
from earlytom.tempme.schedule import LayerMerge, TempMeSchedule
from tests.golden_vectors import HOME, folder_of, parametrize, read_cases

TOLERANCE: dict[str, float] = {"atol": 2e-5, "rtol": 0}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    listed = read_cases(metafunc.config, "tempme", "index.json")
    parametrize(metafunc, "case", [one | {"case": one["name"]} for one in listed["cases"]])
    for name, key in (("unit", "unit_merge"), ("alone", "blocks")):
        parametrize(metafunc, name, [{"case": n} for n in range(listed.get(key, 0))])


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return folder_of(request.config, "tempme")


def arrays(path: Path) -> dict[str, Tensor]:
    """All arrays of a file, half precision as fp32."""
    with np.load(path) as file:
        found = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


# --- the released modules


def test_every_vector_is_listed(request: pytest.FixtureRequest, folder: Path) -> None:
    named = {one["name"] for one in read_cases(request.config, "tempme", "index.json")["cases"]}
    others = {"weights", "unit_merge", "blocks_without_cls"}
    assert {path.stem for path in folder.glob("*.npz")} - others == named


def test_golden_merges(folder: Path, unit: dict[str, Any]) -> None:
    n, file = unit["case"], arrays(folder / "unit_merge.npz")
    protected, count = int(file[f"cls_{n}"]), int(file[f"r_{n}"])
    found = match(file[f"metric_{n}"], count, protected=protected)
    assert found.source.tolist() == file[f"src_{n}"].tolist()
    assert found.target.tolist() == file[f"dst_{n}"].tolist()
    merged, size = found.merge(file[f"x_{n}"], file[f"size_{n}"].float())
    torch.testing.assert_close(merged, file[f"out_{n}"], **TOLERANCE)
    assert size.tolist() == file[f"out_size_{n}"].tolist()


def test_golden_blocks_without_protected_tokens(folder: Path, alone: dict[str, Any]) -> None:
    n, file, weights = alone["case"], arrays(folder / "blocks_without_cls.npz"), arrays(folder / "weights.npz")
    x, group, counts = file[f"x_{n}"], int(file[f"group_{n}"]), file[f"r_{n}"].tolist()
    size = file.get(f"size_{n}", torch.ones(x.shape[:2])).float()
    cross = counts[0] if group > 1 else 0
    merge = LayerMerge(group, cross, counts[-1], 0, 0, 0)
    layer = {name: weights[name][int(file[f"layer_{n}"])] for name in LAYER_WEIGHTS if not name.startswith("lora")}
    out, size = block(x, size, layer, BlockForm(2, EPS, quick_gelu, faithful=True), merge)
    torch.testing.assert_close(out, file[f"out_{n}"], **TOLERANCE)
    assert size.tolist() == file[f"out_size_{n}"].tolist()


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split("-"))


def video(folder: Path, case: dict[str, Any], file: dict[str, Tensor], **changes: Any) -> TempMeVideo:
    across, within = numbers(case["merge_token_proportion"])
    layers = numbers(case["merge_layer"])
    schedule: dict[str, Any] = {"each": case["tome_r"], "merge_layers": layers, "across": across, "within": within}
    schedule |= {"groups": numbers(case["merge_frame_num"]), "faithful": True} | changes
    weights = arrays(folder / "weights.npz")
    weights["position"] = weights[f"pos_{case['grid']}"]
    temporal = [file[f"temporal_embedding_{n}"] for n in range(len(layers))] if case["frame_pos"] else None
    return TempMeVideo(weights, TempMeSchedule(**schedule), heads=2, temporal=temporal, proportional=case["prop_attn"])


def test_golden_videos(folder: Path, case: dict[str, Any]) -> None:
    file = arrays(folder / f"{case['name']}.npz")
    counted: list[list[int]] = []
    steps: list[dict[str, Any]] = []

    def watch(number: int, hidden: Tensor, size: Tensor, protected: int, clips: int) -> None:
        counted.append([len(hidden), hidden.shape[1], protected, clips])
        if f"x_{number:02d}" in file:
            torch.testing.assert_close(hidden, file[f"x_{number:02d}"], **TOLERANCE)
        if f"size_{number:02d}" in file:
            assert size.tolist() == file[f"size_{number:02d}"].tolist()
        else:
            assert bool((size == 1).all())

    def note(number: int, kind: str, found: Matching) -> None:
        steps.append({"r": found.merged, "cls": found.protected, "kind": kind})
        assert found.source.tolist() == file[f"{kind}_src_{number:02d}"].tolist()
        assert found.target.tolist() == file[f"{kind}_dst_{number:02d}"].tolist()

    out = video(folder, case, file)(file["frames"], file["mask"], watch=watch, note=note)
    assert counted == file["counts"].tolist()
    assert len(steps) == sum("_src_" in name for name in file)
    if "steps" in case:
        assert steps == case["steps"]
    torch.testing.assert_close(out.hidden, file["final_tokens"], **TOLERANCE)
    torch.testing.assert_close(out.frames, file["frame_feat"], **TOLERANCE)
    torch.testing.assert_close(out.video, file["video_feat"], **TOLERANCE)


OWN = HOME / "tempme"
TINY = {
    "grid": 4, "tome_r": 1, "merge_layer": "8", "merge_frame_num": "2", "merge_token_proportion": "30-10",
    "frame_pos": 1, "prop_attn": True,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{"prop_attn": False}, {"frame_pos": 0}, {"merge_token_proportion": "10-10"}])
def test_the_vectors_tell_settings_apart(changes: dict[str, Any]) -> None:
    """Negative control."""
    file = arrays(OWN / "c08_two_frames.npz")
    right = video(OWN, TINY, file)(file["frames"], file["mask"])
    torch.testing.assert_close(right.video, file["video_feat"], **TOLERANCE)
    wrong = video(OWN, TINY | changes, file)(file["frames"], file["mask"])
    assert not torch.allclose(wrong.video, file["video_feat"], **TOLERANCE)


def test_padded_frames_reach_the_others_and_a_mask_of_nothing_divides_by_one() -> None:
    file = arrays(OWN / "c08_two_frames.npz")
    run = video(OWN, TINY, file)
    one, other = file["frames"], file["frames"].clone()
    other[1] = 0
    valid = torch.tensor([[1, 0]])
    assert not torch.allclose(run(one, valid).video, run(other, valid).video, atol=1e-3)
    assert run(one, torch.zeros(1, 2)).video.tolist() == [[0.0] * 24]


def test_without_trained_weights_it_refuses() -> None:
    weights = arrays(OWN / "weights.npz")
    weights["position"] = weights["pos_4"]
    for name in ("lora_a", "conv1"):
        with pytest.raises(UserError, match=f"TempMe's encoder is trained and has no '{name}'"):
            TempMeVideo({key: value for key, value in weights.items() if key != name}, TempMeSchedule(), heads=2)
    with pytest.raises(UserError, match="a temporal embedding for each of 3 merge layers"):
        TempMeVideo(weights, TempMeSchedule(), heads=2, temporal=[])


# --- any merge


@st.composite
def lists(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """Tokens, sizes, how many are protected, how many merge."""
    batch, protected, free = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(2, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = torch.randn(batch, protected + free, 6, generator=generator)
    if draw(st.booleans()):  # few different tokens: ties everywhere
        tokens = tokens[:, torch.randint(0, 3, (protected + free,), generator=generator) % (protected + free)]
    size = torch.randint(1, 5, tokens.shape[:2], generator=generator).float()
    return tokens, size, protected, draw(st.integers(0, min(set_sizes(protected + free, protected))))


@given(lists())
def test_a_merge_keeps_mass_and_order(made: tuple[Tensor, Tensor, int, int]) -> None:
    tokens, size, protected, count = made
    found = match(tokens, count, protected=protected)
    merged, sizes = found.merge(tokens, size)
    assert merged.shape[1] == sizes.shape[1] == tokens.shape[1] - count
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    mass = (merged * sizes[..., None]).sum(1)
    torch.testing.assert_close(mass, (tokens * size[..., None]).sum(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merged[:, :protected], tokens[:, :protected])
    for stays in found.stays.tolist():
        assert stays == sorted(stays)


@given(lists())
def test_each_token_is_found_again_where_it_went(made: tuple[Tensor, Tensor, int, int]) -> None:
    tokens, size, protected, count = made
    found = match(tokens, count, protected=protected)
    merged, sizes = found.merge(tokens, size)
    owner = found.owner()
    again = torch.zeros_like(sizes).scatter_add(1, owner, size)
    assert torch.equal(again, sizes)
    total = torch.zeros_like(merged).scatter_add(1, owner[..., None].expand_as(tokens), tokens * size[..., None])
    torch.testing.assert_close(total / sizes[..., None], merged, atol=1e-4, rtol=1e-4)


@given(lists())
def test_those_that_match_best_go(made: tuple[Tensor, Tensor, int, int]) -> None:
    tokens, _, protected, count = made
    found = match(tokens, count, protected=protected)
    first, second = sides(tokens.double(), protected)
    cosine = torch.nn.functional.cosine_similarity(first[:, :, None], second[:, None], dim=-1)
    best = cosine.amax(-1)
    for one, gone, stays, into, cosines in zip(best, found.source, found.stays, found.target, cosine, strict=True):
        if count and len(stays):
            assert float(one[gone].min()) >= float(one[stays].max()) - 1e-5
        for source, target in zip(gone.tolist(), into.tolist(), strict=True):
            assert float(cosines[source, target]) >= float(one[source]) - 1e-5


def test_a_merge_of_more_than_there_is_is_refused() -> None:
    with pytest.raises(UserError, match="of 5 tokens, 1 protected, at most 2 merge, got 3"):
        match(torch.ones(1, 5, 2), 3, protected=1)
    with pytest.raises(UserError, match="at most 0 merge, got 1"):
        match(torch.ones(1, 1, 2), 1)


def test_shapes_need_no_values() -> None:
    found = match(torch.empty(2, 9, 4, device="meta"), 3, protected=1)
    assert found.merge(torch.empty(2, 9, 5, device="meta"), torch.empty(2, 9, device="meta"))[0].shape == (2, 6, 5)


# --- the schedule


def test_published_counts() -> None:
    tokens = [one.tokens for one in TempMeSchedule().plan(12, 50, 12, protected=1)]
    assert tokens == [48, 46, 44, 42, 40, 38, 36, 34, 44, 56, 107, 97]
    large = [(one.clips, one.tokens) for one in TempMeSchedule().plan(12, 197, 12, protected=1)]
    assert large[8:] == [(6, 229), (3, 289), (1, 547), (1, 493)]


@pytest.mark.parametrize(
    ("settings", "final"),
    [
        ({"each": 0, "merge_layers": (17, 19, 21)}, 3116),
        ({"each": 20, "merge_layers": (17, 19, 21)}, 1672),
        ({"each": 20, "merge_layers": (8, 14, 20)}, 964),
        ({"each": 0, "merge_layers": (6, 14, 20), "across": 45}, 488),
    ],
)
def test_counts_of_a_tower_of_26_layers_without_protected_tokens(settings: dict[str, Any], final: int) -> None:
    plan = TempMeSchedule(groups=(2, 2, 2), **settings).plan(32, 729, 26)
    assert plan[-1].clips * plan[-1].tokens == final


@given(
    st.integers(0, 40), st.integers(0, 100), st.integers(0, 100), st.integers(1, 60), st.integers(0, 1), st.booleans()
)
def test_a_plan_never_merges_more_than_there_is(
    each: int, across: int, within: int, patches: int, protected: int, single: bool
) -> None:
    schedule = TempMeSchedule(each, (2, 4), (2, 1 if single else 3), across, within)
    left, kept = patches + protected, protected
    for step in schedule.plan(12, patches + protected, 6, protected=protected):
        joined, kept = left * step.group, kept * step.group
        assert 0 <= step.across <= set_sizes(joined, kept)[0]
        assert 0 <= step.within <= max(0, math.ceil((joined - step.across - kept) / 2))
        left = joined - step.across - step.within
        assert (step.tokens, step.protected) == (left, kept)
        assert left >= kept


def test_the_released_form_counts_as_if_a_lone_clip_had_merged_before() -> None:
    settings: dict[str, Any] = {"each": 0, "merge_layers": (0,), "groups": (1,)}
    (released,) = TempMeSchedule(**settings, faithful=True).plan(4, 20, 1)
    assert (released.across, released.within, released.tokens) == (0, int((20 - 6) * 0.1), 19)
    assert TempMeSchedule(**settings).plan(4, 20, 1)[0].within == 2


def test_the_released_form_adds_no_temporal_embedding_where_it_merges_nothing() -> None:
    weights = arrays(OWN / "weights.npz")
    layer = {name: weights[name][0] for name in LAYER_WEIGHTS}
    x, moved = torch.randn(2, 5, 32), torch.randn(2, 32)
    merge = LayerMerge(2, 0, 0, 0, 1, 10)
    out = {
        (form, given_ is not None): block(
            x, torch.ones(2, 5), layer, BlockForm(2, EPS, quick_gelu, faithful=form), merge, temporal=given_
        )[0]
        for form in (True, False)
        for given_ in (None, moved)
    }
    assert torch.equal(out[True, True], out[True, False])
    assert not torch.allclose(out[False, True], out[False, False])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"each": -1}, "each must be a whole number of at least 0, got -1"),
        ({"groups": (2, 2)}, "groups names 2 sizes for 3 merge layers"),
        ({"merge_layers": (3, 1, 2)}, "merge_layers must be different and ascending"),
        ({"merge_layers": "123"}, "merge_layers must be a list of whole numbers, got '123'"),
        ({"groups": (0, 1, 1)}, "each of groups must be a whole number of at least 1, got 0"),
        ({"across": 101}, r"across must be in \[0, 100\], got 101"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TempMeSchedule(**settings)


def test_frames_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(UserError, match="merge layer 8 joins 2 clips each, and 7 arrive"):
        TempMeSchedule().plan(7, 50, 12)
    with pytest.raises(UserError, match="at most 4 merge, got each=5"):
        TempMeSchedule(each=5, faithful=True).plan(12, 9, 12, protected=1)
