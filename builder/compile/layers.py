"""Parses an engine's layers from the text TensorRT prints, and checks that the engine has the precision asked for.

With DETAILED profiling verbosity the verbose build log ends in one record per layer (name, type, tensors with shapes
and dtypes, tactic, ONNX nodes it came from). That needs no GPU. The engine inspector prints the same records, so one
parser serves both. `signal` and `wait` records are synchronisation between streams and have no tensors.

**Precision.** The half share is the share of the flops of all matrix products (matrix multiplication, convolution,
fused attention) whose operands are fp16 or bf16; the int8 share likewise. Flops come from the recorded shapes, 2 per
multiply-add. Normalisation, softmax and other element-wise work is no matrix product: an fp32 layer norm does not lower
the half share, a weight stored in half but multiplied in fp32 does. A dynamic dimension counts as 1, which leaves the
shares right when only the number of frames is dynamic.

This module knows text and numbers only; it imports neither TensorRT nor ONNX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from earlytom.errors import UserError

# TensorRT's dtype names -> those of flags and manifests. Older data centre releases write sentences ("Row major linear
# FP16 format"), newer ones words.
_DTYPES = {"Half": "fp16", "Float": "fp32", "BFloat16": "bf16", "Double": "fp64", "FP8": "fp8"}
_SENTENCE_DTYPES = {"FP16": "fp16", "FP32": "fp32", "BF16": "bf16", "INT64": "int64", "INT32": "int32", "INT8": "int8"}
BYTES = {"int8": 1, "fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
"""Operand dtypes of matrix products, narrow to wide, with the bytes of an element."""
_COUNTED = tuple(BYTES)

_RECORD = re.compile(r"^Name: (?P<name>.+?), LayerType: (?P<kind>[^,]+),(?P<rest>.*)$", re.MULTILINE)
_SECTION = re.compile(r"\b(?P<section>Inputs|Constants|Outputs): \[(?P<body>\s*|.*?\})\](?=, [A-Z]|$)")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.+?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[-\d, ]*)\],(?P<rest>[^{}]*)"
)
_DATATYPE = re.compile(r"(?:Format/)?Datatype: (?P<value>[^,]+?)\s*(?=,|$)")
_FORMAT = re.compile(r"\bFormat: (?P<value>.+?)\s*$")
_TACTIC = re.compile(r"TacticName: (?P<value>[^,]*),")
_ONNX = re.compile(r"\[ONNX Layer: (?P<name>[^\]]+)\]")

_ATTENTION = re.compile(r"(?:^|_)(?:gemm|gemv|fused)_mha(?:_|$)|fmha", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv|correlation", re.IGNORECASE)
_PRODUCT_KIND = re.compile(r"gemm|matrix_?multiply|matmul", re.IGNORECASE)
_PRODUCT_NAME = re.compile(r"^__myl_(?:[A-Z][a-z]*)*?Fc(?![a-z])|^__fc\d")

Shape = tuple[int, ...]
INT8_SLACK = 0.02


@dataclass(frozen=True)
class LayerTensor:
    """A tensor a layer reads or writes; `shape` holds -1 for a dynamic dimension."""

    name: str
    shape: Shape
    dtype: str
    format: str


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        kind: TensorRT's layer type (gemm, correlation, kgen, runtime_fusion, signal, ...).
        work: "attention", "convolution" or "product" (the three kinds of matrix products), else "other".
        precision: widest operand dtype of the matrix product, else the widest of `BYTES` among its tensors, else "".
        flops: of the matrix product; 0 for other work, or where the record is incomplete.
        onnx: names of the ONNX nodes it came from; a node inside a local function reads "node | caller (Function)".
    """

    name: str
    kind: str
    work: str
    precision: str
    flops: int
    tactic: str
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    onnx: tuple[str, ...]


@dataclass(frozen=True)
class LayerSummary:
    """The figures of `layers.json`.

    Attributes:
        layers: number of layers, synchronisation records left out.
        attention_fused: names of the layers that are a fused attention kernel.
        attention_unfused: ONNX Attention nodes that became no such layer.
        flop_shares: share of the matrix-product flops by operand dtype, such as {"fp16": 0.99, "fp32": 0.01}.
        weight_shares: share of the bytes of the constants by dtype.
        matrix_flops: flops of all matrix products of one inference.
        unsized: matrix products whose flops cannot be counted, the record being incomplete.
        unplaced: ONNX matrix nodes that became no recognised matrix product (folded away, or a misread kernel).
    """

    layers: int
    attention_fused: tuple[str, ...]
    attention_unfused: tuple[str, ...]
    flop_shares: dict[str, float]
    weight_shares: dict[str, float]
    matrix_flops: int
    unsized: tuple[str, ...]
    unplaced: tuple[str, ...]

    @property
    def half_share(self) -> float:
        """Share of the matrix-product flops whose operands are 16 bits wide."""
        return self.flop_shares.get("fp16", 0.0) + self.flop_shares.get("bf16", 0.0)

    @property
    def int8_share(self) -> float:
        """Share of the matrix-product flops whose operands are int8."""
        return self.flop_shares.get("int8", 0.0)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "half_share": self.half_share}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSummary:
        """The inverse of `to_dict`, also after a trip through JSON."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        fields.pop("half_share", None)
        return cls(**fields)


def parse_layers(text: str) -> tuple[Layer, ...]:
    """Read every layer record in a build log or in the inspector's one-line format, in the order of execution."""
    layers = []
    for match in _RECORD.finditer(text):
        sections: dict[str, tuple[LayerTensor, ...]] = {"Inputs": (), "Constants": (), "Outputs": ()}
        for section in _SECTION.finditer(match["rest"]):
            sections[section["section"]] = tuple(_tensor(t) for t in _TENSOR.finditer(section["body"]))
        tactic = _TACTIC.search(match["rest"])
        layers.append(
            _layer(
                match["name"],
                match["kind"].strip(),
                *sections.values(),
                tactic=tactic["value"] if tactic else "",
                onnx=tuple(_ONNX.findall(match["rest"])),
            )
        )
    return tuple(layers)


def _tensor(match: re.Match[str]) -> LayerTensor:
    shape = tuple(int(n) for n in match["shape"].replace(" ", "").split(",") if n)
    datatype, layout = _DATATYPE.search(match["rest"]), _FORMAT.search(match["rest"])
    return LayerTensor(
        match["name"], shape, _dtype(datatype["value"] if datatype else ""), layout["value"] if layout else ""
    )


def _dtype(text: str) -> str:
    word = text.split(" ")[0]
    if word in _DTYPES:
        return _DTYPES[word]
    for sentence, dtype in _SENTENCE_DTYPES.items():
        if sentence in text.upper().split():
            return dtype
    return word.lower()


def _layer(
    name: str,
    kind: str,
    inputs: tuple[LayerTensor, ...],
    constants: tuple[LayerTensor, ...],
    outputs: tuple[LayerTensor, ...],
    *,
    tactic: str,
    onnx: tuple[str, ...],
) -> Layer:
    work, operands, flops = "other", (*inputs, *constants, *outputs), 0
    if _ATTENTION.search(name):
        work, (operands, flops) = "attention", _attention(inputs, outputs)
    elif _CONVOLUTION.search(kind):
        work, (operands, flops) = "convolution", _convolution(inputs, constants, outputs)
    elif _PRODUCT_KIND.search(kind) or _PRODUCT_NAME.search(name):
        work, (operands, flops) = "product", _product(inputs, constants, outputs)
    return Layer(name, kind, work, _widest(operands), flops, tactic, inputs, constants, outputs, onnx)


_Sized = tuple[tuple[LayerTensor, ...], int]  # the operands of a matrix product, its flops


def _attention(inputs: Sequence[LayerTensor], outputs: Sequence[LayerTensor]) -> _Sized:
    """Q [B, S, d], K [B, d, T] or [B, T, d], V [B, T, e] -> [B, S, e]: two products."""
    matrices = tuple(t for t in inputs if len(t.shape) >= 3 and t.dtype in _COUNTED)
    if len(matrices) < 3 or not outputs:
        return tuple(inputs), 0
    query, key, value = matrices[:3]
    batch = math.prod(map(abs, query.shape[:-2]))
    rows, width = abs(query.shape[-2]), abs(query.shape[-1])
    keys = elements(key) // (batch * width)
    return (query, key, value), 2 * batch * rows * keys * (width + abs(outputs[0].shape[-1]))


def _convolution(
    inputs: Sequence[LayerTensor], constants: Sequence[LayerTensor], outputs: Sequence[LayerTensor]
) -> _Sized:
    """Kernel [O, I, kh, kw], output [F, O, h, w]: every output element is a product of length I*kh*kw."""
    kernel = max((t for t in constants if len(t.shape) >= 3), key=elements, default=None)
    if kernel is None or not outputs:
        return tuple(inputs[:1]), 0
    return (*inputs[:1], kernel), 2 * elements(outputs[0]) * (elements(kernel) // abs(kernel.shape[0]))


def _product(inputs: Sequence[LayerTensor], constants: Sequence[LayerTensor], outputs: Sequence[LayerTensor]) -> _Sized:
    """Find the two tensors [.., M, K] x [.., K, N] whose product is an output [.., M, N].

    With |X| the elements of X, |A| |B| / |C| is K squared (times a shared batch) however each is transposed, so a pair
    is accepted if that is a square whose root is a dimension of both. Weights first: a fused residual is an input, too.
    """
    weights = sorted((t for t in constants if _is_matrix(t)), key=elements, reverse=True)
    activations = [t for t in inputs if _is_matrix(t)]
    pairs = [(a, b) for b in weights for a in activations]
    pairs += [(a, b) for i, a in enumerate(activations) for b in activations[i + 1 :]]
    for result in outputs:
        for a, b in pairs:
            batch = min(math.prod(map(abs, t.shape[:-2])) for t in (a, b))
            square, remainder = divmod(elements(a) * elements(b), elements(result) * batch)
            k = math.isqrt(square)
            if remainder == 0 and k * k == square and k in map(abs, a.shape) and k in map(abs, b.shape):
                return (a, b), 2 * elements(result) * k
    return (*activations[:1], *weights[:1]), 0


def _is_matrix(tensor: LayerTensor) -> bool:
    return len(tensor.shape) >= 2 and tensor.dtype in _COUNTED and elements(tensor) > 1


def elements(tensor: LayerTensor) -> int:
    """How many elements a tensor has; a dynamic dimension counts as 1."""
    return math.prod(map(abs, tensor.shape))


def _widest(tensors: Iterable[LayerTensor]) -> str:
    ranks = [_COUNTED.index(t.dtype) for t in tensors if t.dtype in _COUNTED]
    return _COUNTED[max(ranks)] if ranks else ""


def summarise(
    layers: Sequence[Layer], attention_nodes: Sequence[str] = (), matrix_nodes: Sequence[str] = ()
) -> LayerSummary:
    """Sum up the layers.

    Args:
        layers: from `parse_layers`.
        attention_nodes: names of the ONNX graph's Attention nodes, each of which should end in a fused kernel.
        matrix_nodes: names of its nodes that do matrix products.
    """
    products = [layer for layer in layers if layer.work != "other"]
    fused = [layer for layer in layers if layer.work == "attention"]
    flops: dict[str, int] = {}
    weights: dict[str, int] = {}
    for layer in products:
        if layer.flops:
            flops[layer.precision] = flops.get(layer.precision, 0) + layer.flops
    for tensor in (t for layer in layers for t in layer.constants):
        if tensor.dtype in _COUNTED:
            weights[tensor.dtype] = weights.get(tensor.dtype, 0) + elements(tensor) * BYTES[tensor.dtype]
    return LayerSummary(
        layers=sum(bool(layer.inputs or layer.constants or layer.outputs) for layer in layers),
        attention_fused=tuple(layer.name for layer in fused),
        attention_unfused=_missing(attention_nodes, fused),
        flop_shares=_shares(flops),
        weight_shares=_shares(weights),
        matrix_flops=sum(flops.values()),
        unsized=tuple(layer.name for layer in products if not layer.flops),
        unplaced=_missing(matrix_nodes, products),
    )


def of_one_frame(layers: Sequence[Layer], rows: int, heads: int) -> tuple[Layer, ...]:
    """Correct the flops of layers in which TensorRT has folded the dynamic number of frames n with another dimension.

    An int8 product's input becomes one matrix [n T, K] and attention's heads one batch [n H, T, d]. A folded dimension
    is dynamic and so counts as 1; its T (`rows`) or H (`heads`) is multiplied in here.
    """
    return tuple(replace(layer, flops=layer.flops * _folded(layer, rows, heads)) for layer in layers)


def _folded(layer: Layer, rows: int, heads: int) -> int:
    if not layer.inputs or layer.inputs[0].shape[:1] != (-1,):
        return 1
    sizes = len(layer.inputs[0].shape)
    weights = any(len(constant.shape) > 1 for constant in layer.constants)
    if layer.work in ("attention", "product") and sizes == 3 and not weights:
        return heads
    return rows if layer.precision == "int8" and sizes == 2 else 1


def _missing(nodes: Sequence[str], layers: Sequence[Layer]) -> tuple[str, ...]:
    # Inside a local function the record reads "node | caller (Function)".
    placed = {name.split(" | ")[0] for layer in layers for name in layer.onnx}
    return tuple(node for node in nodes if node and node not in placed)


def _shares(amounts: dict[str, int]) -> dict[str, float]:
    total = sum(amounts.values())
    return {dtype: amount / total for dtype, amount in sorted(amounts.items())} if total else {}


def check_precision(
    summary: LayerSummary, asked: str, *, expected: float = 1.0, int8: float = 0.0, slack: float = 0.1
) -> None:
    """Refuse an engine whose arithmetic is not in the precision asked for.

    Args:
        summary: from `summarise`.
        asked: "fp16", "bf16" or "fp32".
        expected: share of the matrix-product flops that should be in `asked`; the rest are the fp32 islands.
        int8: share that should be in int8, within `INT8_SLACK`: only a product that fell back to another precision
            changes it.
        slack: largest deviation from `expected`, in either direction (an island that is not fp32 is an error, too).
    """
    flags = f"--int8 --{asked}" if int8 else f"--{asked}"
    if not summary.flop_shares:
        raise UserError(
            f"asked for {flags}, but no matrix product was found among the engine's {summary.layers} layers, so its "
            f"precision is not proved: see layers.json, and report the TensorRT version"
        )
    found = ", ".join(f"{100 * part:.1f} % {dtype}" for dtype, part in summary.flop_shares.items())
    if abs(summary.int8_share - int8) > INT8_SLACK:
        raise UserError(
            f"asked for {flags}, but the matrix products of the engine are {found} (expected {100 * int8:.1f} % int8): "
            f"the builder cannot make int8 of a graph, and must not take it out of one; see layers.json"
        )
    share = summary.flop_shares.get(asked, 0.0)
    least, most = expected - slack, expected + slack
    if not least <= share <= most:
        bound = f"at least {100 * least:.0f}" if share < least else f"at most {100 * most:.0f}"
        raise UserError(
            f"asked for {flags}, but the matrix products of the engine are {found} (expected {bound} % {asked}): "
            f"export the graph in {asked}, the builder cannot change its dtype"
        )
