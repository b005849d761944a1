"""The ONNX bodies of our functions decide as `earlytom.merge` and `earlytom.select` do, case for case."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from builder.export import functions
from builder.export.vision import OPSET
from earlytom.budget import dynamic_tokens, effective_ratio, static_tokens, token_count
from earlytom.config import TRAILINGS
from earlytom.errors import UserError
from earlytom.merge import SIMILARITY_STEPS, plan_similarity, static_frames
from earlytom.select import keep_mask, select_fixed

FLOAT, HALF, BOOL, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BOOL, ir.DataType.INT64
Array = NDArray[Any]


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def call(
    body: ir.Function, inputs: list[ir.Value], outputs: list[ir.Value], attributes: dict[str, Any]
) -> onnx.ModelProto:
    """A model that is one call of `body`."""
    node = ir.node(body.name, inputs, attributes, domain=functions.DOMAIN, outputs=outputs)
    opsets = {"": OPSET, functions.DOMAIN: functions.VERSION}
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports=opsets, name="call")
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[body]))


def plan_model(frames: int, frames_out: int, *, max_frames: int | None = None, **settings_: Any) -> onnx.ModelProto:
    body = functions.frame_plan(
        max_frames=max_frames or frames,
        max_window=settings_["max_window"],
        trailing=settings_["trailing"],
        opset=OPSET,
    )
    outputs = [value("weights", FLOAT, frames_out, frames), value("static", BOOL, frames)]
    return call(body, [value("similarity", FLOAT, frames, frames)], outputs, {"frames_out": frames_out, **settings_})


ALONE = onnxruntime.SessionOptions()
ALONE.intra_op_num_threads = 1  # others would spin


def run(model: onnx.ModelProto, **feeds: Array) -> list[Array]:
    return onnxruntime.InferenceSession(model.SerializeToString(), ALONE).run(None, feeds)


def expect_equal_plan(model: onnx.ModelProto, similarity: Array, frames_out: int, **settings_: Any) -> None:
    weights, static = run(model, similarity=similarity)
    wanted, start, end = plan_similarity(torch.from_numpy(similarity), frames_out, **settings_)
    assert np.array_equal(static, static_frames(start, end).numpy())
    # Who is merged into whom must be equal; the weights themselves may differ in the last bit of a sum.
    assert np.array_equal(weights != 0, wanted.numpy() != 0)
    np.testing.assert_allclose(weights, wanted.numpy(), rtol=0, atol=1e-6)


def similarities(frames: int, seed: int, kind: str) -> Array:
    """[F, F] like `frame_similarity` gives. Kinds: drift (slow change), scenes (cuts), noise, ties (a coarse grid, so
    that many similarities are equal), still (copies of one frame)."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(frames, 6))
    if kind == "scenes":
        base = rng.normal(size=(frames + 1, 6))[(rng.random(frames) < 0.2).cumsum()] + 0.2 * steps
    elif kind == "drift":
        base = rng.normal(size=6) * 2 + 0.4 * steps.cumsum(0)
    else:
        base = np.ones((frames, 6)) if kind == "still" else steps
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    grid = 8 if kind == "ties" else SIMILARITY_STEPS
    return (np.round(base @ base.T * grid) / grid).astype(np.float32)


KINDS = ("drift", "scenes", "noise", "ties", "still")
share = st.floats(0, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    frames=st.integers(1, 64),
    out=share,
    tau=st.one_of(st.sampled_from([-1.0, 0.3, 0.8, 1.0]), st.floats(-1, 1, width=32, allow_subnormal=False)),
    ema=st.one_of(st.sampled_from([0.9, 1.0]), st.floats(0.0625, 1, width=32)),
    max_window=st.integers(1, 12),
    trailing=st.sampled_from(TRAILINGS),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
)
def test_frame_plan_decides_as_the_reference(
    frames: int, out: float, tau: float, ema: float, max_window: int, trailing: str, kind: str, seed: int
) -> None:
    frames_out = 1 + round(out * (frames - 1))
    rule: dict[str, Any] = {"tau": tau, "ema": ema, "max_window": max_window, "trailing": trailing}
    model = plan_model(frames, frames_out, **rule)
    for one in (kind, "ties", "drift"):
        expect_equal_plan(model, similarities(frames, seed, one), frames_out, **rule)


@pytest.mark.parametrize("trailing", TRAILINGS)
def test_frame_plan_for_every_number_of_frames_out(trailing: str) -> None:
    rule: dict[str, Any] = {"tau": 0.5, "ema": 0.9, "max_window": 6, "trailing": trailing}
    for frames_out in range(1, 13):
        model = plan_model(12, frames_out, **rule)
        for seed, kind in enumerate(KINDS):
            expect_equal_plan(model, similarities(12, seed, kind), frames_out, **rule)


def test_frame_plan_written_for_more_frames_takes_fewer() -> None:
    """One body serves every merge layer of a graph: it is written for the frames of the first."""
    rule: dict[str, Any] = {"tau": 0.6, "ema": 0.9, "max_window": 6, "trailing": "released"}
    for frames, frames_out in ((2, 1), (7, 5), (24, 18)):
        model = plan_model(frames, frames_out, max_frames=32, **rule)
        expect_equal_plan(model, similarities(frames, 3, "drift"), frames_out, **rule)


def test_frame_plan_weights_are_convex_and_keep_every_budget() -> None:
    rule: dict[str, Any] = {"tau": 0.6, "ema": 0.9, "max_window": 6, "trailing": "released"}
    for kind in KINDS:
        weights, _ = run(plan_model(16, 11, **rule), similarity=similarities(16, 0, kind))
        assert weights.shape == (11, 16)
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
        assert weights[0, 0] > 0


def test_comparison_of_plans_would_notice_another_rule() -> None:
    """Negative control: one setting of the body changed, and the comparison above fails."""
    rule: dict[str, Any] = {"tau": 0.6, "ema": 0.9, "max_window": 6, "trailing": "released"}
    similarity = similarities(16, 1, "drift")
    for change in ({"tau": 0.97}, {"max_window": 3}, {"trailing": "keep"}):
        model = plan_model(16, 9, **(rule | change))
        with pytest.raises(AssertionError):
            expect_equal_plan(model, similarity, 9, **rule)


def test_both_refuse_more_frames_than_arrive() -> None:
    rule: dict[str, Any] = {"tau": 0.6, "ema": 0.9, "max_window": 6, "trailing": "released"}
    with pytest.raises(UserError, match="frames_out"):
        plan_similarity(torch.from_numpy(similarities(4, 0, "drift")), 5, **rule)
    model = plan_model(4, 5, **rule)
    weights, _ = run(model, similarity=similarities(4, 0, "drift"))
    assert not weights[-1].any()  # the graph cannot refuse; it shows by a row that is made of nothing


def select_model(frames: int, per_frame: int, width: int, places: int, dtype: ir.DataType = HALF) -> onnx.ModelProto:
    body = functions.select_tokens(per_frame=per_frame, places=places, opset=OPSET)
    inputs = [
        value("features", dtype, frames, per_frame, width),
        value("received", FLOAT, frames, per_frame),
        value("static", BOOL, frames),
    ]
    outputs = [value("tokens", dtype, frames * places, width), value("positions", INT64, frames * places)]
    return call(body, inputs, outputs, {"places": places})


def reference_choice(features: Array, received: Array, static: Array, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return select_fixed(torch.from_numpy(features), torch.from_numpy(received), torch.from_numpy(static), k)


def expect_equal_selection(model: onnx.ModelProto, features: Array, received: Array, static: Array, k: int) -> None:
    tokens, positions = run(model, features=features, received=received, static=static)
    wanted, places = reference_choice(features, received, static, k)
    assert np.array_equal(positions, places.numpy())
    assert tokens.dtype == features.dtype
    assert np.array_equal(tokens, wanted.numpy())


def selection_case(frames: int, per_frame: int, seed: int, levels: int) -> tuple[Array, Array, Array]:
    """Features fp16 [F, P, 3], received attention of so many different values (few: ties), static frames."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(frames, per_frame, 3)).astype(np.float16)
    received = (rng.integers(0, levels, (frames, per_frame)) / levels).astype(np.float32)
    return features, received, rng.random(frames) < 0.5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    frames=st.integers(1, 9),
    per_frame=st.integers(1, 64),
    kept=share,
    levels=st.sampled_from([1, 2, 8, 10**6]),
    seed=st.integers(0, 2**16),
)
def test_select_tokens_decides_as_the_reference(
    frames: int, per_frame: int, kept: float, levels: int, seed: int
) -> None:
    k = 1 + round(kept * (per_frame - 1))
    model = select_model(frames, per_frame, 3, k)
    for more in range(3):
        expect_equal_selection(model, *selection_case(frames, per_frame, seed + more, levels), k)


def test_select_tokens_for_every_number_of_places() -> None:
    for k in range(1, 26):
        for levels in (3, 10**6):
            expect_equal_selection(select_model(4, 25, 3, k), *selection_case(4, 25, k, levels), k)


def test_selection_keeps_the_dtype_of_the_features() -> None:
    features, received, static = selection_case(3, 12, 0, 100)
    model = select_model(3, 12, 3, 5, FLOAT)
    expect_equal_selection(model, features.astype(np.float32), received, static, 5)


def test_comparison_of_selections_would_notice_other_frames_static() -> None:
    """Negative control: static frames taken for dynamic ones and the other way round."""
    features, received, static = selection_case(6, 25, 0, 10**6)
    model = select_model(6, 25, 3, 7)
    _, positions = run(model, features=features, received=received, static=~static)
    _, wanted = reference_choice(features, received, static, 7)
    assert not np.array_equal(positions, wanted.numpy())


# The adaptive schedule: one model for every number of frames that may arrive


def adaptive_plan_model(max_frames: int, **settings_: Any) -> onnx.ModelProto:
    rule = {name: settings_[name] for name in ("max_window", "trailing")}
    body = functions.adaptive_frame_plan(max_frames=max_frames, opset=OPSET, **rule)
    outputs = [value("weights", FLOAT, "n", "n"), value("static", BOOL, "n"), value("count", INT64, 1)]
    return call(body, [value("similarity", FLOAT, "n", "n")], outputs, settings_)


def expect_equal_adaptive_plan(session: onnxruntime.InferenceSession, similarity: Array, **settings_: Any) -> int:
    weights, static, (count,) = session.run(None, {"similarity": similarity})
    wanted, start, end = plan_similarity(torch.from_numpy(similarity), None, **settings_)
    assert count == len(wanted)
    assert weights.shape == similarity.shape
    assert not weights[count:].any()
    assert np.array_equal(static, static_frames(start, end).numpy())
    assert np.array_equal(weights[:count] != 0, wanted.numpy() != 0)
    np.testing.assert_allclose(weights[:count], wanted.numpy(), rtol=0, atol=1e-6)
    return int(count)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tau=st.one_of(st.sampled_from([-1.0, 0.3, 0.8, 1.0]), st.floats(-1, 1, width=32, allow_subnormal=False)),
    ema=st.one_of(st.sampled_from([0.9, 1.0]), st.floats(0.0625, 1, width=32)),
    max_window=st.integers(1, 12),
    trailing=st.sampled_from(TRAILINGS),
    seed=st.integers(0, 2**16),
)
def test_adaptive_plan_decides_as_the_reference(
    tau: float, ema: float, max_window: int, trailing: str, seed: int
) -> None:
    rule: dict[str, Any] = {"tau": tau, "ema": ema, "max_window": max_window, "trailing": trailing}
    session = onnxruntime.InferenceSession(adaptive_plan_model(64, **rule).SerializeToString())
    for frames, kind in zip((1, 2, 3, 9, 17, 33, 64), (*KINDS, "drift", "ties"), strict=True):
        expect_equal_adaptive_plan(session, similarities(frames, seed, kind), **rule)


def test_adaptive_plan_keeps_all_few_and_other_numbers_for_other_videos() -> None:
    rule: dict[str, Any] = {"tau": 0.8, "ema": 0.9, "max_window": 12, "trailing": "released"}
    session = onnxruntime.InferenceSession(adaptive_plan_model(32, **rule).SerializeToString())
    counts = {kind: expect_equal_adaptive_plan(session, similarities(32, 0, kind), **rule) for kind in KINDS}
    assert counts["noise"] == 32
    assert len(set(counts.values())) >= 4


def adaptive_select_model(frames: int, per_frame: int, ratio: float) -> onnx.ModelProto:
    body = functions.adaptive_select_tokens(frames=frames, per_frame=per_frame, ratio=ratio, opset=OPSET)
    inputs = [
        value("features", HALF, "n", per_frame, 3),
        value("received", FLOAT, "n", per_frame),
        value("static", BOOL, "n"),
    ]
    outputs = [value("tokens", HALF, "M", 3), value("positions", INT64, "M"), value("count", INT64, 1)]
    return call(body, inputs, outputs, {"frames": frames, "ratio": ratio})


def varying_choice(received: Array, static: Array, frames: int, ratio: float) -> Array:
    """The reference's positions of a video of `frames` frames, of which `len(received)` are left."""
    per_frame = received.shape[1]
    effective = effective_ratio(ratio, frames, len(received))
    places, windows = dynamic_tokens(per_frame, effective), static_tokens(per_frame, effective)
    mask = keep_mask(torch.from_numpy(received), torch.from_numpy(static), places, windows)
    return mask.flatten().nonzero().squeeze(1).numpy()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    frames=st.integers(1, 12),
    per_frame=st.integers(1, 40),
    ratio=st.one_of(st.sampled_from([0.1, 0.15, 0.3, 0.5, 1.0]), st.floats(0.01, 1)),
    levels=st.sampled_from([1, 2, 8, 10**6]),
    seed=st.integers(0, 2**16),
)
def test_adaptive_selection_decides_as_the_reference_for_every_number_of_frames_left(
    frames: int, per_frame: int, ratio: float, levels: int, seed: int
) -> None:
    session = onnxruntime.InferenceSession(adaptive_select_model(frames, per_frame, ratio).SerializeToString())
    for left in range(1, frames + 1):
        features, received, static = selection_case(left, per_frame, seed + left, levels)
        feeds = {"features": features, "received": received, "static": static}
        tokens, positions, (count,) = session.run(None, feeds)
        wanted = varying_choice(received, static, frames, ratio)
        assert count == len(wanted)
        assert len(positions) == len(tokens) == token_count(frames, per_frame, ratio, frames_out=left)
        assert np.array_equal(positions[:count], wanted)
        assert np.array_equal(tokens, features.reshape(-1, 3)[positions])  # the rest is in range


def test_adaptive_comparison_would_notice_other_frames_static() -> None:
    """Negative control, and static frames do keep fewer tokens here than they would as dynamic ones."""
    _, received, static = selection_case(6, 25, 0, 10**6)
    session = onnxruntime.InferenceSession(adaptive_select_model(8, 25, 0.25).SerializeToString())
    features = np.zeros((6, 25, 3), np.float16)
    _, positions, (count,) = session.run(None, {"features": features, "received": received, "static": ~static})
    assert 0 < static.sum() < 6
    assert not np.array_equal(positions[:count], varying_choice(received, static, 8, 0.25))
    assert len(positions) > len(varying_choice(received, static, 8, 0.25))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            adaptive_plan_model(9, tau=0.8, ema=0.9, max_window=6, trailing="released"), id="AdaptiveFramePlan"
        ),
        pytest.param(adaptive_select_model(3, 25, 0.3), id="AdaptiveSelectTokens"),
        pytest.param(plan_model(9, 5, tau=0.8, ema=0.9, max_window=6, trailing="released"), id="FramePlan"),
        pytest.param(select_model(3, 25, 8, 7), id="SelectTokens"),
    ],
)
def test_bodies_are_checked_onnx_of_standard_operators(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    (body,) = model.functions
    assert {node.domain for node in body.node} == {""}
    assert all(onnx.defs.has(node.op_type) for node in body.node)
    assert not {"NonZero", "ScatterND", "Loop", "If", "Scan"} & {node.op_type for node in body.node}
    assert not any(node.name for node in body.node)  # two calls would give TensorRT two layers of one name

    model.functions[0].node[0].op_type = "NoSuchOperator"
    with pytest.raises(Exception, match="NoSuchOperator"):
        onnx.checker.check_model(model, full_check=True)
