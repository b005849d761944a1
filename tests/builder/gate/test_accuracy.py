"""The accuracy gate: passes what is the model, and fails, at the right step, what only looks like it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from builder.export import functions
from builder.gate import accuracy
from builder.gate.limits import GATES, PLAN_TOLERANCE, STEPS
from builder.gate.next_tokens import NextTokens, SeenTokens
from builder.gate.report import Report
from earlytom.errors import UserError
from runtime.checkpoint import describe
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from tests.builder.conftest import FRAMES, Exported
from tests.builder.gate.shell import shell

Make = Callable[..., Exported]
Edit = Callable[[onnx.ModelProto], None]
RATIO = ("--ratio", "0.3")


@pytest.fixture
def gate(exported: Make, clips: dict[str, Tensor], tmp_path: Path) -> Callable[..., Report]:
    """Runs the gate on the fp32 graph after `edit` was applied to a copy of it."""

    def run(edit: Edit = lambda model: None, **options: Any) -> Report:
        made = exported(*RATIO, "--fp32")
        model = onnx.load(str(made.path))
        edit(model)
        path = tmp_path / layout.ONNX_FILE
        onnx.save(model, str(path))
        report, _ = accuracy.verify(path, made.reference, clips, "fp32", **options)
        assert [file.name for file in tmp_path.iterdir()] == [layout.ONNX_FILE]
        return report

    return run


def failed(report: Report) -> set[str]:
    """Steps with a check that failed."""
    return {check.step for check in report.checks if not check.passed}


def values(report: Report) -> dict[str, float]:
    return {check.what: check.value for check in report.checks}


def scale_weight(name: str, factor: float) -> Edit:
    """Multiply one stored tensor; `name` is the end of its name."""

    def edit(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name.endswith(name))
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))

    return edit


def set_attribute(operator: str, name: str, value: float) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == operator:
                (attribute,) = (a for a in node.attribute if a.name == name)
                attribute.CopyFrom(helper.make_attribute(name, value))

    return edit


def after(
    name: str, *make: tuple[str, list[str]], constants: dict[str, Any] | None = None, beside: bool = False
) -> Edit:
    """Let further nodes follow the one that gives `name`: (operator, inputs) each, where "raw" stands for the value as
    it was and "last" for the node before; the last one gives `name` to the rest of the graph, or, `beside` it, to those
    alone who read the graph's outputs."""

    def edit(model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        (index,) = (i for i, node in enumerate(nodes) if name in node.output)
        raw = f"{name}_raw"
        nodes[index].output[:] = [raw if output == name else output for output in nodes[index].output]
        for node in nodes[index + 1 :] if beside else ():
            node.input[:] = [raw if given == name else given for given in node.input]
        added, last = [], raw
        for step, (operator, inputs) in enumerate(make):
            out = name if step == len(make) - 1 else f"{name}_step{step}"
            added.append(helper.make_node(operator, [{"raw": raw, "last": last}.get(i, i) for i in inputs], [out]))
            last = out
        for key, array in (constants or {}).items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), key))
        del model.graph.node[:]
        model.graph.node.extend([*nodes[: index + 1], *added, *nodes[index + 1 :]])

    return edit


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_honest_graph_passes(exported: Make, clips: dict[str, Tensor], dtype: str) -> None:
    made = exported(*RATIO, f"--{dtype}")
    lines: list[str] = []
    report, wanted = accuracy.verify(made.path, made.reference, clips, dtype, say=lines.append)
    assert report.passed, values(report)
    report.require()
    assert [check.step for check in report.checks] == sorted((c.step for c in report.checks), key=STEPS.index)
    assert {check.step for check in report.checks} == set(STEPS) - {"text"}
    assert {f"hidden_{layer}: cosine" for layer in (1, 2)} < set(values(report))
    assert report.clips == tuple(clips)
    assert len(wanted[0][1]) == len(clips)
    assert lines
    assert any("--verify-text" in note for note in report.notes)
    assert any("bf16" in note for note in report.notes) == (dtype == "bf16")
    assert [path.name for path in made.path.parent.iterdir()] == [layout.ONNX_FILE]  # no copy of the graph is left


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--ratio", "1.0"], id="no selection"),
        pytest.param(["--ratio", "0.3", "--merge-layers", "none"], id="no merging"),
        pytest.param(["--ratio", "1.0", "--merge-layers", "none"], id="neither"),
    ],
)
def test_an_honest_graph_passes_with_parts_of_the_method_off(
    exported: Make, clips: dict[str, Tensor], arguments: list[str]
) -> None:
    made = exported(*arguments, "--fp32")
    report, _ = accuracy.verify(made.path, made.reference, clips, "fp32")
    assert report.passed, values(report)
    assert ("hidden" in {check.step for check in report.checks}) == bool(made.config.earlytom.merge_layers)


def test_a_half_graph_does_not_pass_for_fp32(exported: Make, clips: dict[str, Tensor]) -> None:
    made = exported(*RATIO, "--fp16")
    report, _ = accuracy.verify(made.path, made.reference, clips, "fp32")
    assert {"hidden", "tokens"} <= failed(report)
    with pytest.raises(UserError, match=r"does not reproduce the model: .*--fp32.*--no-verify") as caught:
        report.require()
    assert "\n" not in str(caught.value)


def test_gates_get_looser_with_the_precision() -> None:
    strict, half, loose = (GATES[dtype] for dtype in ("fp32", "fp16", "bf16"))
    for name in ("cosine", "frames", "tokens", "text"):
        assert getattr(strict, name) > getattr(half, name) > getattr(loose, name) >= 0.5
    assert strict.error < half.error < loose.error < 0.5


@pytest.mark.parametrize(
    ("weight", "steps"),
    [
        ("layers.0.layer_norm1.weight", {"hidden", "tokens"}),
        ("layers.3.mlp.fc2.bias", {"tokens"}),  # after the last merge: no decision sees it
        ("projector.linear_1.bias", {"tokens"}),
        ("scale", {"hidden", "tokens"}),  # of the normalisation
    ],
)
def test_one_changed_weight_fails(gate: Callable[..., Report], weight: str, steps: set[str]) -> None:
    report = gate(scale_weight(weight, 1.2))
    assert steps <= failed(report)
    if "hidden" not in steps:
        assert failed(report) == steps
    # The graph decides consistently with what it computes, and that is seen apart.
    assert values(report)["token choices repeated: share that is equal"] == 1


def test_a_single_half_weight_fails(exported: Make, clips: dict[str, Tensor], tmp_path: Path) -> None:
    """The same for fp16, whose gate is wider: one layer norm off by a fifth."""
    made = exported(*RATIO, "--fp16")
    model = onnx.load(str(made.path))
    scale_weight("layers.0.layer_norm1.weight", 1.2)(model)
    path = tmp_path / layout.ONNX_FILE
    onnx.save(model, str(path))
    report, _ = accuracy.verify(path, made.reference, clips, "fp16")
    assert {"hidden", "tokens"} <= failed(report)


def test_nan_fails_and_is_no_crash(gate: Callable[..., Report]) -> None:
    report = gate(scale_weight("projector.linear_2.bias", np.nan))
    assert failed(report) == {"tokens"}
    report = gate(scale_weight("layers.0.layer_norm1.bias", np.nan))
    assert {"hidden", "tokens"} <= failed(report)


@pytest.mark.parametrize("by", [1, -1, 10**6])
def test_shifted_positions_fail(gate: Callable[..., Report], by: int) -> None:
    """The tokens are right and their positions are not; also where the positions name no token at all."""
    report = gate(after("positions", ("Add", ["raw", "by"]), constants={"by": np.int64(by)}, beside=True))
    assert {"decisions", "tokens"} <= failed(report)
    assert values(report)["token choices repeated: share that is equal"] == 0


def test_another_choice_of_tokens_fails_although_tokens_and_positions_agree(gate: Callable[..., Report]) -> None:
    """A selection that is wrong but plausible: it takes every window's token from the frames taken for static."""
    report = gate(after("static", ("Not", ["raw"])))
    assert "tokens" not in failed(report)  # with the graph's choice forced on the reference, the values are the same
    assert failed(report) <= {"decisions"}
    assert values(report)["overlap of kept tokens"] < 1


def test_equal_decisions_are_forced_where_they_differ(gate: Callable[..., Report], exported: Make) -> None:
    """The graph sees other similarities at its first merge and decides otherwise: the overlap says so, and hidden
    states and tokens are still compared under equal decisions, so that they pass."""
    tilt = np.ones((FRAMES, FRAMES), np.float32)
    tilt[4:8, 4:8] = 0.5  # where the reference removes frames
    report = gate(after("similarity_1", ("Mul", ["raw", "tilt"]), constants={"tilt": tilt}))
    found = values(report)
    assert found["overlap of kept frames"] < 1
    assert found["overlap of kept tokens"] < 1
    assert failed(report) == {"decisions"}
    assert found["hidden_2: cosine"] > GATES["fp32"].cosine  # downstream of the decision that differs
    # It decided rightly from what it saw.
    assert found["frame plans repeated: largest difference"] < 1e-6
    assert found["token choices repeated: share that is equal"] == 1


def test_the_text_of_an_untrained_decoder_is_held_against_equal_decisions(gate: Callable[..., Report]) -> None:
    tilt = np.ones((FRAMES, FRAMES), np.float32)
    tilt[4:8, 4:8] = 0.5
    other_plan = after("similarity_1", ("Mul", ["raw", "tilt"]), constants={"tilt": tilt})
    for equal in (True, False):
        close: list[bool] = []

        def text(engine: SeenTokens, reference: SeenTokens, close: list[bool] = close) -> float:
            close.append(torch.allclose(engine.tokens, reference.tokens, atol=1e-4))
            return 1.0

        gate(other_plan, text=text, text_with_equal_decisions=equal)
        assert all(close) == equal


def test_another_threshold_fails_at_the_decisions_alone(gate: Callable[..., Report]) -> None:
    report = gate(set_attribute(functions.FRAME_PLAN, "tau", 0.999))
    assert failed(report) == {"decisions"}
    assert values(report)["frame plans repeated: largest difference"] > 0.1


def test_weights_that_are_wrong_but_plausible_fail(gate: Callable[..., Report]) -> None:
    """The right frames, merged in other shares: rows still sum to one, and every overlap is 1."""
    steps = (("Mul", ["raw", "tilt"]), ("ReduceSum", ["last", "axis"]), ("Div", ["weights_2_step0", "last"]))
    constants = {"axis": np.array([1], np.int64), "tilt": np.linspace(1, 2, 9, dtype=np.float32)}
    report = gate(after("weights_2", *steps, constants=constants))
    assert values(report)["overlap of kept frames"] == 1
    assert values(report)["frame plans repeated: largest difference"] > PLAN_TOLERANCE
    assert failed(report) == {"decisions"}


def test_the_worst_clip_counts(exported: Make, clips: dict[str, Tensor]) -> None:
    made = exported(*RATIO, "--fp16")
    both, *single = (
        values(accuracy.verify(made.path, made.reference, some, "fp16")[0])
        for some in (clips, *({name: frames} for name, frames in clips.items()))
    )
    for what in ("tokens: largest error", "hidden_1: mean error"):
        assert both[what] == pytest.approx(max(one[what] for one in single))
    assert both["tokens: cosine"] == pytest.approx(min(one["tokens: cosine"] for one in single), abs=1e-12)


def test_a_reference_without_finite_tokens_is_refused(exported: Make, clips: dict[str, Tensor]) -> None:
    made = exported(*RATIO, "--fp32")
    bias = made.reference.projector.linear_2.bias
    before = bias.clone()
    bias[0] = float("nan")
    try:
        with pytest.raises(UserError, match="weights are unusable"):
            accuracy.verify(made.path, made.reference, clips, "fp32")
    finally:
        bias.copy_(before)


def test_the_text_step_holds_the_worst_clip_against_the_gate(gate: Callable[..., Report]) -> None:
    shares = iter([1.0, 0.5, 1.0, 1.0])
    report = gate(text=lambda engine, reference: next(shares))
    assert failed(report) == {"text"}
    assert report.checks[-1].value == 0.5
    assert gate(text=lambda engine, reference: next(shares)).passed
    assert not report.notes


def test_next_tokens_agree_with_themselves_and_not_with_another_clip(
    exported: Make, clips: dict[str, Tensor], talkative: Path
) -> None:
    made = exported(*RATIO, "--fp32")
    text = NextTokens(describe(talkative))
    names = SeenTokens._fields
    first, second = (SeenTokens(*(found[name] for name in names)) for found in map(made.reference, clips.values()))
    assert text(first, first) == 1
    assert text(first._replace(tokens=first.tokens.flip(0)), second) < GATES["bf16"].text


def test_report_is_plain_json(exported: Make, clips: dict[str, Tensor], engine: Path) -> None:
    made = exported(*RATIO, "--fp32")
    report, _ = accuracy.verify(made.path, made.reference, clips, "fp32")
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["passed"] is True
    assert set(record["steps"]) == {"hidden", "decisions", "tokens"}
    assert all(
        set(check) == {"what", "value", "limit", "passed"} for step in record["steps"].values() for check in step
    )
    assert sum(map(len, record["steps"].values())) == len(report.checks)
    saved = json.loads((engine / layout.REPORT_FILE).read_text())
    assert saved["verification"]["passed"] is True
    assert list(saved["verification"]["steps"]) == list(STEPS)  # the session's engine was built with --verify-text
    assert saved["compile"] is None
    assert saved["figures"].keys() >= {"export_seconds", "verify_seconds", "build_peak_bytes", "flops_vision"}


def test_the_polygraphy_line_of_the_manifest_works_when_pasted(engine: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(engine)
    assert manifest.polygraphy.startswith("polygraphy run vision.onnx --onnxrt")
    done = shell(manifest.polygraphy, engine)
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-800:]
    Manifest.read(engine)  # and it changed nothing in the folder

    spoiled = tmp_path / "spoiled"
    shutil.copytree(engine, spoiled)
    model = onnx.load(str(spoiled / layout.ONNX_FILE))
    scale_weight("projector.linear_1.bias", 1.5)(model)
    onnx.save(model, str(spoiled / layout.ONNX_FILE))
    assert shell(manifest.polygraphy, spoiled).returncode != 0


def test_saved_reference_is_what_the_reference_says(engine: Path, exported: Make) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    (inputs,) = load_json(str(engine / layout.REFERENCE_INPUTS_FILE))
    frames = torch.from_numpy(inputs[layout.FRAMES])
    assert (frames.dtype, tuple(frames.shape)) == (torch.uint8, (FRAMES, 3, 72, 72))
    ((_, (saved,)),) = RunResults.load(str(engine / layout.REFERENCE_OUTPUTS_FILE))
    assert list(saved) == list(layout.OUTPUTS)
    wanted = exported(*RATIO, "--fp32").reference(frames)
    np.testing.assert_allclose(saved[layout.TOKENS], wanted["tokens"].numpy(), atol=1e-5)
    assert np.array_equal(saved[layout.POSITIONS], wanted["positions"].numpy())


def test_the_shares_of_int8_are_the_mean_of_the_clips_and_others_the_least() -> None:
    assert GATES["int8"].of_clips([1.0, 0.5, 0.75]) == 0.75
    assert [GATES[name].of_clips([1.0, 0.5, 0.75]) for name in ("fp32", "fp16", "bf16")] == [0.5] * 3
