"""The decisions of the method "cells" as ONNX functions of domain `earlytom`, beside those of `functions`.

    CellPlan(hidden [F, T, D]) -> weights fp32 [T, F', F], member fp32 [F', F], taken int64 [F', T]
        attributes frames_out (F') and power (read by the body), prefix (unrolled into it)
    SelectRounds(salient fp32 [M], alike fp32 [M, M]) -> taken int64 [count]
        attributes count, rounds (both unrolled)
    SelectGreedy(salient fp32 [M], alike fp32 [M, M]) -> taken int64 [count]
        attribute count (unrolled)

The bodies are the tensor programs of `earlytom.cells`, operator by operator, and decide the same, in fp32 whatever the
graph is in. The first two have ordinary operators alone (no NonZero, no Loop, no scatter). Greedy selection is a Loop:
it runs anywhere, but where speed counts the plugin of the same name stands in its place, or the rounds do.

Everything else of the method (applying the weights, sizes, times, biases) is ordinary tensor arithmetic, which the
exporter writes from `earlytom.methods.cells`.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from builder.export.functions import DOMAIN, VERSION, Body
from earlytom.cells.merge import EPSILON, FIRST_CHANGE, NORM_FLOOR, NOVELTY_FLOOR, CellPlan
from earlytom.cells.select import round_sizes
from earlytom.merge import SIMILARITY_STEPS
from earlytom.methods.cells import Cells

CELL_PLAN = "CellPlan"
SELECT_ROUNDS = "SelectRounds"
SELECT_GREEDY = "SelectGreedy"

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
_END = 2**31 - 1  # of a slice that goes on to the end


class SymbolicCells(Cells):
    """Calls of the ONNX functions in place of the computation."""

    def plan(self, hidden: Tensor, frames_out: int | None, prefix: int) -> CellPlan:
        assert frames_out is not None  # the adaptive schedule is refused before tracing
        frames, tokens, _ = hidden.shape
        weights, member, taken = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{CELL_PLAN}",
            (hidden,),
            {"frames_out": frames_out, "power": self.config.power, "prefix": prefix},
            dtypes=(torch.float32, torch.float32, torch.int64),
            shapes=((tokens, frames_out, frames), (frames_out, frames), (frames_out, tokens)),
            version=VERSION,
        )
        return CellPlan(weights, member, taken)

    def take(self, salient: Tensor, alike: Tensor, count: int) -> Tensor:
        rounds = self.config.rounds
        name, attributes = (SELECT_GREEDY, {}) if rounds is None else (SELECT_ROUNDS, {"rounds": rounds})
        (taken,) = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{name}",
            (salient, alike),
            {"count": count, **attributes},
            dtypes=(torch.int64,),
            shapes=((count,),),
            version=VERSION,
        )
        return taken


def body(node: ir.Node, opset: int) -> ir.Function:
    """The body of the function that a node of the method's graph calls."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == CELL_PLAN:
        return cell_plan(prefix=given["prefix"], opset=opset)
    if node.op_type == SELECT_ROUNDS:
        return select_rounds(count=given["count"], rounds=given["rounds"], opset=opset)
    return select_greedy(count=given["count"], opset=opset)


def cell_plan(*, prefix: int, opset: int) -> ir.Function:
    """The body of CellPlan for any number of frames. Mirrors `earlytom.cells.merge.plan_cells`."""
    b = Body()
    hidden = ir.Value(name="hidden")
    frames_out = b.attribute("frames_out", ir.AttributeType.INT)
    power = b.attribute("power", ir.AttributeType.FLOAT)
    size = b.Squeeze(b.Shape(hidden, start=0, end=1))  # int64 scalar F
    index = _range(b, size)

    normal = _normalised(b, b.Cast(hidden, to=FLOAT))
    direction = _unit(b, normal)
    starts = _group_starts(b, _change(b, direction, prefix), index, frames_out)
    group = b.Sub(b.CumSum(b.number(starts), [0]), 1.0)
    member = b.number(b.Equal(b.row(group), b.column(_range(b, frames_out))))  # [F', F]

    alike = b.Mul(direction, _unit(b, b.ReduceMean(normal, [0], keepdims=1)))
    novel = b.Max(b.Sub(1.0, b.ReduceSum(alike, [-1], keepdims=0)), NOVELTY_FLOOR)  # [F, T]
    own = b.Mul(member, b.Unsqueeze(b.Transpose(novel, perm=[1, 0]), [1]))  # [T, F', F]
    peak = b.ReduceMax(own, [-1], keepdims=1)
    share = b.Mul(member, b.Pow(b.Div(own, peak), power))
    weights = b.Div(share, b.ReduceSum(share, [-1], keepdims=1))
    first = b.ReduceMin(b.Where(b.Equal(own, peak), index, b.Cast(size, to=FLOAT)), [-1], keepdims=0)  # [T, F']
    taken = b.Cast(b.Transpose(first, perm=[1, 0]), to=INT64)

    weights.name, member.name, taken.name = "weights", "member", "taken"
    attributes = [
        ir.Attr("frames_out", ir.AttributeType.INT, None),
        ir.Attr("power", ir.AttributeType.FLOAT, None),
        ir.Attr("prefix", ir.AttributeType.INT, None),
    ]
    return b.function(CELL_PLAN, [hidden], [weights, member, taken], attributes, opset)


def _normalised(b: Body, x: ir.Value) -> ir.Value:
    away = b.Sub(x, b.ReduceMean(x, [-1], keepdims=1))
    return b.Div(away, b.Sqrt(b.Add(b.ReduceMean(b.Mul(away, away), [-1], keepdims=1), EPSILON)))


def _unit(b: Body, x: ir.Value) -> ir.Value:
    return b.Div(x, b.Max(b.ReduceL2(x, [-1], keepdims=1), NORM_FLOOR))


def _change(b: Body, direction: ir.Value, prefix: int) -> ir.Value:
    """[F, T, D] to how much each frame differs from the one before it, [F]."""
    cells = b.Slice(direction, [prefix], [_END], [1]) if prefix else direction
    product = b.Mul(b.Slice(cells, [1], [_END], [0]), b.Slice(cells, [0], [-1], [0]))
    step = b.Sub(1.0, b.ReduceMean(b.ReduceSum(product, [-1], keepdims=0), [-1], keepdims=0))
    step = b.Div(b.Round(b.Mul(step, SIMILARITY_STEPS)), SIMILARITY_STEPS)
    return b.Concat(b.constant([FIRST_CHANGE], FLOAT), step, axis=0)


def _group_starts(b: Body, step: ir.Value, index: ir.Value, frames_out: ir.Value) -> ir.Value:
    """[F] bool."""
    rank = b.ReduceSum(b.number(_beats(b, step, _earlier(b, index))), [0], keepdims=0)
    return b.Less(rank, b.Cast(frames_out, to=FLOAT))


def select_rounds(*, count: int, rounds: int, opset: int) -> ir.Function:
    """The body of SelectRounds for any number of tokens. Mirrors `earlytom.cells.select.select_rounds`."""
    b = Body()
    salient, alike = (ir.Value(name=name) for name in ("salient", "alike"))
    index = _range(b, b.Squeeze(b.Shape(salient, start=0, end=1)))
    earlier = _earlier(b, index)
    far: ir.Value | None = None
    taken: ir.Value | None = None
    for size in round_sizes(count, rounds):
        value = salient if far is None else b.Mul(salient, far)
        if taken is not None:
            value = b.Where(taken, -1.0, value)
        crowd = b.ReduceMax(b.Where(_beats(b, value, earlier), alike, 0.0), [0], keepdims=0)
        value = b.Mul(value, b.Sub(1.0, crowd))
        if taken is not None:
            value = b.Where(taken, -1.0, value)
        rank = b.ReduceSum(b.number(_beats(b, value, earlier)), [0], keepdims=0)
        chosen = b.Less(rank, float(size))
        taken = chosen if taken is None else b.Or(taken, chosen)
        near = b.ReduceMax(b.Where(b.column(chosen), alike, 0.0), [0], keepdims=0)
        far = b.Sub(1.0, near) if far is None else b.Min(far, b.Sub(1.0, near))
    assert taken is not None  # there is a round
    places = _places(b, taken, index, count)
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("count", "rounds")]
    return b.function(SELECT_ROUNDS, [salient, alike], [places], attributes, opset)


def select_greedy(*, count: int, opset: int) -> ir.Function:
    """The body of SelectGreedy for any number of tokens. Mirrors `earlytom.cells.select.select_greedy`."""
    b = Body()
    salient, alike = (ir.Value(name=name) for name in ("salient", "alike"))
    index = _range(b, b.Squeeze(b.Shape(salient, start=0, end=1)))
    far, left = b.Add(b.Mul(index, 0.0), 1.0), b.GreaterOrEqual(index, 0.0)
    step = _greedy_step(salient, alike, index)
    outputs = b.tape.op_multi_out("Loop", [b.constant([count]), None, far, left], {"body": step}, num_outputs=2)
    places = _places(b, b.Not(outputs[1]), index, count)
    attributes = [ir.Attr("count", ir.AttributeType.INT, None)]
    return b.function(SELECT_GREEDY, [salient, alike], [places], attributes, opset)


def _greedy_step(salient: ir.Value, alike: ir.Value, index: ir.Value) -> ir.Graph:
    """One turn of the loop: the best token is taken, and all that resemble it lose value."""
    b = Body()
    turn, going, far, left = (ir.Value(name=name) for name in ("turn", "going", "far", "left"))
    for value, dtype, shape in ((turn, INT64, []), (going, BOOL, []), (far, FLOAT, ["M"]), (left, BOOL, ["M"])):
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    value = b.Where(left, b.Mul(salient, far), -1.0)
    first = b.Where(b.Equal(value, b.ReduceMax(value, [0], keepdims=1)), index, float(_END))  # no ArgMax: of equal ones
    best = b.Cast(b.ReduceMin(first, [0], keepdims=1), to=INT64)  # another backend's may be any
    nearer = b.Sub(1.0, b.Squeeze(b.Gather(alike, best, axis=0), [0]))
    outputs = b.constant(True, BOOL), b.Min(far, nearer), b.And(left, b.Not(b.Equal(index, b.Cast(best, to=FLOAT))))
    for name, value, dtype in zip(("goes_on", "far_out", "left_out"), outputs, (BOOL, FLOAT, BOOL), strict=True):
        value.name, value.type = name, ir.TensorType(dtype)
    for n, node in enumerate(b.tape.nodes):  # names of the function around it would come again
        for value in node.outputs:
            value.name = value.name or f"step_{n}"
    return ir.Graph([turn, going, far, left], outputs, nodes=b.tape.nodes, name="step")


def _earlier(b: Body, index: ir.Value) -> ir.Value:
    """[n, n] bool: whether the row is before the column."""
    return b.Less(b.column(index), b.row(index))


def _beats(b: Body, value: ir.Value, earlier: ir.Value) -> ir.Value:
    """[n, n] bool: whether the one of the row goes before that of the column: its value is larger, or it is earlier."""
    other, mine = b.column(value), b.row(value)
    return b.Or(b.Greater(other, mine), b.And(b.Equal(other, mine), earlier))


def _places(b: Body, taken: ir.Value, index: ir.Value, count: int) -> ir.Value:
    """The indices of the true values of `taken [M]`, ascending: int64 [count]."""
    place = b.Sub(b.CumSum(b.number(taken), [0]), 1.0)
    slot = b.constant([float(n) for n in range(count)], FLOAT)
    here = b.And(b.row(taken), b.Equal(b.row(place), b.column(slot)))  # [count, M]
    places = b.Cast(b.ReduceSum(b.Where(here, b.row(index), 0.0), [1], keepdims=0), to=INT64)
    places.name = "taken"
    return places


def _range(b: Body, size: ir.Value) -> ir.Value:
    """0, 1, ... as fp32; `size` is an int64 scalar."""
    return b.Cast(b.Range(b.Squeeze([0]), size, b.Squeeze([1])), to=FLOAT)


BODIES: dict[str, Callable[..., ir.Function]] = {
    CELL_PLAN: cell_plan,
    SELECT_ROUNDS: select_rounds,
    SELECT_GREEDY: select_greedy,
}
"""What writes each function's body."""
