"""Emulates half precision on a CPU: every operator in fp32, every result rounded to its own dtype.

ONNX Runtime has few half kernels for CPUs. It runs most operators of an fp16 graph in fp32 and leaves out the rounding
between them: a product that overflows half and is scaled down afterwards comes out right, so that a graph which is all
NaN on a GPU passes. It does not run bf16 at all. `round_results` rewrites a half graph into fp32 operators with
explicit casts, which ONNX Runtime keeps.

A GPU's matrix products do the same: they accumulate in fp32 and round once. A compiler that fuses operators rounds less
often. Inside a fused attention node nothing is rounded.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper

NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# These only move values that are rounded already.
_MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Split", "Concat", "Gather", "Expand", "Identity")


def round_results(model: onnx.ModelProto) -> None:
    """Rewrite a graph in place: values keep their names, half values become fp32 values rounded to half.

    Weights stay stored in half and are cast to fp32. Local functions are called with fp32 values; the operators in
    their bodies are not rounded.
    """
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
    nodes: list[NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type in NARROW:
            nodes.append(_cast(f"{tensor.name}__stored", tensor.name, TensorProto.FLOAT))
            tensor.name = f"{tensor.name}__stored"
    for node in graph.node:
        nodes.append(node)
        if node.op_type in _MOVES and not node.domain:
            continue
        for index, name in enumerate(node.output):
            if kinds.get(name) not in NARROW:
                continue
            exact, rounded = f"{name}__exact", f"{name}__rounded"
            if node.op_type in ("Cast", "Constant"):  # they name their own dtype, so their result is rounded already
                node.output[index] = rounded
            else:
                node.output[index] = exact
                nodes.append(_cast(exact, rounded, kinds[name]))
            nodes.append(_cast(rounded, name, TensorProto.FLOAT))
    for value in [*graph.input, *graph.value_info, *graph.output]:  # a half input was rounded by the graph before
        if value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.node[:]
    graph.node.extend(nodes)


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)
