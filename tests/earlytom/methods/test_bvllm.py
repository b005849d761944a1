"""B-VLLM: the released code's vectors, and properties of its merging.

    pytest tests/earlytom/methods/test_bvllm.py --golden DIR

runs the cases of another folder that is laid out as `tests/golden/bvllm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.bvllm.frames import frame_tokens, merge_candidates, merge_tokens
from earlytom.bvllm.path import BVLLMPath
from earlytom.encoder import VisualTokens, encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.methods import by_name
from earlytom.methods.controls import even_frames
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower
from tests.golden_vectors import HOME, folder_of, parametrize, read_cases

TOLERANCE: dict[str, float] = {"atol": 5e-5, "rtol": 0}
HEADS = 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    listed = read_cases(metafunc.config, "bvllm", "index.json")
    parametrize(metafunc, "case", [one | {"case": one["name"]} for one in listed["cases"]])
    for name, key in (("temporal", "unit_threshold"), ("spatial", "unit_multi")):
        parametrize(metafunc, name, [{"case": n} for n in range(listed.get(key, 0))])


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return folder_of(request.config, "bvllm")


def arrays(path: Path) -> dict[str, Tensor]:
    """All arrays of a file, half precision as fp32."""
    with np.load(path) as file:
        found = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    return {key: value.float() if value.is_floating_point() else value.long() for key, value in found.items()}


# --- the released code


def test_every_vector_is_listed(request: pytest.FixtureRequest, folder: Path) -> None:
    named = {one["name"] for one in read_cases(request.config, "bvllm", "index.json")["cases"]}
    assert {path.stem for path in folder.glob("*.npz")} - {"weights", "unit_merge"} == named


def test_golden(folder: Path, case: dict[str, Any]) -> None:
    file = arrays(folder / f"{case['name']}.npz")
    path = BVLLMPath(arrays(folder / "weights.npz"), HEADS, faithful=True)
    out = path(file["features"], file["input_ids"], file["attention_mask"], noise=file.get("gumbel"))
    if out.selection is not None:
        merge = out.selection.merge
        torch.testing.assert_close(out.selection.logits, file["logits"], **TOLERANCE)
        torch.testing.assert_close(out.selection.selector, file["selector"], **TOLERANCE)
        assert merge.survives.nonzero().flatten().tolist() == file["survivors"].tolist()
        sources = (~merge.survives).nonzero().flatten()
        assert sources.tolist() == file["sources"].tolist()
        assert merge.into[sources].tolist() == file["destinations"].tolist()
        torch.testing.assert_close(out.frames, file["merged_frames"], **TOLERANCE)
        assert frame_tokens(len(out.frames)) == case["N"]
        assert len(out.frames) == case["L"]
    torch.testing.assert_close(out.spatial, file["spatial"], **TOLERANCE)
    wanted = file["tokens"]
    torch.testing.assert_close(out.tokens.reshape(wanted.shape), wanted, **TOLERANCE)


def test_golden_merging_of_frames(folder: Path, temporal: dict[str, Any]) -> None:
    n, file = temporal["case"], arrays(folder / "unit_merge.npz")
    found = merge_candidates(file[f"rows_{n}"], float(file[f"threshold_{n}"]))
    assert found.survives.nonzero().flatten().tolist() == file[f"survivors_{n}"].tolist()
    sources = (~found.survives).nonzero().flatten()
    assert sources.tolist() == file[f"sources_{n}"].tolist()
    assert found.into[sources].tolist() == file[f"destinations_{n}"].tolist()
    merged = found.merge(file[f"frames_{n}"], faithful=True)
    torch.testing.assert_close(merged, file[f"merged_{n}"], **TOLERANCE)


def test_golden_merging_of_tokens(folder: Path, spatial: dict[str, Any]) -> None:
    n, file = spatial["case"], arrays(folder / "unit_merge.npz")
    merged = merge_tokens(file[f"mx_{n}"], int(file[f"target_{n}"])).values
    torch.testing.assert_close(merged, file[f"mout_{n}"], **TOLERANCE)


OWN = HOME / "bvllm"


def test_the_vectors_tell_noise_questions_and_forms_apart() -> None:
    """Negative control."""
    file, weights = arrays(OWN / "c07_T6_chain_loss.npz"), arrays(OWN / "weights.npz")
    given_ = (file["features"], file["input_ids"], file["attention_mask"])
    released, corrected = (BVLLMPath(weights, HEADS, faithful=form) for form in (True, False))
    assert not torch.allclose(corrected(*given_, noise=file["gumbel"]).frames, file["merged_frames"], **TOLERANCE)
    quiet = released(*given_)
    assert torch.equal(quiet.tokens, released(*given_).tokens)
    selection = quiet.selection
    assert selection is not None
    assert not torch.allclose(selection.selector, file["selector"], **TOLERANCE)
    other = released(file["features"], (file["input_ids"] + 1) % 40, file["attention_mask"], noise=file["gumbel"])
    assert other.selection is not None
    assert not torch.allclose(other.selection.logits, file["logits"], **TOLERANCE)


def test_without_trained_weights_it_refuses() -> None:
    weights = arrays(OWN / "weights.npz")
    for name in (
        "ln.weight",
        "val_projector.bias",
        "spatial.query",
        "temporal.bert.encoder.layer.2.output_query.dense.weight",
    ):
        lacking = {key: value for key, value in weights.items() if key != name}
        with pytest.raises(UserError, match=r"is trained and has no '.*: load the weights of a checkpoint"):
            BVLLMPath(lacking, HEADS)
    with pytest.raises(UserError, match="a Q-Former is trained and has no"):
        BVLLMPath({}, HEADS)


def test_a_video_takes_one_question() -> None:
    path = BVLLMPath(arrays(OWN / "weights.npz"), HEADS)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(UserError, match="a video takes one question at a time, got 2"):
        path(torch.randn(4, 5, 24), ids, torch.ones(2, 3))
    assert path(torch.randn(1, 5, 24), ids, torch.ones(2, 3)).tokens.shape == (2, 32, 40)


def test_padding_of_a_question_changes_nothing() -> None:
    path, features = BVLLMPath(arrays(OWN / "weights.npz"), HEADS), torch.randn(4, 5, 24)
    ids = torch.tensor([[3, 4, 5]])
    padded = torch.cat([ids, torch.full((1, 4), 7)], 1)
    short = path(features, ids, torch.ones(1, 3))
    long = path(features, padded, torch.tensor([[1, 1, 1, 0, 0, 0, 0]]))
    torch.testing.assert_close(long.tokens, short.tokens, **TOLERANCE)
    loud = path(features, padded, torch.ones(1, 7))
    assert loud.tokens.shape != short.tokens.shape or not torch.allclose(loud.tokens, short.tokens, **TOLERANCE)


# --- any candidates


@st.composite
def candidates(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """How much of each frame candidates are made of, and the candidates."""
    count, frames = draw(st.integers(1, 16)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.softmax(draw(st.sampled_from([0.1, 1.0, 5.0])) * torch.randn(count, frames, generator=generator), 1)
    if draw(st.booleans()):
        rows = rows[torch.randint(0, count, (count,), generator=generator)]
    return rows, torch.randn(count, 3, 2, generator=generator)


@given(candidates(), st.booleans())
def test_who_survives(made: tuple[Tensor, Tensor], faithful: bool) -> None:
    rows, values = made
    found = merge_candidates(rows)
    assert bool(found.survives[0])
    index = torch.arange(len(rows))
    assert bool((found.into <= index).all())
    assert torch.equal(found.into == index, found.survives)
    merged = found.merge(values, faithful=faithful)
    assert merged.shape == (int(found.survives.sum()), 3, 2)
    padded, which = found.padded(values, faithful=faithful)
    assert torch.equal(padded[: len(merged)], merged)
    assert bool(torch.isfinite(padded).all())
    assert which.tolist() == sorted(which.tolist(), reverse=True)


@given(candidates())
def test_the_corrected_form_loses_nothing(made: tuple[Tensor, Tensor]) -> None:
    rows, values = made
    found = merge_candidates(rows)
    ends = found.ends()
    assert bool(found.survives[ends].all())
    counts = torch.bincount(ends, minlength=len(rows))[found.survives]
    total = (found.merge(values) * counts[:, None, None]).sum(0)
    torch.testing.assert_close(total, values.sum(0), atol=1e-4, rtol=1e-4)


@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_as_many_tokens_as_asked_for(tokens: int, target: int, seed: int) -> None:
    x = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(seed))
    merged = merge_tokens(x, target).values
    assert merged.shape == (2, min(tokens, target), 5)
    assert bool((merged.amax(1) <= x.amax(1) + 1e-5).all())
    if target >= tokens:
        assert torch.equal(merged, x)


def test_frames_share_a_budget() -> None:
    assert [frame_tokens(n) for n in (1, 5, 8, 13, 16, 32, 1000)] == [576, 115, 72, 44, 36, 18, 1]


def test_candidates_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match=r"must be \[candidates, frames\] with a candidate, got \[3\]"):
        merge_candidates(torch.ones(3))
    with pytest.raises(UserError, match="at least 1 of 4 tokens are left, got a target of 0"):
        merge_tokens(torch.ones(1, 4, 2), 0)


def test_shapes_need_no_values() -> None:
    found = merge_candidates(torch.empty(16, 8, device="meta"))
    assert found.padded(torch.empty(16, 4, 6, device="meta"))[0].shape == (16, 4, 6)
    assert merge_tokens(torch.empty(2, 32, 5, device="meta"), 7).values.shape == (2, 7, 5)


# --- the likeness


def seen(settings: dict[str, Any], kind: str = "scenes", frames: int = 20) -> VisualTokens:
    vision = LLAVA_ONEVISION.vision(tiny_tower("siglip"), tiny_projector())
    return encode(vision, made_video(kind, frames), by_name("bvllm-style", settings))


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 20])
@pytest.mark.parametrize("kind", ["scenes", "noise", "still", "drift"])
def test_the_likeness_stays_within_the_budget(kind: str, frames: int, faithful: bool) -> None:
    out = seen({"retention_ratio": 0.3, "faithful": faithful}, kind, frames)
    assert len(out.tokens) <= max(16, round(0.3 * frames * 9))
    assert out.positions.tolist() == sorted(set(out.positions.tolist()))
    assert torch.equal(out.tokens, seen({"retention_ratio": 0.3, "faithful": faithful}, kind, frames).tokens)


def test_the_likeness_merges_frames_that_are_alike() -> None:
    scenes, noise = (seen({"retention_ratio": 0.3}, kind) for kind in ("still", "noise"))
    assert len({n // 9 for n in scenes.positions.tolist()}) == 1
    assert len({n // 9 for n in noise.positions.tolist()}) > 8
    features = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0)).repeat_interleave(10, 0)
    _, positions = by_name("bvllm-style", {"retention_ratio": 0.3}).choose(features, None, Mock())
    anchors = even_frames(20, 16)
    assert {n // 9 for n in positions.tolist()} == {0, min(n for n in anchors if n >= 10)}  # the first of each scene
    lax = seen({"retention_ratio": 0.3, "threshold": 0.0}, "noise")
    assert len({n // 9 for n in lax.positions.tolist()}) == 1
