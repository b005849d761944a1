"""One file of weights for several graphs: equal tensors lie there once, others stay in their graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from builder.export.shared_weights import ALIGNMENT, LEAST_BYTES, SharedWeights
from runtime.engine import layout


def ir_model(**tensors: np.ndarray[Any, Any]) -> ir.Model:
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in tensors.items()]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 23}), ir_version=10)


def stored(model: ir.Model) -> dict[str, tuple[int, int] | None]:
    """Where each tensor lies in the file, None where it is in the graph."""
    found: dict[str, tuple[int, int] | None] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        inside = not isinstance(tensor, ir.ExternalTensor)
        found[name] = None if inside else (tensor.offset or 0, tensor.length or 0)  # type: ignore[union-attr]
    return found


def test_equal_tensors_share_a_place_and_others_stay_inside(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((32, 16)).astype(np.float32) for _ in range(2))
    small = np.zeros(LEAST_BYTES // 4 - 1, np.float32)
    shared = SharedWeights(tmp_path / layout.DATA_FILE)
    first = ir_model(a=a, b=b, again=a, small=small)
    shared.move(first)
    size = shared.path.stat().st_size
    second = ir_model(
        b=b, other=a, bits=a.view(np.int32), turned=np.ascontiguousarray(a.reshape(16, 32)), changed=a + 1, small=small
    )
    shared.move(second)
    one, two = stored(first), stored(second)
    assert one["a"] == one["again"] == two["other"]
    assert one["b"] == two["b"] != one["a"]
    # The same bytes of another dtype or shape, and other bytes, are other tensors.
    assert [name for name, place in two.items() if place is None] == ["bits", "turned", "changed", "small"]
    assert one["small"] is None
    assert shared.path.stat().st_size == size  # later models add nothing
    assert all(place is None or place[0] % ALIGNMENT == 0 for place in one.values())
    for model, arrays in ((first, {"a": a, "b": b}), (second, {"b": b, "other": a, "changed": a + 1})):
        ir.save(model, tmp_path / "graph.onnx")
        read = {
            t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "graph.onnx")).graph.initializer
        }
        for name, array in arrays.items():
            assert np.array_equal(read[name], array)
