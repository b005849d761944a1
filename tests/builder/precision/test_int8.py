"""Int8Linear: golden numbers, the graph that it becomes, and what compilers make of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from builder.compile.engine import compile_engine
from builder.export.vision import save, trace
from builder.precision.int8 import Int8Linear
from tests.builder.needed import needs_rtx

WEIGHT = torch.tensor([[127.0, -63.5, 0.0], [0.0, 1.0, -2.54]])
BIAS = torch.tensor([0.5, -1.0])
DTYPES = (torch.float32, torch.float16)


class One(nn.Module):
    """For the exporter."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.linear(x)}


def exported(linear: nn.Module, x: Tensor, path: Path) -> Path:
    model = trace(One(linear), {"x": x}, ["y"])
    save(model, path, ["y"], lambda _: pytest.fail("no function"))
    return path


def session(path: Path, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_golden_numbers() -> None:
    """Columns have the scales 1 and 0.02, what enters 0.5: 1.2 becomes 2, -100 is cut off at -64, ties go to even."""
    linear = Int8Linear(WEIGHT, BIAS, 63.5, torch.float32)
    assert torch.equal(linear.weight.T, torch.tensor([[127, -64, 0], [0, 50, -127]], dtype=torch.int8))
    got = linear(torch.tensor([[[1.2, -100.0, 0.25]]]))
    wanted = [127 * 1.0 + -64 * -64 + 0.5, 50 * 0.02 * -64 + 0 - 1]  # 0.25 / 0.5 rounds to 0
    torch.testing.assert_close(got, torch.tensor([[wanted]]), rtol=1e-6, atol=1e-4)


def test_half_has_the_same_whole_numbers_and_scales_within_its_digits() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1e-6  # a column whose own scale half cannot hold
    whole, half = (Int8Linear(weight, None, 4.0, dtype) for dtype in DTYPES)
    assert half.factor is not None
    back = half.weight.T.float() * half.weight_scale.float() * half.factor.float()[:, None]
    loud = torch.arange(8) != 3
    torch.testing.assert_close(back[loud], weight[loud], rtol=0, atol=float(weight.abs().max()) / 250)
    assert (half.weight.T[loud].int() - whole.weight.T[loud].int()).abs().max() <= 1
    assert back[3].abs().max() < 1e-5


def test_smoothing_inside_changes_nothing_but_the_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 16, generator=generator), torch.randn(4, 16, generator=generator)
    x[:, 5] *= 100  # a loud channel that weighs no more than the others
    weight[:, 5] /= 100
    wanted = x @ weight.T
    smooth = x.abs().amax(0) ** 0.5
    errors = [
        float((Int8Linear(weight, None, limit, torch.float32, how)(x) - wanted).norm() / wanted.norm())
        for limit, how in ((float(x.abs().max()), None), (float((x / smooth).abs().max()), smooth))
    ]
    assert errors[1] < 0.05 < 0.15 < errors[0] < 0.5  # the negative control has a wrong result, not a wrong function


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_graph(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its operators, its weights in int8, and the same numbers as in PyTorch."""
    torch.manual_seed(0)
    linear = Int8Linear(torch.randn(48, 32), torch.randn(48), 4.0, dtype, torch.rand(32) + 0.5)
    x = torch.randn(2, 5, 32).to(dtype)
    path = exported(linear, x, tmp_path / "one.onnx")
    model = onnx.load(str(path))
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["QuantizeLinear"] == operators["MatMul"] == 1
    assert operators["DequantizeLinear"] == 2
    weights = {value.name: value for value in model.graph.initializer}
    (stored,) = (value for value in weights.values() if list(value.dims) == [32, 48])
    assert np.array_equal(numpy_helper.to_array(stored), linear.weight.numpy())
    assert stored.data_type == onnx.TensorProto.INT8
    (read,) = (node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] == stored.name)
    assert list(weights[read.input[1]].dims) == ([48] if dtype == torch.float32 else [])
    (got,) = session(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got).float(), linear(x).float(), rtol=0, atol=0.02)


def test_onnx_runtime_multiplies_whole_numbers(tmp_path: Path) -> None:
    """In fp32 graphs, not in half ones: there it widens the weights when it loads them."""
    found = []
    for dtype in DTYPES:
        linear = Int8Linear(torch.randn(48, 32), torch.randn(48), 4.0, dtype)
        path = exported(linear, torch.randn(2, 5, 32).to(dtype), tmp_path / f"{dtype}.onnx")
        session(path, tmp_path / "optimised.onnx")
        found.append({node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node})
    assert "MatMulIntegerToFloat" in found[0]
    assert "MatMul" not in found[0]
    assert "MatMul" in found[1]


class Three(nn.Module):
    """Products of one input, as queries, keys and values are."""

    def __init__(self, unsigned: bool) -> None:
        super().__init__()
        weights = torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(0))
        made = (Int8Linear(one, one[:, 0], 4.0, torch.float32, unsigned=unsigned) for one in weights)
        self.linears = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([linear(x) for linear in self.linears])


def test_products_of_one_input_are_whole_numbers_where_it_is_unsigned(tmp_path: Path) -> None:
    """With the same result. The negative control: ONNX Runtime widens the weights where it is signed."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)) * 3  # some are cut off
    found, results = [], []
    for unsigned in (True, False):
        path = exported(Three(unsigned), x, tmp_path / "three.onnx")
        results.append(session(path, tmp_path / "optimised.onnx").run(None, {"x": x.numpy()})[0])
        found.append(Counter(node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)
    assert (found[0]["MatMulIntegerToFloat"], found[0]["MatMul"]) == (3, 0)
    assert found[1]["MatMul"] == 3


@needs_rtx
def test_tensorrt_scales_before_it_writes_half(tmp_path: Path) -> None:
    """The product's factor in the engine is that of both scales. With a scale a column it is 1, and sums overflow."""
    torch.manual_seed(0)
    linear = Int8Linear(torch.randn(512, 256), torch.randn(512), 4.0, torch.float16)
    path = exported(linear, torch.randn(2, 64, 256).half(), tmp_path / "one.onnx")
    report = compile_engine(
        path, tmp_path / "one.engine", flavour="tensorrt-rtx", dtype="fp16", expected_share=0.0, int8_share=1.0
    )
    assert report.layers.flop_shares == {"int8": 1.0}
    alpha = float(linear.input_scale) * float(linear.weight_scale)
    text = (tmp_path / "one.engine").read_bytes()
    written = [int(word[:8], 16) for word in text.split(b" alpha=")[1:]]
    found = [float(np.array([bits], np.uint32).view(np.float32)[0]) for bits in written]
    assert found == pytest.approx([alpha], rel=1e-3)
