"""The ONNX bodies of "cells" decide as `earlytom.cells` does, case for case, also in a graph of half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import inliner
from torch import Tensor, nn

from builder.export import cells
from builder.export.vision import OPSET, save, trace
from earlytom.cells.config import CellsConfig
from earlytom.cells.merge import plan_cells
from earlytom.cells.select import select_greedy, select_rounds
from earlytom.encoder import encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.methods.cells import Cells, EachCells
from tests.builder.export.test_functions import FLOAT, HALF, INT64, call, run, value
from tests.earlytom.cells.test_merge import clip
from tests.earlytom.cells.test_select import problem
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower

KINDS = ("noise", "drift", "still", "repeats", "zero")
NAMES = ["tokens", "positions", "sources", "place", "bias"]
CONFIG = CellsConfig(retention_ratio=0.3, merge_layers=(0, 2))


def plan_model(shape: tuple[int, int, int], left: int, power: float, prefix: int, dtype: ir.DataType) -> Any:
    frames, tokens, _ = shape
    outputs = [
        value("weights", FLOAT, tokens, left, frames),
        value("member", FLOAT, left, frames),
        value("taken", INT64, left, tokens),
    ]
    attributes = {"frames_out": left, "power": power, "prefix": prefix}
    body = cells.cell_plan(prefix=prefix, opset=OPSET)
    return call(body, [value("hidden", dtype, *shape)], outputs, attributes)


def expect_equal_plan(model: Any, hidden: Tensor, left: int, power: float, prefix: int) -> None:
    weights, member, taken = run(model, hidden=hidden.numpy())
    wanted = plan_cells(hidden, left, power, prefix)
    assert np.array_equal(member, wanted.member.numpy())
    assert np.array_equal(taken, wanted.taken.numpy())
    np.testing.assert_allclose(weights, wanted.weights.numpy(), rtol=0, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    frames=st.integers(1, 16),
    share=st.floats(0, 1),
    power=st.sampled_from([0.0, 2.0, 4.0]),
    prefix=st.integers(0, 1),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_plan_is_decided_as_in_the_reference(
    kind: str, frames: int, share: float, power: float, prefix: int, half: bool, seed: int
) -> None:
    hidden = clip(kind, frames, 5, seed).to(torch.float16 if half else torch.float32)
    left = 1 + round(share * (frames - 1))
    model = plan_model((frames, 5, 16), left, power, prefix, HALF if half else FLOAT)
    expect_equal_plan(model, hidden, left, power, prefix)


def test_one_body_serves_every_merge_layer() -> None:
    """It is written once a graph, whatever the frames that arrive."""
    body = cells.cell_plan(prefix=0, opset=OPSET)
    for frames, left in ((1, 1), (12, 9), (9, 7)):
        outputs = [value(name, dtype) for name, dtype in (("weights", FLOAT), ("member", FLOAT), ("taken", INT64))]
        for output, shape in zip(outputs, ((5, left, frames), (left, frames), (left, 5)), strict=True):
            output.shape = ir.Shape(shape)
        given_ = {"frames_out": left, "power": 4.0, "prefix": 0}
        model = call(body.clone(), [value("hidden", FLOAT, frames, 5, 16)], outputs, given_)
        expect_equal_plan(model, clip("drift", frames, 5, frames), left, 4.0, 0)


def test_of_copies_the_earliest_is_shown_in_a_graph_too() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 16, generator=generator).repeat_interleave(3, dim=0)
    noisy = hidden * (1 + 2e-7 * torch.randn(hidden.shape, generator=generator))
    _, _, taken = run(plan_model((6, 5, 16), 2, 4.0, 0, FLOAT), hidden=noisy.numpy())
    assert taken.tolist() == [[0] * 5, [3] * 5]


def test_the_comparison_of_plans_would_notice_another_rule() -> None:
    """Negative control."""
    hidden = clip("drift", 12, 5, 0)
    for power, prefix in ((2.0, 0), (4.0, 3)):
        model = plan_model((12, 5, 16), 7, power, prefix, FLOAT)
        with pytest.raises(AssertionError):
            expect_equal_plan(model, hidden, 7, 4.0, 0)


def take_model(tokens: int, count: int, rounds: int | None) -> Any:
    if rounds is None:
        body, attributes = cells.select_greedy(count=count, opset=OPSET), {"count": count}
    else:
        body = cells.select_rounds(count=count, rounds=rounds, opset=OPSET)
        attributes = {"count": count, "rounds": rounds}
    inputs = [value("salient", FLOAT, tokens), value("alike", FLOAT, tokens, tokens)]
    return call(body, inputs, [value("taken", INT64, count)], attributes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(("noise", "copies", "zero", "coarse")),
    tokens=st.integers(1, 40),
    share=st.floats(0, 1),
    rounds=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 2**16),
)
def test_tokens_are_taken_as_in_the_reference(
    kind: str, tokens: int, share: float, rounds: int | None, seed: int
) -> None:
    salient, alike = problem(kind, tokens, seed)
    count = 1 + round(share * (tokens - 1))
    (taken,) = run(take_model(tokens, count, rounds), salient=salient.numpy(), alike=alike.numpy())
    choice = (salient, alike, count)
    wanted = select_greedy(*choice) if rounds is None else select_rounds(*choice, rounds)
    assert taken.tolist() == wanted.tolist()


def test_the_two_forms_take_other_tokens() -> None:
    """Negative control."""
    salient, alike = problem("noise", 40, 0)
    forms = [
        run(take_model(40, 12, rounds), salient=salient.numpy(), alike=alike.numpy())[0] for rounds in (None, 1, 12)
    ]
    assert forms[0].tolist() == forms[2].tolist() != forms[1].tolist()


@pytest.mark.parametrize(
    "body", [cells.cell_plan(prefix=1, opset=OPSET), cells.select_rounds(count=63, rounds=7, opset=OPSET)]
)
def test_bodies_are_made_of_ordinary_operators(body: ir.Function) -> None:
    """What an engine compiler refuses, runs on the host or orders as it likes."""
    kinds = {node.op_type for node in body}
    assert not kinds & {"NonZero", "Loop", "If", "Scan", "TopK", "ArgMax", "ArgMin"}
    assert not any(kind.startswith("Scatter") for kind in kinds)


# --- a whole vision part


class Whole(nn.Module):
    """A tiny vision part with "cells" inside."""

    def __init__(self, method: Cells, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.projector = tiny_tower("clip").to(dtype), tiny_projector().to(dtype)
        self.method = method

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        seen = encode(LLAVA_ONEVISION.vision(self.tower, self.projector), pixels, self.method)
        return {name: getattr(seen, name) for name in NAMES}


@pytest.mark.parametrize("rounds", [None, 3])
def test_an_exported_vision_part_gives_the_same_tokens(tmp_path: Path, rounds: int | None) -> None:
    config = CONFIG.replace(rounds=rounds)
    video = made_video("scenes", 8)
    made = trace(Whole(cells.SymbolicCells(config), torch.float32), {"pixels": video}, NAMES)
    graph = save(made, tmp_path / "vision.onnx", NAMES, lambda node: cells.body(node, OPSET))
    calls = [node.op_type for node in onnx.load(graph.path).graph.node if node.domain == "earlytom"]
    assert calls == ["CellPlan", "CellPlan", "SelectGreedy" if rounds is None else "SelectRounds"]
    session = onnxruntime.InferenceSession(str(graph.path))
    for kind in ("scenes", "drift", "noise"):
        video = made_video(kind, 8, seed=1)
        wanted = Whole(Cells(config), torch.float32)(video)
        found = dict(zip(NAMES, session.run(NAMES, {"pixels": video.numpy()}), strict=True))
        assert found["positions"].tolist() == wanted["positions"].tolist()
        assert found["place"].tolist() == wanted["place"].tolist()
        for name in ("tokens", "sources", "bias"):
            np.testing.assert_allclose(found[name], wanted[name].numpy(), atol=1e-4)


def test_several_videos_have_calls_of_their_own(tmp_path: Path) -> None:
    """Also a loop may be called twice: what is inside a function has no name outside it."""
    config = CONFIG.replace(rounds=None)
    video = torch.cat([made_video(kind, 8, seed=2) for kind in ("scenes", "noise")])
    made = trace(Whole(EachCells(cells.SymbolicCells(config), 2), torch.float32), {"pixels": video}, NAMES)
    graph = save(made, tmp_path / "vision.onnx", NAMES, lambda node: cells.body(node, OPSET))
    wanted = Whole(EachCells(Cells(config), 2), torch.float32)(video)
    tokens, positions = onnxruntime.InferenceSession(str(graph.path)).run(NAMES[:2], {"pixels": video.numpy()})
    assert positions.tolist() == wanted["positions"].tolist()
    np.testing.assert_allclose(tokens, wanted["tokens"].numpy(), atol=1e-4)


def test_a_graph_of_half_precision_decides_in_single(tmp_path: Path) -> None:
    """Every decision is an operator of fp32 operands: no half value is compared, and features are widened first."""
    made = trace(Whole(cells.SymbolicCells(CONFIG), torch.float16), {"pixels": made_video("scenes", 8).half()}, NAMES)
    path = save(made, tmp_path / "vision.onnx", NAMES, lambda node: cells.body(node, OPSET)).path
    model = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(onnx.load(path)))
    known = {info.name: info.type.tensor_type.elem_type for info in (*model.graph.value_info, *model.graph.output)}
    compared = [
        n for n in model.graph.node if n.op_type in ("Greater", "Less", "Equal", "ReduceMax", "Round", "Pow", "Exp")
    ]
    assert len(compared) > 20
    for node in compared:
        assert known[node.input[0]] != onnx.TensorProto.FLOAT16, node
    tokens = next(output for output in model.graph.output if output.name == "tokens")
    assert tokens.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    onnxruntime.InferenceSession(str(path))


def test_the_choice_from_features_in_half_is_that_of_their_values() -> None:
    """Features that fp16 holds exactly: the half graph's decisions are those of the fp32 reference, bit for bit."""
    method = Cells(CONFIG)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(4, 9, 24, generator=generator).half()
    vision = LLAVA_ONEVISION.vision(tiny_tower("siglip"), tiny_projector())
    state = method.begin(vision, 4, torch.device("cpu"))
    _, positions = method.choose(features, None, state)
    found = (positions, *method.standing(features, positions, state))
    _, positions = method.choose(features.float(), None, state)
    wanted = (positions, *method.standing(features.float(), positions, state))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
