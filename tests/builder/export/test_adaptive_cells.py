"""The ONNX bodies of "cells" in the adaptive schedule decide as `earlytom.cells` does, for any number of frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builder.export import adaptive_cells as bodies
from builder.export.vision import OPSET
from earlytom.budget import token_count
from earlytom.cells.merge import change, normalised, plan_cells, unit
from earlytom.cells.select import affinity, likeness, saliency, select_greedy, select_rounds, token_sizes
from earlytom.standing import places, size_bias
from tests.builder.export.test_functions import FLOAT, HALF, INT64, call, run, value
from tests.earlytom.cells.test_merge import clip

MOST, PER_FRAME, WIDTH = 8, 9, 16  # F, P, E
KINDS = ("noise", "drift", "still", "repeats", "zero")


def plan_model(threshold: float, power: float, prefix: int, dtype: ir.DataType = FLOAT) -> Any:
    outputs = [
        value("weights", FLOAT, 5, "n", "n"),
        value("member", FLOAT, "n", "n"),
        value("taken", INT64, "n", 5),
        value("count", INT64, 1),
    ]
    body = bodies.adaptive_cell_plan(prefix=prefix, opset=OPSET)
    attributes = {"threshold": threshold, "power": power, "prefix": prefix}
    return call(body, [value("hidden", dtype, "n", 5, WIDTH)], outputs, attributes)


def expect_equal_plan(model: Any, hidden: Tensor, threshold: float, power: float, prefix: int) -> None:
    weights, member, taken, (count,) = run(model, hidden=hidden.numpy())
    wanted = plan_cells(hidden, None, power, prefix, threshold=threshold)
    assert count == len(wanted.member)
    assert np.array_equal(member[:count], wanted.member.numpy())
    assert np.array_equal(taken[:count], wanted.taken.numpy())
    np.testing.assert_allclose(weights[:, :count], wanted.weights.numpy(), rtol=0, atol=1e-4)
    assert not weights[:, count:].any()
    assert not member[count:].any()
    assert taken.max() < len(hidden)  # what is gathered by it is there


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    frames=st.integers(1, 16),
    threshold=st.sampled_from([0.0, 0.01, 0.02, 0.03, 0.1, 1.0, 2.5]),
    power=st.sampled_from([0.0, 2.0, 4.0]),
    prefix=st.integers(0, 1),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_plan_is_decided_as_in_the_reference(
    kind: str, frames: int, threshold: float, power: float, prefix: int, half: bool, seed: int
) -> None:
    hidden = clip(kind, frames, 5, seed).to(torch.float16 if half else torch.float32)
    expect_equal_plan(plan_model(threshold, power, prefix, HALF if half else FLOAT), hidden, threshold, power, prefix)


def test_the_comparison_of_plans_would_notice_another_rule() -> None:
    """Negative control."""
    hidden = clip("drift", 12, 5, 0)
    usual = float(change(unit(normalised(hidden))).median())
    expect_equal_plan(plan_model(usual, 4.0, 0), hidden, usual, 4.0, 0)
    for threshold, power, prefix in ((1.5 * usual, 4.0, 0), (usual, 2.0, 0), (usual, 4.0, 3)):
        with pytest.raises(AssertionError):
            expect_equal_plan(plan_model(threshold, power, prefix), hidden, usual, 4.0, 0)


def take_model(ratio: float, rounds: int | None) -> Any:
    body = bodies.adaptive_take_cells(frames=MOST, per_frame=PER_FRAME, ratio=ratio, rounds=rounds, opset=OPSET)
    inputs = [
        value("features", FLOAT, "n", PER_FRAME, WIDTH),
        value("salient", FLOAT, "M"),
        value("alike", FLOAT, "M", "M"),
    ]
    outputs = [value("tokens", FLOAT, "N", WIDTH), value("positions", INT64, "N"), value("count", INT64, 1)]
    return call(body, inputs, outputs, {"frames": MOST, "ratio": ratio, "rounds": rounds or 0})


def of_features(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = features.flatten(0, 1)
    affine = affinity(tokens, torch.arange(float(len(features))).repeat_interleave(PER_FRAME), MOST)
    return saliency(tokens), affine, likeness(affine)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    frames=st.integers(1, MOST),
    ratio=st.sampled_from([0.01, 0.1, 0.3, 0.77, 1.0]),
    rounds=st.one_of(st.none(), st.sampled_from([1, 3, 7, 40])),
    seed=st.integers(0, 2**16),
)
def test_tokens_are_taken_as_in_the_reference(
    kind: str, frames: int, ratio: float, rounds: int | None, seed: int
) -> None:
    """As many as so many frames give, also where there are fewer tokens than rounds, and where all stay."""
    features = clip(kind, frames, PER_FRAME, seed)
    salient, _, alike = of_features(features)
    feeds = {"features": features.numpy(), "salient": salient.numpy(), "alike": alike.numpy()}
    tokens, positions, (count,) = run(take_model(ratio, rounds), **feeds)
    wanted = token_count(MOST, PER_FRAME, ratio, frames_out=frames)
    assert count == len(positions) == len(tokens) == wanted
    choice = (salient, alike, wanted)
    taken = select_greedy(*choice) if rounds is None else select_rounds(*choice, rounds)
    assert positions.tolist() == taken.tolist()
    np.testing.assert_array_equal(tokens, features.flatten(0, 1)[taken].numpy())


def test_the_forms_take_other_tokens() -> None:
    """Negative control."""
    features = clip("noise", MOST, PER_FRAME, 1)
    salient, _, alike = of_features(features)
    feeds = {"features": features.numpy(), "salient": salient.numpy(), "alike": alike.numpy()}
    forms = [run(take_model(0.3, rounds), **feeds)[1].tolist() for rounds in (None, 1, 40)]
    assert forms[0] == forms[2] != forms[1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), frames=st.integers(1, MOST), share=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_what_tokens_stand_for_is_that_of_the_reference(kind: str, frames: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, affine, _ = of_features(clip(kind, frames, PER_FRAME, seed))
    time = torch.randint(0, MOST, (frames, PER_FRAME), generator=generator)
    size = torch.rand(frames, PER_FRAME, generator=generator) * 4
    taken = torch.randperm(len(affine), generator=generator)[: 1 + round(share * (len(affine) - 1))].sort().values
    body = bodies.adaptive_cell_standing(per_frame=PER_FRAME, opset=OPSET)
    inputs = [
        value("affine", FLOAT, "M", "M"),
        value("time", INT64, "n", PER_FRAME),
        value("size", FLOAT, "n", PER_FRAME),
        value("positions", INT64, "N"),
    ]
    model = call(body, inputs, [value("place", INT64, "N"), value("bias", FLOAT, "N")], {})
    feeds = {"affine": affine, "time": time, "size": size, "positions": taken}
    place, bias = run(model, **{name: given.numpy() for name, given in feeds.items()})
    assert place.tolist() == places(time, taken, PER_FRAME).tolist()
    wanted = size_bias(token_sizes(affine, size.flatten(), taken))
    np.testing.assert_allclose(bias, wanted.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        bodies.adaptive_cell_plan(prefix=1, opset=OPSET),
        bodies.adaptive_take_cells(frames=32, per_frame=196, ratio=0.1, rounds=7, opset=OPSET),
        bodies.adaptive_cell_standing(per_frame=196, opset=OPSET),
    ],
)
def test_bodies_are_made_of_ordinary_operators(body: ir.Function) -> None:
    """No size hangs on a value, and nothing is what a compiler refuses, runs on the host or orders as it likes."""
    kinds = {node.op_type for node in body}
    assert not kinds & {"NonZero", "Loop", "If", "Scan", "TopK", "ArgMax", "ArgMin", "Compress", "Unique"}
    assert not any(kind.startswith("Scatter") for kind in kinds)
