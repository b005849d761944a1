"""An engine's layers in one record: from the compiler's list that the build saved, or from the ONNX graph.

`compiled_layers`, `chain_layers` and `graph_layers` return the same fields in plain JSON types: totals, groups by kind
and precision, and the layers with the most flops (see `_added_up`). Weights are counted but not read; `onnx` is
imported only for graphs. Files of another version may raise any error, which the caller turns into one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from builder.compile.layers import BYTES, Layer, LayerSummary, LayerTensor, elements, summarise
from builder.inspection import Record
from runtime.engine import layout
from runtime.engine.manifest import REBUILD, Manifest
from runtime.files.plain import MIB, read_json

BIGGEST = 5
MOST_BYTES = 64 * MIB  # limit of a list of layers or a report; a tower of 26 layers has a few MiB
_ONNX_DTYPES = {"FLOAT16": "fp16", "BFLOAT16": "bf16", "FLOAT": "fp32", "DOUBLE": "fp64"}
_ONNX_WORK = {"Attention": "attention", "Conv": "convolution", "MatMul": "product", "Gemm": "product"}


def compiled_layers(path: Path) -> Record:
    """The record of a compiled engine, from its layers.json."""
    return _added_up(*_listed(path))


def _listed(path: Path) -> tuple[str, list[Layer], LayerSummary]:
    document = read_json(path, REBUILD, MOST_BYTES)
    layers = []
    for values in document["layers"]:
        tensors = {name: tuple(LayerTensor(**t) for t in values[name]) for name in ("inputs", "constants", "outputs")}
        layers.append(Layer(**{**values, **tensors}))
    return document["source"], layers, LayerSummary.from_dict(document["summary"])


def chain_layers(folder: Path, manifest: Manifest) -> Record | None:
    """The record of all stages of a chain or a chunked engine, names prefixed by the stage; None without lists.

    Flops are those of a whole clip; of a chain, of the median clip.
    """
    graphs = manifest.layout.graphs
    names = [graph.file(layout.ONNX_FILE if manifest.backend == "onnx" else layout.LAYERS_FILE) for graph in graphs]
    if not all(name in manifest.files for name in names):
        return None
    source, every, unfused = "", [], []
    kept = manifest.frames_kept if manifest.adaptive else ((1, 1, 1),) * len(names)  # chunks have static sizes
    for stage, (graph, name, (_, usual, _)) in enumerate(zip(graphs, names, kept or (), strict=True)):
        if manifest.backend == "onnx":
            source, layers, summary = _graph(folder / name, usual)
        else:
            source, layers, summary = _listed(folder / name)
            layers = [_for_frames(layer, usual) for layer in layers]
        if graph.calls > 1:
            layers = [dataclasses.replace(layer, flops=layer.flops * graph.calls) for layer in layers]
        every += [_in_stage(layer, stage) for layer in layers]
        unfused += [f"{stage}: {node}" for node in summary.attention_unfused]
    summary = dataclasses.replace(summarise(every), attention_unfused=tuple(unfused))
    source = "the graphs" if manifest.backend == "onnx" else source
    return _added_up(f"{source} of {len(names)} stages", every, summary)


def _for_frames(layer: Layer, frames: int) -> Layer:
    """The layer for `frames` frames, as the list counts a dynamic number of frames as one."""
    dynamic = any(-1 in tensor.shape for tensor in (*layer.inputs, *layer.outputs))
    return dataclasses.replace(layer, flops=layer.flops * frames) if dynamic else layer


def _in_stage(layer: Layer, stage: int) -> Layer:
    """The layer with names prefixed by its stage, as names repeat between stages."""
    constants = tuple(dataclasses.replace(tensor, name=f"{stage}: {tensor.name}") for tensor in layer.constants)
    return dataclasses.replace(layer, name=f"{stage}: {layer.name}", constants=constants)


def graph_layers(path: Path) -> Record:
    """The record of an ONNX graph, whose nodes are the layers; external weights are not read.

    Each call of a local function is one layer without flops: their bodies multiply nothing larger than [F, F].
    """
    return _added_up(*_graph(path))


def _graph(path: Path, frames: int = -1) -> tuple[str, list[Layer], LayerSummary]:
    """Source, layers and summary of a graph, with `frames` for dynamic sizes."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # the protobuf library's own errors, which differ with its implementation
        raise ValueError(f"{path.name} is no ONNX graph, {error}") from error
    name_of = onnx.TensorProto.DataType.Name
    weights = {t.name: _tensor(t.name, tuple(t.dims), name_of(t.data_type)) for t in graph.initializer}
    known = dict(weights)
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value or frames for dim in kind.shape.dim)
        known[value.name] = _tensor(value.name, shape, name_of(kind.elem_type))
    for node in graph.node:  # dequantised tensors get their int8 dtype, as their products run in int8
        if node.op_type == "DequantizeLinear" and (whole := known.get(node.input[0])) is not None:
            known[node.output[0]] = dataclasses.replace(whole, name=node.output[0])
    layers = [_node_layer(node, known, set(weights)) for node in graph.node]
    return path.name, layers, summarise(layers)


def _tensor(name: str, shape: tuple[int, ...], dtype: str) -> LayerTensor:
    return LayerTensor(name, shape, _ONNX_DTYPES.get(dtype, dtype.lower()), "")


def _node_layer(node: Any, known: dict[str, LayerTensor], weights: set[str]) -> Layer:
    work = _ONNX_WORK.get(node.op_type, "other") if node.domain in ("", "ai.onnx") else "other"
    operands, outputs = (tuple(known[n] for n in names if n in known) for names in (node.input, node.output))
    touched = (*operands, *outputs) if work == "other" else operands[:2]
    return Layer(
        name=node.name or node.op_type,
        kind=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
        work=work,
        precision=max((t.dtype for t in touched if t.dtype in BYTES), key=BYTES.__getitem__, default=""),
        flops=0 if work == "other" else _flops(node.op_type, operands[0], operands[1], outputs[0]),
        tactic="",
        inputs=tuple(t for t in operands if t.name not in weights),
        constants=tuple(t for t in operands if t.name in weights),
        outputs=outputs,
        onnx=(node.name,),
    )


def _flops(operator: str, a: LayerTensor, b: LayerTensor, out: LayerTensor) -> int:
    """Two flops per multiply-add. Attention: a is Q [.., S, d], b is K [.., T, d]; two products."""
    if operator == "Attention":
        return 2 * abs(b.shape[-2]) * (elements(a) + elements(out))
    if operator == "Conv":
        return 2 * elements(out) * (elements(b) // abs(b.shape[0]))
    return 2 * elements(out) * (elements(a) // abs(out.shape[0]) if operator == "Gemm" else abs(a.shape[-1]))


def _added_up(source: str, layers: Sequence[Layer], summary: LayerSummary) -> Record:
    """Totals, groups by kind, work and precision, and the `BIGGEST` layers by flops."""
    groups: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in layers:
        if layer.inputs or layer.constants or layer.outputs:  # the others only synchronise
            groups.setdefault((layer.kind, layer.work, layer.precision), []).append(layer)
    kinds = [
        {"kind": kind, "work": work, "precision": precision, "layers": len(members), **_cost(members)}
        for (kind, work, precision), members in groups.items()
    ]
    biggest = [{"name": x.name, "kind": x.kind, "precision": x.precision, **_cost([x])} for x in layers]
    for rows in (kinds, biggest):
        rows.sort(key=lambda row: (row["flops"], row["weight_bytes"], row.get("layers", 0)), reverse=True)
    return {
        "source": str(source),
        "count": int(summary.layers),
        "matrix_flops": int(summary.matrix_flops),
        "half_share": float(summary.half_share),
        "int8_share": float(summary.int8_share),
        "flop_shares": {dtype: float(share) for dtype, share in summary.flop_shares.items()},
        "weight_bytes": _cost(layers)["weight_bytes"],
        "weight_shares": {dtype: float(share) for dtype, share in summary.weight_shares.items()},
        "attention_fused": len(summary.attention_fused),
        "attention_unfused": list(map(str, summary.attention_unfused)),
        "kinds": kinds,
        "biggest": biggest[:BIGGEST],
    }


def _cost(layers: Iterable[Layer]) -> dict[str, int]:
    """Flops of matrix products, and bytes of weights, those shared by several layers counted once."""
    layers = list(layers)
    weights = {t.name: elements(t) * BYTES.get(t.dtype, 0) for layer in layers for t in layer.constants}
    return {"flops": sum(layer.flops for layer in layers), "weight_bytes": sum(weights.values())}
