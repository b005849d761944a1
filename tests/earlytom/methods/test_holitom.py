"""HoliTom: the released code's vectors, and properties for any video.

    pytest tests/earlytom/methods/test_holitom.py --golden DIR

runs the cases of another folder that is laid out as `tests/golden/holitom`.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError, apply_earlytom
from earlytom.budget import kept_tokens
from earlytom.density import by_peak, first_of, spacing
from earlytom.encoder import encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.holitom.compress import HoliTomSettings, HoliTomTokens, compress, counts, fold
from earlytom.holitom.segments import Segmentation, best_cuts, segment, similarity
from earlytom.inner import InnerSettings, plan_inner
from earlytom.methods import by_name
from tests.earlytom.tiny import made_video, tiny_llava, tiny_projector, tiny_tower, video_prompt
from tests.golden_vectors import HOME, folder_of, parametrize, read_cases

TOLERANCE: dict[str, float] = {"atol": 1e-5, "rtol": 0}
NEWLINE = 9.0  # what the vectors have for its embedding


def with_newlines(positions: Tensor, columns: int) -> Tensor:
    """The released layout with grid rows, of which this project has none: every frame sorted by position, and a newline
    after each row of the grid that still has a token. [R] int64: an index into the tokens, or -1 for a newline."""
    order = positions.argsort(stable=True)
    row = torch.div(positions[order], columns, rounding_mode="floor")  # rows of all frames; whole, as frames are
    ends = torch.cat([row[1:] != row[:-1], row.new_ones(1, dtype=torch.bool)])
    out = positions.new_full((len(positions) + int(ends.sum()),), -1)
    before = torch.cat([ends.new_zeros(1, dtype=torch.int64), ends.cumsum(0)[:-1]])
    out[torch.arange(len(order), device=order.device) + before] = order
    return out


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, "outer", read_cases(metafunc.config, "holitom", "index.json"))
    parametrize(metafunc, "inner", read_cases(metafunc.config, "holitom", "inner_index.json"))


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return folder_of(request.config, "holitom")


def arrays(folder: Path, name: str) -> dict[str, Any]:
    with np.load(folder / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) if file[key].ndim else file[key].item() for key in file.files}


# --- the released code


def compressed(folder: Path, case: dict[str, Any], **changes: Any) -> tuple[HoliTomTokens, dict[str, Any]]:
    """What a case gives, and what it is to give."""
    wanted, inputs = arrays(folder, case["case"]), arrays(folder, case["inputs"])
    settings: dict[str, Any] = {
        "ratio": wanted["ratio"],
        "tau": wanted["tau"],
        "beta": None if wanted["no_beta"] else wanted["beta"],
        "neighbours": wanted["K"],
        "max_window": wanted["max_window"],
        "faithful": True,
    }
    noise = wanted["dpc_noise"] if len(wanted["dpc_noise"]) else None
    noise = changes.pop("noise", noise)
    given_ = HoliTomSettings(**(settings | changes))
    return compress(inputs["features"], inputs["attention"], given_, noise=noise), wanted


def test_every_vector_is_listed(request: pytest.FixtureRequest, folder: Path) -> None:
    listed = {case["case"] for case in read_cases(request.config, "holitom", "index.json")}
    listed |= {case["case"] for case in read_cases(request.config, "holitom", "inner_index.json")}
    found = {path.stem for path in folder.glob("*.npz") if path.stem.partition("_")[0] in ("case", "edge", "inner")}
    assert listed == found


def test_golden(folder: Path, outer: dict[str, Any]) -> None:
    out, wanted = compressed(folder, outer)
    assert out.segmentation.bounds.tolist() == wanted["segments"].tolist()
    assert out.segmentation.saved == wanted["total_reduced"]
    assert out.effective == pytest.approx(wanted["effective_ratio"], abs=1e-12)
    assert torch.equal(out.segmentation.static, wanted["static_mask"])
    table = wanted["token_table"]
    assert out.positions.tolist() == (table[:, 2] * 196 + table[:, 4]).tolist()
    assert out.last.tolist() == table[:, 3].tolist()
    assert [len(one) for one in out.centres] == wanted["dpc_cluster_num"].tolist()
    assert scored(out) == wanted["dpc_centers_score_order"].tolist()
    tokens = out.tokens
    if wanted["grid_newline"]:
        rows = with_newlines(out.positions, 14)
        table_rows = table[wanted["grid_row"]].clone()
        assert ((rows < 0) == (wanted["grid_row"] < 0)).all()
        real = rows >= 0
        assert torch.equal(out.positions[rows[real]] % 196, table_rows[real, 4].long())
        tokens = torch.where(real[:, None], tokens[rows], NEWLINE)
    torch.testing.assert_close(tokens, wanted["tokens"], **TOLERANCE)


def scored(out: HoliTomTokens) -> list[int]:
    """Centres by falling score, as indices among the static positions of their segment."""
    static = out.segmentation.static[torch.from_numpy(out.segmentation.static_counts > 0)]
    kept = [mask for mask in static if mask.any()]
    found = zip(out.centres, kept, strict=True) if len(kept) == len(out.centres) else ()
    return [int(mask[:place].sum()) for order, mask in found for place in order.tolist()]


def test_golden_cuts(folder: Path) -> None:
    units = arrays(folder, "unit_segmentation")
    for n in range(units["n"]):
        found = segment(units[f"sim_{n}"] > units[f"tau_{n}"], units[f"maxw_{n}"])
        assert found.bounds.tolist() == units[f"segments_{n}"].tolist()
        assert found.saved == units[f"total_reduced_{n}"]


def test_golden_peaks(folder: Path) -> None:
    units = arrays(folder, "unit_dpc_knn")
    for n in range(units["n"]):
        x, count = units[f"x_{n}"][None], units[f"cluster_num_{n}"]
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
        apart = spacing(x, valid)
        order = by_peak(apart, valid, torch.tensor([units[f"k_{n}"]]))
        assert order[0, :count].tolist() == units[f"centers_score_order_{n}"].tolist()
        own = first_of(order, torch.tensor([count]))
        merged = fold(x, apart, valid, own, count, count, units["beta"])
        torch.testing.assert_close(merged, units[f"merged_{n}"], **TOLERANCE)


def test_golden_inside_the_language_model(folder: Path, inner: dict[str, Any]) -> None:
    case = arrays(folder, inner["case"])
    visual = torch.arange(case["start"], case["start"] + case["length"])
    plan = plan_inner(case["hidden"], case["attn_last"].mean(0), visual, kept_tokens(case["length"], case["r"]))
    assert plan.kept.tolist() == case["keep_index"].tolist()
    assert plan.targets[plan.into].tolist() == case["merged_into"].tolist()
    torch.testing.assert_close(plan.apply(case["hidden"]), case["hidden_out"], atol=1e-6, rtol=0)


OWN = HOME / "holitom"
SEEDED = {"case": "edge_T4_static_one_seeded1", "inputs": "inputs_T4_static_one"}


@pytest.mark.parametrize("changes", [{"beta": 1.0}, {"tau": 0.65}, {"ratio": 0.2}, {"max_window": 2}])
def test_the_vectors_tell_settings_apart(changes: dict[str, Any]) -> None:
    """Negative control."""
    out, wanted = compressed(OWN, {"case": "case_T8_r015_tau80_zero", "inputs": "inputs_T8"}, **changes)
    assert out.tokens.shape != wanted["tokens"].shape or not torch.allclose(out.tokens, wanted["tokens"], **TOLERANCE)


def test_noise_alone_chooses_a_single_centre_in_the_released_form() -> None:
    _, wanted = compressed(OWN, SEEDED)
    picks = {
        form: {
            int(
                compressed(OWN, SEEDED, noise=torch.rand(9, generator=torch.Generator().manual_seed(n)), faithful=form)[
                    0
                ].centres[0]
            )
            for n in range(20)
        }
        for form in (True, False)
    }
    assert len(picks[True]) > 3
    assert len(picks[False]) == 1  # negative control: the corrected form tells places apart
    assert int(wanted["dpc_cluster_num"]) == 1


def test_the_corrected_form_keeps_a_token_of_a_static_region() -> None:
    case = {"case": "edge_T4_static_zero_zero", "inputs": "inputs_T4_static_zero"}
    (released, _), (corrected, _) = compressed(OWN, case), compressed(OWN, case, faithful=False)
    assert (len(released.centres), len(corrected.centres)) == (0, 1)
    assert len(corrected.tokens) == len(released.tokens) + 1


# --- for any video


@st.composite
def videos(draw: st.DrawFn) -> tuple[Tensor, Tensor, HoliTomSettings]:
    """Features with scenes and copies, received attention with ties, settings."""
    frames, places, width = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scene = (torch.rand(frames, places, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5]))).cumsum(0)
    content = torch.randn(frames + 1, places, width, generator=generator)
    features = content.gather(0, scene[:, :, None].expand(-1, -1, width))
    features = features + draw(st.sampled_from([0.0, 0.1])) * torch.randn(features.shape, generator=generator)
    attention = (4 * torch.rand(frames, places, generator=generator)).round() / 4
    settings = HoliTomSettings(
        draw(st.floats(0.01, 1)),
        draw(st.sampled_from([0.5, 0.8, 0.99])),
        draw(st.sampled_from([None, 0.0, 0.6, 1.0])),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 12)),
        draw(st.booleans()),
    )
    return features, attention, settings


@given(videos())
def test_counts_and_order(video: tuple[Tensor, Tensor, HoliTomSettings]) -> None:
    features, attention, settings = video
    out = compress(features, attention, settings)
    per_frame, found = features.shape[1], out.segmentation
    lengths = found.bounds[:, 1] - found.bounds[:, 0] + 1
    assert lengths.sum() == len(features)
    assert lengths.max() <= max(1, settings.max_window)
    wanted = 0
    for count, length in zip(found.static_counts.tolist(), lengths.tolist(), strict=True):
        static = round(count * out.effective)
        wanted += static if settings.faithful else max(static, min(1, count))
        wanted += length * math.ceil((per_frame - count) * out.effective)
    assert len(out.tokens) == len(out.positions) == len(out.last) == wanted
    assert len(set(out.positions.tolist())) == wanted
    frame = out.positions // per_frame
    assert bool((out.last >= frame).all())
    of = np.repeat(np.arange(len(lengths)), lengths)[frame.numpy()]
    merged = (out.last > frame).numpy()
    key = list(zip(of, ~merged, out.positions.tolist(), strict=True))
    assert key == sorted(key)  # segments in time; static first, by position; then frame by frame


@given(videos())
def test_what_moves_is_kept_as_it_is_by_attention(video: tuple[Tensor, Tensor, HoliTomSettings]) -> None:
    features, attention, settings = video
    out = compress(features, attention, settings)
    per_frame, found = features.shape[1], out.segmentation
    frame, place = out.positions // per_frame, out.positions % per_frame
    for (first, last), static in zip(found.bounds.tolist(), found.static, strict=True):
        for t in range(first, last + 1):
            kept = place[(frame == t) & (out.last == t)].tolist()
            moving = [s for s in range(per_frame) if not static[s]]
            count = math.ceil(len(moving) * out.effective)
            assert kept == sorted(sorted(moving, key=lambda s: (-float(attention[t, s]), s))[:count])
    alone = out.last == frame
    assert torch.equal(out.tokens[alone], features.flatten(0, 1)[out.positions[alone]])


@given(videos())
def test_the_same_video_gives_the_same_tokens(video: tuple[Tensor, Tensor, HoliTomSettings]) -> None:
    first, again = compress(*video), compress(*video)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.positions, again.positions)


@given(videos())
def test_merged_tokens_stay_within_what_they_are_made_of(video: tuple[Tensor, Tensor, HoliTomSettings]) -> None:
    features, attention, settings = video
    tokens = compress(features, attention, settings).tokens
    slack = 1e-5
    assert bool((tokens <= features.amax((0, 1)) + slack).all())
    assert bool((tokens >= features.amin((0, 1)) - slack).all())


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
def test_no_other_cuts_save_more(frames: int, places: int, window: int, seed: int) -> None:
    """Against all 2^(T-1) ways to cut."""
    steady = torch.rand(frames - 1, places, generator=torch.Generator().manual_seed(seed)) < 0.6
    best = 0
    for cuts in range(2 ** (frames - 1)):
        bounds = [0, *(t + 1 for t in range(frames - 1) if cuts >> t & 1), frames]
        parts = list(itertools.pairwise(bounds))
        if max(b - a for a, b in parts) <= window:
            best = max(best, sum(int(steady[a : b - 1].all(0).sum()) * (b - a - 1) for a, b in parts))
    assert segment(steady, window).saved == best


def test_of_equally_good_cuts_the_last_segment_is_the_shorter() -> None:
    steady = torch.tensor([[True, False], [False, True]])
    assert segment(steady).bounds.tolist() == [[0, 1], [2, 2]]
    assert best_cuts(np.zeros((3, 3), dtype=np.int64), 3) == [(0, 0), (1, 1), (2, 2)]


def test_counts_of_tokens_round_to_the_even_number_or_up() -> None:
    found = Segmentation(np.zeros((3, 2), np.int64), np.array([1, 3, 5]), 0, torch.zeros(3, 9, dtype=torch.bool))
    centres, dynamic = counts(found, 0.5, 9, True)
    assert (centres.tolist(), dynamic.tolist()) == ([0, 2, 2], [4, 3, 2])
    assert counts(found, 0.5, 9, False)[0].tolist() == [1, 2, 2]


def test_a_position_as_alike_as_tau_is_not_static() -> None:
    x = torch.eye(4)[:, None].repeat(1, 3, 1)  # cosines of exactly 0
    for tau, saved in ((0.0, 0), (-0.1, 9)):
        assert compress(x, torch.ones(4, 3), HoliTomSettings(0.5, tau)).segmentation.saved == saved


def test_the_released_form_compares_in_the_features_dtype() -> None:
    x = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0)).half()
    half, single = (similarity(x[:2], dtype=dtype)[0].float() for dtype in (None, torch.float32))
    where = int((single - half).argmax())
    between = float(single[where] + half[where]) / 2
    settings = (HoliTomSettings(0.5, between, faithful=faithful) for faithful in (True, False))
    static = [compress(x[:2], torch.ones(2, 50), one).segmentation.static[0, where] for one in settings]
    assert static == [False, True]
    assert similarity(x, dtype=None).dtype == torch.float16
    assert similarity(x).dtype == torch.float32
    torch.testing.assert_close(similarity(x, dtype=None).float(), similarity(x), atol=2e-3, rtol=0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"features must be \[T, S, D\] and attention \[T, S\], got"):
        compress(torch.ones(2, 3, 4), torch.ones(2, 4), HoliTomSettings(0.1))
    with pytest.raises(UserError, match=r"must be \[frames - 1, positions\], got \[3\]"):
        segment(torch.ones(3, dtype=torch.bool))


# --- the method


def test_around_a_vision_part() -> None:
    vision = LLAVA_ONEVISION.vision(tiny_tower("siglip"), tiny_projector())
    trace: dict[str, Tensor] = {}
    method = by_name("holitom", {"retention_ratio": 0.3, "tau": 0.5, "seed": 3})
    out = encode(vision, made_video("scenes", 8), method, trace=trace)
    assert torch.equal(out.received, vision.tower.received(vision.tower.layers[3], state_before(vision, 3)))
    noise = torch.rand(8 * 9, generator=torch.Generator().manual_seed(3))
    wanted = compress(trace["features"], trace["relevance"], HoliTomSettings(0.3, 0.5), noise=noise)
    assert torch.equal(out.tokens, wanted.tokens)
    assert torch.equal(out.positions, wanted.positions)
    assert out.frames_per_stage == (8,)


@torch.no_grad()
def state_before(vision: Any, layer: int) -> Tensor:
    hidden = vision.tower.embed(made_video("scenes", 8))
    for one in vision.tower.layers[:layer]:
        hidden, _ = vision.tower.run_layer(one, hidden)
    return hidden


def test_merging_inside_the_language_model_is_part_of_it() -> None:
    assert by_name("holitom", {"inner_layer": 1}).inner == InnerSettings(1, 0.5)
    assert by_name("holitom", {"inner_layer": 1, "inner_ratio": 0.0}).inner is None
    assert by_name("holitom", {}).inner is None
    assert by_name("holitom", {"inner_layer": 1, "faithful": True}).inner == InnerSettings(1, 0.5, causal=False)


def test_a_whole_model_generates_with_both_parts() -> None:
    model, prompt, pixels = tiny_llava(), video_prompt(8), made_video("scenes", 8)[None]
    texts = []
    for settings in ({}, {"inner_layer": 1, "inner_ratio": 0.9}):
        with apply_earlytom(model, by_name("holitom", {"retention_ratio": 0.5, "tau": 0.5} | settings)):
            given_: dict[str, Any] = {"input_ids": prompt, "pixel_values_videos": pixels, "do_sample": False}
            out = model.generate(**given_, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        texts.append(out.logits[0])
    assert not torch.allclose(*texts)
