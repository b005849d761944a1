"""The vectors that the released code produced: every case of every file must come out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from earlytom import EarlyTomConfig, encode_video, plan_frames, segment_frames, select_tokens, token_count
from earlytom.select import keep_mask
from tests.earlytom.reference import adaptive_plan, dense, segments, similarity, token_counts

GOLDEN = Path(__file__).parents[1] / "golden" / "earlytom"


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    return {name: np.load(GOLDEN / f"{name}.npz") for name in ("temporal", "spatial", "encoder")}


def load(vectors: dict[str, Any], file: str, name: str) -> Tensor:
    return torch.from_numpy(vectors[file][name])


def largest(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max())


def test_every_vector_is_used(vectors: dict[str, Any]) -> None:
    for file, letter in (("temporal", "t"), ("spatial", "s"), ("encoder", "e")):
        listed = {case["case"] for case in cases(file)}
        recorded = {int(name.split("_")[0].removeprefix(letter)) for name in vectors[file].files}
        assert listed == recorded
    assert (len(cases("temporal")), len(cases("spatial")), len(cases("encoder"))) == (12, 7, 3)


@pytest.mark.parametrize("case", cases("temporal"), ids=lambda c: f"{c['case']}-{c['kind']}")
def test_temporal(vectors: dict[str, Any], case: dict[str, Any]) -> None:
    n = case["case"]
    hidden, received = (load(vectors, "temporal", f"t{n}_{name}") for name in ("hidden", "received"))
    settings = {key: case[key] for key in ("tau", "max_window", "ema")}
    plan = plan_frames(hidden, **settings)
    merged = plan.apply(hidden)
    assert len(merged) == case["frames_out"]
    assert largest(merged, load(vectors, "temporal", f"t{n}_out_hidden")) < 1e-5
    assert largest(plan.apply(received), load(vectors, "temporal", f"t{n}_out_received")) < 1e-5
    found = segment_frames(merged, **settings) if case["last_layer"] else plan.segments
    assert torch.equal(found, load(vectors, "temporal", f"t{n}_segments"))


@pytest.mark.parametrize("case", cases("temporal"), ids=lambda c: f"{c['case']}-{c['kind']}")
def test_temporal_with_the_sequential_reference(vectors: dict[str, Any], case: dict[str, Any]) -> None:
    """The reference of these tests is itself held against the released code."""
    n = case["case"]
    hidden = vectors["temporal"][f"t{n}_hidden"]
    c = np.round(similarity(hidden) * 2**20) / 2**20
    settings = {key: case[key] for key in ("tau", "max_window", "ema")}
    weights = dense(adaptive_plan(c.tolist(), **settings, trailing="released"), len(hidden))
    merged = np.einsum("if,fsd->isd", weights, hidden)
    assert np.abs(merged - vectors["temporal"][f"t{n}_out_hidden"]).max() < 1e-5
    if not case["last_layer"]:
        found = segments(c.tolist(), **settings)
        assert np.array_equal(found, vectors["temporal"][f"t{n}_segments"])


def test_temporal_tells_other_settings_apart(vectors: dict[str, Any]) -> None:
    """Negative control: with another window the recorded output does not come out."""
    case = next(c for c in cases("temporal") if c["kind"] == "drift" and c["frames_out"] < c["frames"])
    hidden = load(vectors, "temporal", f"t{case['case']}_hidden")
    other = plan_frames(hidden, tau=case["tau"], max_window=3, ema=case["ema"])
    assert len(other.weights) != case["frames_out"]


@pytest.mark.parametrize("case", cases("spatial"), ids=lambda c: str(c["case"]))
def test_spatial(vectors: dict[str, Any], case: dict[str, Any]) -> None:
    n = case["case"]
    features, received, found = (load(vectors, "spatial", f"s{n}_{name}") for name in ("feat", "received", "segments"))
    tokens, positions = select_tokens(features, received, found, frames_in=case["frames_in"], ratio=case["ratio"])
    assert len(tokens) == case["tokens_out"]
    assert largest(tokens, load(vectors, "spatial", f"s{n}_out")) < 1e-5
    assert torch.equal(tokens, features.flatten(0, 1)[positions])
    static = sum(max(0, int(last - first) - 1) for first, last in found)
    count = token_count(
        case["frames_in"],
        case["grid"] ** 2,
        case["ratio"],
        "adaptive",
        frames_out=case["frames"],
        static_frames=static,
    )
    assert count == case["tokens_out"]


def test_spatial_tells_another_rule_apart(vectors: dict[str, Any]) -> None:
    """Negative control: a global choice in static frames, in place of windows, does not give the recorded tokens."""
    case = cases("spatial")[0]
    features, received = (load(vectors, "spatial", f"s0_{name}") for name in ("feat", "received"))
    places, _ = token_counts(case["grid"] ** 2, case["ratio"], case["frames_in"], case["frames"])
    mask = keep_mask(received, torch.zeros(case["frames"], dtype=torch.bool), places, places)
    wanted = load(vectors, "spatial", "s0_out")
    got = features[mask]
    assert got.shape != wanted.shape or not torch.equal(got, wanted)


def encoder_case(file: Any, case: dict[str, Any]) -> tuple[nn.Module, nn.Module, Tensor]:
    """Tower, projector and pixels of a recorded case; `file` are the arrays of encoder.npz."""
    n = case["case"]
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=case["hidden"],
            intermediate_size=case["intermediate"],
            num_hidden_layers=case["layers"],
            num_attention_heads=case["heads"],
            image_size=case["image"],
            patch_size=14,
            vision_use_head=False,
        )
    ).eval()
    prefix = f"e{n}_w."
    weights = {
        name.removeprefix(prefix): torch.from_numpy(file[name]) for name in file.files if name.startswith(prefix)
    }
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("post_layernorm") for name in missing)  # never applied
    first, second = (nn.Linear(width, case["llm_dim"]) for width in (case["hidden"], case["llm_dim"]))
    for name, linear in (("linear_1", first), ("linear_2", second)):
        linear.load_state_dict(
            {kind: torch.from_numpy(file[f"e{n}_proj.{name}.{kind}"]) for kind in ("weight", "bias")}
        )
    return tower, nn.Sequential(first, nn.GELU(), second), torch.from_numpy(file[f"e{n}_pixels"])


@pytest.mark.parametrize("case", cases("encoder"), ids=lambda c: str(c["case"]))
def test_encoder(vectors: dict[str, Any], case: dict[str, Any]) -> None:
    n = case["case"]
    config = EarlyTomConfig(
        retention_ratio=case["ratio"],
        merge_layers=tuple(case["prune_layers"]),
        tau=case["tau"],
        max_window=case["max_window"],
        ema=case["ema"],
    )
    out = encode_video(*encoder_case(vectors["encoder"], case), config)
    assert (len(out.hidden), len(out.tokens)) == (case["frames_out"], case["tokens_out"])
    for name, got in (("hidden", out.hidden), ("received", out.received), ("tokens", out.tokens)):
        assert largest(got, load(vectors, "encoder", f"e{n}_{name}")) < 1e-4
    assert torch.equal(out.segments, load(vectors, "encoder", f"e{n}_segments"))
    assert (out.frames_per_stage[0], out.frames_per_stage[-1]) == (case["frames"], case["frames_out"])
