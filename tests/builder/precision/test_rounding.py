"""Rounding every result: what ONNX Runtime would leave out on a CPU is there, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from builder.precision.rounding import round_results
from tests.builder.conftest import Exported

Array = np.ndarray[Any, Any]
TYPES = {"fp16": (TensorProto.FLOAT16, torch.float16), "bf16": (TensorProto.BFLOAT16, torch.bfloat16)}
RANDOM = torch.Generator().manual_seed(0)
A, B = (torch.randn(shape, generator=RANDOM) for shape in ((6, 64), (64, 5)))


def model_of(dtype: str, factor: float) -> onnx.ModelProto:
    """((a @ b) * factor)^T + factor, in half but for its input and its output."""
    kind = TYPES[dtype][0]
    weights = [("b", B), ("factor", torch.tensor(factor))]
    stored = [numpy_helper.from_array(value.numpy(), name) for name, value in weights]
    half = [helper.make_tensor(t.name, kind, t.dims, numpy_helper.to_array(t).flatten().tolist()) for t in stored]
    nodes = [
        helper.make_node("Cast", ["a"], ["narrow"], to=kind),
        helper.make_node("MatMul", ["narrow", "b"], ["product"]),
        helper.make_node("Mul", ["product", "factor"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["turned"]),
        helper.make_node("Add", ["turned", "factor"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["out"], to=TensorProto.FLOAT),
    ]
    values = [("a", TensorProto.FLOAT, [6, 64]), ("out", TensorProto.FLOAT, [5, 6])]
    (given, out) = (helper.make_tensor_value_info(*value) for value in values)
    graph = helper.make_graph(nodes, "g", [given], [out], half)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, a: torch.Tensor) -> Array:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["out"], {"a": a.numpy()})[0]


@pytest.mark.parametrize("dtype", TYPES)
def test_every_result_is_rounded(dtype: str) -> None:
    kind = TYPES[dtype][1]
    product = (A.to(kind).float() @ B.to(kind).float()).to(kind)
    factor = torch.tensor(0.3).to(kind)
    wanted = (product * factor).T + factor
    model = model_of(dtype, 0.3)
    round_results(model)
    assert np.array_equal(run(model, A), wanted.float().numpy())


def test_an_overflow_that_onnx_runtime_hides_shows() -> None:
    large = 300 * torch.ones(6, 64)
    plain, rounded = model_of("fp16", 1e-3), model_of("fp16", 1e-3)
    for model in (plain, rounded):
        tensor = helper.make_tensor("b", TensorProto.FLOAT16, [64, 5], [10.0] * 320)  # products of 192,000
        model.graph.initializer[0].CopyFrom(tensor)
    round_results(rounded)
    assert np.isinf(run(rounded, large)).all()
    assert np.isfinite(
        run(plain, large)
    ).all()  # if this fails, ONNX Runtime has learnt to round: do without the module


def test_weights_and_names_stay(exported: Callable[..., Exported]) -> None:
    before = onnx.load(str(exported("--ratio", "0.3", "--fp16").path))
    after = onnx.ModelProto()
    after.CopyFrom(before)
    round_results(after)
    onnx.checker.check_model(after, full_check=True)
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        assert new.data_type == old.data_type
        assert numpy_helper.to_array(new).tobytes() == numpy_helper.to_array(old).tobytes()
    made = {name for node in after.graph.node for name in node.output}
    assert {name for node in before.graph.node for name in node.output} <= made
    assert [value.name for value in after.graph.output] == [value.name for value in before.graph.output]


def test_an_fp32_graph_stays_as_it_is(exported: Callable[..., Exported]) -> None:
    before = onnx.load(str(exported("--ratio", "0.3", "--fp32").path))
    after = onnx.ModelProto()
    after.CopyFrom(before)
    round_results(after)
    assert after == before
