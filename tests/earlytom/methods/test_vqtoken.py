"""VQToken: the released code's vectors, and properties of its codebook.

    pytest tests/earlytom/methods/test_vqtoken.py --golden DIR

runs the cases of another folder that is laid out as `tests/golden/vqtoken`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.encoder import VisualTokens, encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.method import Counts
from earlytom.methods import by_name
from earlytom.vqtoken.attention import VQAttention
from earlytom.vqtoken.codebook import (
    LEAST,
    SPREAD,
    Fit,
    bend,
    codebook,
    directions,
    draw,
    draws_needed,
    fit,
    fit_adaptive,
    fit_seeded,
    left_over,
    medoids,
    seed_rows,
)
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower
from tests.golden_vectors import HOME, folder_of, parametrize, read_cases

CODES: dict[str, float] = {"atol": 2e-6, "rtol": 0}
ATTENTION: dict[str, float] = {"atol": 1e-5, "rtol": 0}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    listed = read_cases(metafunc.config, "vqtoken", "index.json")
    cases = [one | {"case": one["name"]} for one in listed["cases"]]
    parametrize(metafunc, "case", cases)
    parametrize(metafunc, "attended", [{"case": n} for n in range(len(listed.get("attention", [])))])


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return folder_of(request.config, "vqtoken")


def arrays(path: Path) -> dict[str, Tensor]:
    """All arrays of a file, half precision as fp32."""
    with np.load(path) as file:
        found = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    return {key: value.float() if value.dtype == torch.float16 else value for key, value in found.items()}


# --- the released code


def test_every_vector_is_listed(request: pytest.FixtureRequest, folder: Path) -> None:
    named = {one["name"] for one in read_cases(request.config, "vqtoken", "index.json")["cases"]}
    assert {path.stem for path in folder.glob("*.npz")} - {"attention", "attention_weights"} == named


def fits_of(case: dict[str, Any], file: dict[str, Tensor]) -> tuple[Tensor, list[Fit]]:
    """Directions of a case's tokens, and its fits."""
    unit, cap = directions(file["tokens"].flatten(0, 1)), case["max_iteration"]
    if "u" not in file:  # copies: seeds are given
        return unit, [fit(unit, seeds, cap) for seeds in file["seed_index"].split(file["fit_K"].tolist())]
    if case["kind"] == "fixed":
        return unit, [fit_seeded(unit, file["u"], cap)]
    rule: Any = "silhouette" if case["kind"] == "silhouette" else "released"
    return unit, fit_adaptive(unit, file["u"], case["max_K"], rule, cap)


def test_golden(folder: Path, case: dict[str, Any]) -> None:
    file = arrays(folder / f"{case['name']}.npz")
    unit, fits = fits_of(case, file)
    assert [len(one.seeds) for one in fits] == file["fit_K"].tolist()
    assert torch.cat([one.seeds for one in fits]).tolist() == file["seed_index"].tolist()
    assert [int(one.rounds) for one in fits] == file["fit_iterations"].tolist()
    assert fits[-1].labels.tolist() == file["index_map"].flatten().tolist()
    torch.testing.assert_close(codebook(unit, fits[-1]), file["codebook"], **CODES)
    torch.testing.assert_close(fits[-1].centres, file["final_centroids"], **CODES)
    if "distortion" in file:
        curve = torch.stack([left_over(unit, one) for one in fits[:-1]])
        torch.testing.assert_close(curve, file["distortion"], atol=1e-3, rtol=0)
        assert bend(curve, "released") == int(file["K_released"])
        assert bend(curve, "intended") == int(file["K_intended"])
    if "seed_probabilities" in file:
        for n, chances in enumerate(file["seed_probabilities"]):
            near = torch.cdist(unit, unit[fits[0].seeds[: n + 1]]).amin(1)
            weights = near**2 + SPREAD
            torch.testing.assert_close(weights / weights.sum(), chances, atol=1e-6, rtol=1e-4)


def test_golden_attention(folder: Path, attended: dict[str, Any]) -> None:
    n, file = attended["case"], arrays(folder / "attention.npz")
    module = VQAttention.from_weights(arrays(folder / "attention_weights.npz"))
    with torch.no_grad():
        out = module(file[f"index_map_{n}"], file[f"codebook_{n}"])
    torch.testing.assert_close(out, file[f"out_{n}"], **ATTENTION)


OWN = HOME / "vqtoken"


def test_the_vectors_tell_rules_and_caps_apart() -> None:
    """Negative control."""
    file = arrays(OWN / "c09_iteration_cap_2.npz")
    unit = directions(file["tokens"].flatten(0, 1))
    assert not torch.allclose(fit_seeded(unit, file["u"], 1).centres, file["final_centroids"], **CODES)
    assert not torch.equal(fit_seeded(unit, file["u"].flip(0), 2).seeds, file["seed_index"])
    file = arrays(OWN / "c07_adaptive_released_above_12.npz")
    assert int(file["K_released"]) != int(file["K_intended"])


def test_attention_refuses_to_run_untrained() -> None:
    labels, codes = torch.zeros(2, 36), torch.ones(3, 32)
    with pytest.raises(UserError, match="VQ-attention is trained and has no weights yet"):
        VQAttention(36, 32)(labels, codes)
    weights = arrays(OWN / "attention_weights.npz")
    assert VQAttention.from_weights(weights)(labels, codes).shape == (3, 32)
    partly = VQAttention(36, 32)
    partly.load_state_dict({"to_q_proj.bias": weights["to_q_proj.bias"]}, strict=False)
    with pytest.raises(UserError, match="has no weights yet"):
        partly(labels, codes)
    for lacking in ("to_q_proj.weight", "transformer_decoder.layers.0.norm1.bias"):
        with pytest.raises(UserError, match="these are no weights of VQ-attention"):
            VQAttention.from_weights({key: value for key, value in weights.items() if key != lacking})
    with pytest.raises(UserError, match="8 heads, which do not divide a width of 20"):
        VQAttention(36, 20)


# --- any tokens


@st.composite
def problems(draw_: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Tokens with copies and scales, draws, the cap."""
    count, clusters = draw_(st.integers(1, 40)), draw_(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 2**31)))
    tokens = torch.randn(count, 6, generator=generator) * draw_(st.sampled_from([1e-3, 1.0, 20.0]))
    if draw_(st.booleans()):
        tokens = tokens[torch.randint(0, min(3, count), (count,), generator=generator)]
    uniforms = torch.rand(clusters, dtype=torch.float64, generator=generator)
    return tokens, uniforms, draw_(st.integers(1, 20))


@given(problems())
def test_a_fit_is_that_of_a_plain_loop(problem: tuple[Tensor, Tensor, int]) -> None:
    tokens, uniforms, cap = problem
    unit = directions(tokens)
    found = fit_seeded(unit, uniforms, cap)
    centres, labels, rounds = unit[found.seeds].double(), [], 0
    for _ in range(cap):
        rounds += 1
        cosine = unit.double() @ (centres / centres.norm(dim=1, keepdim=True)).T
        labels = (cosine >= cosine.amax(1, keepdim=True) - 2e-7).byte().argmax(1).tolist()
        groups = [unit[[m for m, label in enumerate(labels) if label == k]].double() for k in range(len(centres))]
        moved = torch.stack([g.mean(0) if len(g) else c for g, c in zip(groups, centres, strict=True)])
        if float((centres - moved).norm()) < 1e-4:
            break
        centres = moved
    assert found.labels.tolist() == labels
    assert int(found.rounds) == rounds
    torch.testing.assert_close(found.centres.double(), centres, atol=1e-5, rtol=0)


@given(problems())
def test_codes_are_short_and_medoids_belong_to_them(problem: tuple[Tensor, Tensor, int]) -> None:
    tokens, uniforms, cap = problem
    unit = directions(tokens)
    found = fit_seeded(unit, uniforms, cap)
    codes, places = codebook(unit, found), medoids(unit, found)
    assert bool((codes.norm(dim=1) <= 1 + 1e-5).all())
    for k, place in enumerate(places.tolist()):
        members = (found.labels == k).nonzero().flatten().tolist()
        assert place in members if members else place == int(found.seeds[k])
        if not members:
            assert codes[k].tolist() == [0] * 6


@given(st.integers(1, 30), st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
def test_a_draw_is_where_the_sum_exceeds_it(rows: int, uniform: float, seed: int) -> None:
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 1e-3
    total = (weights / weights.sum()).double().cumsum(0)
    total = total / total[-1]
    first = next(n for n, value in enumerate(total.tolist()) if value > uniform)
    assert int(draw(weights, torch.tensor(uniform, dtype=torch.float64))) == first


def test_seeds_are_spread() -> None:
    """Two far groups: the second seed is almost never in the group of the first."""
    unit = directions(torch.cat([torch.eye(4)[:1].repeat(50, 1), -torch.eye(4)[:1].repeat(50, 1)]))
    generator = torch.Generator().manual_seed(0)
    rows = [seed_rows(unit, torch.rand(2, dtype=torch.float64, generator=generator)).tolist() for _ in range(50)]
    assert all((a < 50) != (b < 50) for a, b in rows)
    assert len({a for a, _ in rows}) > 20


def test_copies_are_drawn_like_any_other() -> None:
    rows = seed_rows(directions(torch.ones(4, 6)), torch.tensor([0.5, 0.25, 0.6, 0.99], dtype=torch.float64))
    assert rows.tolist() == [2, 1, 2, 3]  # a draw of exactly a cumulative probability exceeds it at the next row


@pytest.mark.parametrize(("angle", "clusters", "rounds"), [(1e-4, 1, 1), (1.6e-4, 1, 1), (1.6e-4, 2, 2)])
def test_a_fit_whose_means_hardly_move_ends_before_they_do(angle: float, clusters: int, rounds: int) -> None:
    """Means move by half the angle; of two clusters together by 1.13e-4."""
    pairs = [torch.tensor([[1.0, 0.0, 0.0], [1.0, angle, 0.0]]), torch.tensor([[0.0, 0.0, 1.0], [0.0, angle, 1.0]])]
    unit = directions(torch.cat(pairs[:clusters]))
    found = fit(unit, torch.tensor([0, 2][:clusters]))
    assert int(found.rounds) == rounds
    assert torch.equal(found.centres, unit[[0, 2][:clusters]]) == (rounds == 1)


def test_a_medoid_is_a_member_though_another_is_nearer() -> None:
    unit = directions(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    found = Fit(torch.tensor([0, 1]), torch.tensor([0, 1, 0]), unit[:2], torch.tensor(1))
    assert medoids(unit, found).tolist() == [0, 1]


def test_a_choice_takes_three_points_and_enough_draws() -> None:
    unit, plenty = directions(torch.randn(40, 6)), torch.rand(draws_needed(14), dtype=torch.float64)
    assert len(fit_adaptive(unit, plenty, 14, "intended")) == 4
    with pytest.raises(UserError, match="chosen from 12 to at least 14, got most=13"):
        fit_adaptive(unit, plenty, 13, "released")
    with pytest.raises(UserError, match="draws are needed, got 20"):
        fit_adaptive(unit, plenty[:20], 14, "released")
    with pytest.raises(UserError, match="one uniform draw for each cluster"):
        fit_seeded(unit, plenty[:0])


@pytest.mark.parametrize(("tokens", "clusters"), [(49, 16), (50, 12)])
def test_silhouettes_say_nothing_about_the_clusters(tokens: int, clusters: int) -> None:
    unit, plenty = directions(torch.randn(tokens, 6)), torch.rand(draws_needed(13), dtype=torch.float64)
    assert len(fit_adaptive(unit, plenty, 13, "silhouette")[-1].seeds) == clusters


def test_where_the_curve_bends() -> None:
    knee = torch.tensor([100.0, 80, 60, 40, 20, 19, 18, 17])
    assert bend(knee, "intended") == LEAST + 4
    assert bend(knee, "released") == LEAST  # the least number, as it reads the bend off by three


# --- the method


def seen(settings: dict[str, Any], trace: dict[str, Tensor] | None = None, kind: str = "scenes") -> VisualTokens:
    vision = LLAVA_ONEVISION.vision(tiny_tower("siglip"), tiny_projector())
    return encode(vision, made_video(kind, 8), by_name("vqtoken", settings), trace=trace)


@pytest.mark.parametrize("kind", ["scenes", "still", "noise"])
@pytest.mark.parametrize("faithful", [False, True])
def test_as_many_tokens_as_clusters(faithful: bool, kind: str) -> None:
    out = seen({"clusters": 9, "faithful": faithful}, kind=kind)
    assert out.tokens.shape == (9, 24)
    assert by_name("vqtoken", {"clusters": 9}).counts(8, 9) == Counts((8,), 9)
    assert by_name("vqtoken", {"retention_ratio": 0.25}).counts(8, 9) == Counts((8,), 18)
    assert by_name("vqtoken", {"clusters": 99}).counts(8, 9) == Counts((8,), 72)


def test_a_cluster_that_nothing_belongs_to_is_no_token_of_zeros() -> None:
    out, released = (seen({"clusters": 12, "faithful": form}, kind="still") for form in (False, True))
    assert bool(out.tokens.any(1).all())
    assert int(released.tokens.any(1).sum()) == 9  # as published it is one; a frame has no more than 9 tokens


def test_the_default_has_the_scale_of_tokens_and_their_order_in_time() -> None:
    trace: dict[str, Tensor] = {}
    out = seen({"clusters": 9}, trace)
    released = seen({"clusters": 9, "faithful": True})
    features = trace["features"].flatten(0, 1)
    assert out.positions.tolist() == sorted(out.positions.tolist())
    assert bool((released.tokens.norm(dim=1) <= 1 + 1e-5).all())
    assert float(out.tokens.norm(dim=1).mean()) > 0.5 * float(features.norm(dim=1).mean())
    assert sorted(released.positions.tolist()) == out.positions.tolist()
    order = released.positions.argsort(stable=True)
    cosine = torch.nn.functional.cosine_similarity(out.tokens, released.tokens[order])
    assert float(cosine.min()) > 0.9  # the same clusters


def test_only_the_video_tells_an_adaptive_number() -> None:
    settings = {"clusters": "adaptive", "most": 16}
    assert by_name("vqtoken", settings).counts(8, 9) is None
    assert 13 <= len(seen(settings).tokens) <= 15
    assert len(seen(settings | {"faithful": True}).tokens) == 12
    with pytest.raises(UserError, match="72 tokens make no choice of up to 80 clusters"):
        seen({"clusters": "adaptive", "most": 80})


def test_the_seed_is_all_that_is_random() -> None:
    one, again, other = (seen({"clusters": 9, "seed": seed}) for seed in (1, 1, 2))
    assert torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.tokens, other.tokens)
