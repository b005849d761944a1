"""Export: the ONNX file is the PyTorch reference, with static shapes, standard operators and fp32 where it matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from builder import stages
from builder.export import functions, vision
from builder.export.chain import export_chain
from builder.export.vision import OPSET, export_onnx, vision_graph
from builder.gate.runs import write_tapped
from builder.settings.config import BuildConfig
from earlytom.errors import UserError
from earlytom.spans import trace_names
from runtime.engine import layout
from tests.builder.conftest import SMALL, Exported

Make = Callable[..., Exported]
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
DATA_FILE = f"{layout.ONNX_FILE}.data"
# name -> the arguments of an export and what (frames per stage, tokens) come to
VARIANTS: dict[str, tuple[list[str], tuple[int, ...], int]] = {
    "default": (["--ratio", "0.3"], (12, 9, 7), 7 * 13),
    "no selection": (["--ratio", "1.0"], (12, 9, 7), 7 * 25),
    "no merging": (["--ratio", "0.3", "--merge-layers", "none"], (12,), 12 * 8),
    "neither": (["--ratio", "1.0", "--merge-layers", "none"], (12,), 12 * 25),
    "explicit budget": (
        ["--ratio", "0.11", "--merge-layers", "0,1,3", "--frame-budget", "12,5,2"],
        (12, 12, 5, 2),
        2 * 17,
    ),
    "one frame": (["--ratio", "0.3", "--frames", "1"], (1, 1, 1), 8),
}


def outputs(path: Path, frames: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Every output of a graph, by name, run by ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {layout.FRAMES: frames.numpy()}), strict=True))


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value that the graph states."""
    known = {t.name: t.data_type for t in model.graph.initializer}
    stated = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    return known | {value.name: value.type.tensor_type.elem_type for value in stated}


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request: pytest.FixtureRequest, exported: Make) -> tuple[Exported, tuple[int, ...], int]:
    arguments, stages, tokens = VARIANTS[request.param]
    return exported(*arguments, "--fp32"), stages, tokens


def test_fp32_graph_equals_the_reference(
    variant: tuple[Exported, tuple[int, ...], int], clips: dict[str, Tensor]
) -> None:
    made, stages, tokens = variant
    assert (made.config.stages, made.config.tokens) == (stages, tokens)
    for frames in clips.values():
        frames = frames[: stages[0]]
        got, wanted = outputs(made.path, frames), made.reference(frames)
        assert np.array_equal(got[layout.POSITIONS], wanted["positions"].numpy())
        np.testing.assert_allclose(got[layout.TOKENS], wanted["tokens"].numpy(), rtol=0, atol=1e-5)


def test_names_shapes_and_dtypes_are_those_of_the_layout(variant: tuple[Exported, tuple[int, ...], int]) -> None:
    made, stages, tokens = variant
    model = onnx.load(str(made.path))
    (frames,) = model.graph.input
    assert frames.name == layout.FRAMES
    assert shape(frames) == [stages[0], 3, 72, 72]
    assert frames.type.tensor_type.elem_type == TensorProto.UINT8
    assert [value.name for value in model.graph.output] == list(layout.OUTPUTS)
    sizes = {layout.SOURCES: [stages[-1], stages[0]], layout.TOKENS: [tokens, 256]}
    whole = (layout.POSITIONS, layout.PLACE)
    for value in model.graph.output:
        assert shape(value) == sizes.get(value.name, [tokens])
        assert value.type.tensor_type.elem_type == (TensorProto.INT64 if value.name in whole else FLOAT)
    assert all(isinstance(size, int) for value in model.graph.value_info for size in shape(value))
    assert made.graph.files == (layout.ONNX_FILE,)
    assert [path.name for path in made.path.parent.iterdir()] == [layout.ONNX_FILE]


def test_standard_operators_but_for_the_two_functions(variant: tuple[Exported, tuple[int, ...], int]) -> None:
    made, _, _ = variant
    model = onnx.load(str(made.path))
    onnx.checker.check_model(model, full_check=True)
    imports = {opset.domain: opset.version for opset in model.opset_import}
    assert imports.pop("") == OPSET
    assert set(imports) <= {functions.DOMAIN}
    bodies = {function.name for function in model.functions}
    assert bodies <= {functions.FRAME_PLAN, functions.SELECT_TOKENS}
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        if node.domain:
            assert (node.domain, node.op_type in bodies) == (functions.DOMAIN, True)
        else:
            assert onnx.defs.has(node.op_type, max_inclusive_version=OPSET)
    used = Counter(node.op_type for node in model.graph.node if node.domain)
    assert used[functions.SELECT_TOKENS] == (made.config.earlytom.retention_ratio < 1)


def test_attention_is_one_operator_everywhere_but_in_the_explicit_layer(exported: Make) -> None:
    model = onnx.load(str(exported("--ratio", "0.3", "--fp32").path))
    count = Counter(node.op_type for node in model.graph.node)
    assert count["Attention"] == SMALL[0] - 1
    assert count["Softmax"] == 1
    # With merging off the explicit attention matrix is formed beside the last layer, which stays as it was.
    model = onnx.load(str(exported("--ratio", "0.3", "--merge-layers", "none", "--fp32").path))
    count = Counter(node.op_type for node in model.graph.node)
    assert (count["Attention"], count["Softmax"]) == (SMALL[0], 1)


def test_functions_appear_once_however_often_they_are_called(exported: Make) -> None:
    model = onnx.load(str(exported("--ratio", "0.3", "--fp32").path))
    calls = Counter(node.op_type for node in model.graph.node if node.domain == functions.DOMAIN)
    assert calls == {functions.FRAME_PLAN: 3, functions.SELECT_TOKENS: 1}  # two merges and the final segments
    assert len(model.functions) == 2


def test_values_of_the_graph_carry_the_names_of_the_trace(exported: Make, clips: dict[str, Tensor]) -> None:
    made = exported("--ratio", "0.3", "--fp32")
    frames = clips["drawn0.mp4"]
    trace = made.reference(frames)
    assert list(trace) == trace_names(made.config.earlytom)
    tapped = write_tapped(made.path, list(trace), rounded=False)
    try:
        got = outputs(tapped, frames)
    finally:
        tapped.unlink()
    assert set(got) == set(trace)
    for name, wanted in trace.items():
        assert got[name].shape == tuple(wanted.shape)
        np.testing.assert_allclose(got[name], wanted.numpy(), rtol=0, atol=1e-4, err_msg=name)


def test_half_graph_has_fp32_where_it_matters(exported: Make) -> None:
    """Layer norms, the explicit softmax, frame similarity and both decisions are fp32; products and attention half."""
    model = onnx.load(str(exported("--ratio", "0.3", "--fp16").path))
    kind = types(model)
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        seen[node.op_type] += 1
        into, out = [kind[name] for name in node.input if name], [kind[name] for name in node.output]
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert {*into, *out} == {FLOAT}, node.op_type
        elif node.op_type in ("Attention", "Conv", "Gelu"):
            assert {*into, *out} == {HALF}, node.op_type
        elif node.op_type == functions.FRAME_PLAN:
            assert (into, out[0]) == ([FLOAT], FLOAT)
        elif node.op_type == functions.SELECT_TOKENS:
            assert into == [HALF, FLOAT, TensorProto.BOOL]
            assert out[0] == HALF
    assert seen["LayerNormalization"] == 2 * SMALL[0]
    for layer in (1, 2):
        assert kind[f"hidden_{layer}"] == HALF
        assert kind[f"similarity_{layer}"] == kind[f"weights_{layer}"] == FLOAT
    assert (kind["relevance"], kind["features"], kind[layout.TOKENS]) == (FLOAT, HALF, HALF)
    # Similarity is fp32 from the hidden states on, not only at its end.
    size = {value.name: shape(value) for value in model.graph.value_info}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and kind[node.output[0]] == FLOAT]
    assert all({kind[name] for name in node.input} == {FLOAT} for node in products)
    # 81 patches: one Gram product per merge and one for the final segments, and received attention being merged.
    # Then sources are multiplied, and tokens are compared and counted.
    tokens = size[layout.TOKENS][0] if layout.TOKENS in size else shape(model.graph.output[0])[0]
    found = [size.get(node.output[0]) for node in products]
    for wanted in ([81, 12, 12], [81, 9, 9], [7, 81], [81, 7, 7], [tokens, 7 * 25]):
        assert found.count(wanted) == 1, (wanted, found)
    assert len(found) == 5 + 2 + 1
    assert not [
        t.name for t in model.graph.initializer if len(t.dims) == 2 and min(t.dims) > 81 and t.data_type != HALF
    ]


def test_bf16_graph_is_bf16(exported: Make) -> None:
    model = onnx.load(str(exported("--ratio", "0.3", "--bf16").path))
    onnx.checker.check_model(model, full_check=True)
    kind = types(model)
    assert kind[layout.TOKENS] == kind["features"] == TensorProto.BFLOAT16
    assert HALF not in kind.values()
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert {kind[name] for node in norms for name in (*node.input, *node.output)} == {FLOAT}


def again(made: Exported, place: Path) -> vision.ExportedGraph:
    place.mkdir()
    return stages.export.__wrapped__(made.config, place)  # type: ignore[attr-defined]  # not the fixture's copy


def test_two_exports_are_byte_identical(exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is not the quick one of the tests."""
    made = exported("--ratio", "0.3", "--fp32")
    written = made.path.read_bytes()
    monkeypatch.setattr(torch.onnx, "export", torch.onnx.export.__wrapped__)  # type: ignore[attr-defined]
    assert again(made, tmp_path / "again").path.read_bytes() == written
    assert b".py" not in written  # no trace of where this project is installed


def test_large_weights_go_beside_the_graph(
    exported: Make, clips: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("--ratio", "0.3", "--fp32")
    monkeypatch.setattr(vision, "EXTERNAL_DATA_BYTES", 1)
    graph = again(made, tmp_path / "external")
    assert graph.files == (layout.ONNX_FILE, DATA_FILE)
    assert sorted(path.name for path in graph.path.parent.iterdir()) == sorted(graph.files)
    assert graph.path.stat().st_size < made.path.stat().st_size / 4
    frames = clips["drawn0.mp4"]
    inside, beside = outputs(made.path, frames), outputs(graph.path, frames)
    assert all(np.array_equal(inside[name], beside[name]) for name in layout.OUTPUTS)
    (graph.path.parent / DATA_FILE).unlink()  # the weights really are there
    with pytest.raises(Exception, match=DATA_FILE):
        outputs(graph.path, frames)


def test_adaptive_schedule_is_refused(exported: Make, tmp_path: Path) -> None:
    made = exported("--ratio", "0.3", "--fp32")
    graph = vision_graph(made.config, torch.float32)
    graph.config = graph.config.replace(schedule="adaptive")
    with pytest.raises(UserError, match="--schedule budget"):
        export_onnx(graph, 12, (72, 72), tmp_path / layout.ONNX_FILE)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--schedule adaptive"):  # and a chain is not for the other
        export_chain(vision_graph(made.config, torch.float32), 12, (72, 72), tmp_path)
    assert not list(tmp_path.iterdir())


def test_reference_still_decides_itself_after_an_export(
    exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of the ONNX functions stand in for the decisions while tracing, and only then."""
    config: BuildConfig = exported("--ratio", "0.3", "--fp32").config
    graph = vision_graph(config, torch.float32)
    rule = graph.decisions
    monkeypatch.setattr(graph, "forward", lambda frames: 1 / 0)
    with pytest.raises(Exception, match="division"):
        export_onnx(graph, 12, (72, 72), tmp_path / layout.ONNX_FILE)
    assert graph.decisions is rule
    assert not list(tmp_path.iterdir())


def test_normalisation_is_the_models_own(exported: Make, clips: dict[str, Tensor]) -> None:
    made = exported("--ratio", "0.3", "--fp32")
    frames, settings = clips["drawn0.mp4"], made.config.checkpoint.preprocessing
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (settings.mean, settings.std))
    torch.testing.assert_close(made.reference.pixels(frames), (frames / 255 - mean) / std, rtol=0, atol=1e-6)
