"""The decisions of the method "cells" as ONNX functions of domain `earlytom`, beside those of `functions`.

    CellPlan(hidden [F, T, D]) -> weights fp32 [T, F', F], member fp32 [F', F], taken int64 [F', T]
        attributes frames_out (F') and power (read by the body), prefix (unrolled into it)
    SelectRounds(salient fp32 [M], alike fp32 [M, M]) -> taken int64 [count]
        attributes count, rounds (both unrolled)
    SelectGreedy(salient fp32 [M], alike fp32 [M, M]) -> taken int64 [count]
        attribute count (unrolled)

The bodies are the tensor programs of `earlytom.cells`, operator by operator, and decide the same, in fp32 whatever the
dtype of the graph. The first two use no NonZero, Loop or scatter. Greedy selection is a Loop, which runs anywhere; for
speed the plugin of the same name replaces it, or SelectRounds is used.

The adaptive schedule has functions of its own, which are made of the same parts: `builder.export.adaptive_cells`.

The rest of the method (applying the weights, sizes, times, biases) is ordinary tensor arithmetic, traced from
`earlytom.methods.cells`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from builder.export.functions import DOMAIN, VERSION, Body
from earlytom.cells.merge import EPSILON, FIRST_CHANGE, NORM_FLOOR, NOVELTY_FLOOR, NOVELTY_NOISE, CellPlan
from earlytom.cells.select import round_sizes
from earlytom.merge import SIMILARITY_STEPS
from earlytom.methods.cells import Cells

CELL_PLAN = "CellPlan"
SELECT_ROUNDS = "SelectRounds"
SELECT_GREEDY = "SelectGreedy"

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
_END = 2**31 - 1  # end of an open-ended slice


class SymbolicCells(Cells):
    """The method with calls of the ONNX functions in place of its decisions."""

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
    view = look(b, hidden, prefix)
    plan = weigh(b, view, _group_starts(b, view.step, view.index, frames_out), index_of(b, frames_out))
    attributes = [
        ir.Attr("frames_out", ir.AttributeType.INT, None),
        ir.Attr("power", ir.AttributeType.FLOAT, None),
        ir.Attr("prefix", ir.AttributeType.INT, None),
    ]
    return b.function(CELL_PLAN, [hidden], plan, attributes, opset)


@dataclass(frozen=True)
class View:
    """Inputs of a plan, all fp32.

    Attributes:
        frames: F, scalar; index: 0, 1, ... [F]; step [F]: each frame's change from the one before; novel [F, T]: each
            token's distance from the clip's mean.
    """

    frames: ir.Value
    index: ir.Value
    step: ir.Value
    novel: ir.Value


def look(b: Body, hidden: ir.Value, prefix: int) -> View:
    """The `View` of `hidden [F, T, D]`."""
    size = b.Squeeze(b.Shape(hidden, start=0, end=1))  # int64 scalar F
    index = index_of(b, size)
    normal = _normalised(b, b.Cast(hidden, to=FLOAT))
    direction = _unit(b, normal)
    alike = b.Mul(direction, _unit(b, b.ReduceMean(normal, [0], keepdims=1)))
    novel = b.Max(b.Sub(1.0, b.ReduceSum(alike, [-1], keepdims=0)), NOVELTY_FLOOR)
    return View(b.Cast(size, to=FLOAT), index, _change(b, direction, index, prefix), novel)


def weigh(b: Body, view: View, starts: ir.Value, slot: ir.Value, *, padded: bool = False) -> list[ir.Value]:
    """The outputs of a plan: weights, member, taken.

    Args:
        starts: [F] bool, frames that start a group.
        slot: 0, 1, ... for each row of the plan.
        padded: there may be more rows than groups; the extra rows have no member, weights of 0 and take the last frame.
    """
    power = b.attribute("power", ir.AttributeType.FLOAT)
    group = b.Sub(b.CumSum(b.number(starts), [0]), 1.0)
    member = b.number(b.Equal(b.row(group), b.column(slot)))  # [F', F]
    own = b.Mul(member, b.Unsqueeze(b.Transpose(view.novel, perm=[1, 0]), [1]))  # [T, F', F]
    peak = b.ReduceMax(own, [-1], keepdims=1)
    if padded:
        peak = b.Max(peak, NOVELTY_FLOOR)  # no change for real groups: `novel` is at least that
    share = b.Mul(member, b.Pow(b.Div(own, peak), power))
    total = b.ReduceSum(share, [-1], keepdims=1)
    weights = b.Div(share, b.Max(total, 0.5) if padded else total)  # a real group's total is at least 1
    last = b.Sub(view.frames, 1.0) if padded else view.frames
    most = b.GreaterOrEqual(own, b.Max(b.Sub(peak, NOVELTY_NOISE), NOVELTY_FLOOR))
    first = b.ReduceMin(b.Where(most, view.index, last), [-1], keepdims=0)  # [T, F']
    taken = b.Cast(b.Transpose(first, perm=[1, 0]), to=INT64)
    weights.name, member.name, taken.name = "weights", "member", "taken"
    return [weights, member, taken]


def _normalised(b: Body, x: ir.Value) -> ir.Value:
    away = b.Sub(x, b.ReduceMean(x, [-1], keepdims=1))
    return b.Div(away, b.Sqrt(b.Add(b.ReduceMean(b.Mul(away, away), [-1], keepdims=1), EPSILON)))


def _unit(b: Body, x: ir.Value) -> ir.Value:
    return b.Div(x, b.Max(b.ReduceL2(x, [-1], keepdims=1), NORM_FLOOR))


def _change(b: Body, direction: ir.Value, index: ir.Value, prefix: int) -> ir.Value:
    """Change of each frame from the one before, [F], from unit vectors [F, T, D]."""
    cells = b.Slice(direction, [prefix], [_END], [1]) if prefix else direction
    before = b.Gather(cells, b.Cast(b.Max(b.Sub(index, 1.0), 0.0), to=INT64), axis=0)  # no slice is empty for one frame
    step = b.Sub(1.0, b.ReduceMean(b.ReduceSum(b.Mul(cells, before), [-1], keepdims=0), [-1], keepdims=0))
    step = b.Div(b.Round(b.Mul(step, SIMILARITY_STEPS)), SIMILARITY_STEPS)
    return b.Where(b.Less(index, 1.0), FIRST_CHANGE, step)


def _group_starts(b: Body, step: ir.Value, index: ir.Value, frames_out: ir.Value) -> ir.Value:
    """[F] bool: the `frames_out` frames with the largest change start a group."""
    rank = b.ReduceSum(b.number(_beats(b, step, _earlier(b, index))), [0], keepdims=0)
    return b.Less(rank, b.Cast(frames_out, to=FLOAT))


def select_rounds(*, count: int, rounds: int, opset: int) -> ir.Function:
    """The body of SelectRounds for any number of tokens. Mirrors `earlytom.cells.select.select_rounds`."""
    b = Body()
    salient, alike = (ir.Value(name=name) for name in ("salient", "alike"))
    taken = in_rounds(b, salient, alike, [float(size) for size in round_sizes(count, rounds)])
    places = places_of(b, taken, b.constant([float(n) for n in range(count)], FLOAT))
    places.name = "taken"
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("count", "rounds")]
    return b.function(SELECT_ROUNDS, [salient, alike], [places], attributes, opset)


def in_rounds(b: Body, salient: ir.Value, alike: ir.Value, sizes: Sequence[ir.Value | float]) -> ir.Value:
    """[M] bool: the tokens taken in rounds of `sizes`, scalars in fp32; rounds of 0 take none."""
    index = index_of(b, b.Squeeze(b.Shape(salient, start=0, end=1)))
    earlier = _earlier(b, index)
    far: ir.Value | None = None
    taken: ir.Value | None = None
    for size in sizes:
        value = salient if far is None else b.Mul(salient, far)
        if taken is not None:
            value = b.Where(taken, -1.0, value)
        crowd = b.ReduceMax(b.Where(_beats(b, value, earlier), alike, 0.0), [0], keepdims=0)
        value = b.Mul(value, b.Sub(1.0, crowd))
        if taken is not None:
            value = b.Where(taken, -1.0, value)
        rank = b.ReduceSum(b.number(_beats(b, value, earlier)), [0], keepdims=0)
        chosen = b.Less(rank, size)
        taken = chosen if taken is None else b.Or(taken, chosen)
        near = b.ReduceMax(b.Where(b.column(chosen), alike, 0.0), [0], keepdims=0)
        far = b.Sub(1.0, near) if far is None else b.Min(far, b.Sub(1.0, near))
    assert taken is not None  # there is a round
    return taken


def select_greedy(*, count: int, opset: int) -> ir.Function:
    """The body of SelectGreedy for any number of tokens. Mirrors `earlytom.cells.select.select_greedy`."""
    b = Body()
    salient, alike = (ir.Value(name=name) for name in ("salient", "alike"))
    taken = one_by_one(b, salient, alike, b.constant([count]))
    places = places_of(b, taken, b.constant([float(n) for n in range(count)], FLOAT))
    places.name = "taken"
    attributes = [ir.Attr("count", ir.AttributeType.INT, None)]
    return b.function(SELECT_GREEDY, [salient, alike], [places], attributes, opset)


def one_by_one(b: Body, salient: ir.Value, alike: ir.Value, count: ir.Value) -> ir.Value:
    """[M] bool: the `count` tokens (int64 [1]) taken one after the other, in a loop."""
    index = index_of(b, b.Squeeze(b.Shape(salient, start=0, end=1)))
    far, left = b.Add(b.Mul(index, 0.0), 1.0), b.GreaterOrEqual(index, 0.0)
    step = _greedy_step(salient, alike, index)
    outputs = b.tape.op_multi_out("Loop", [count, None, far, left], {"body": step}, num_outputs=2)
    return b.Not(outputs[1])


def _greedy_step(salient: ir.Value, alike: ir.Value, index: ir.Value) -> ir.Graph:
    """One iteration: take the best token, and lower the value of those that resemble it."""
    b = Body()
    turn, going, far, left = (ir.Value(name=name) for name in ("turn", "going", "far", "left"))
    for value, dtype, shape in ((turn, INT64, []), (going, BOOL, []), (far, FLOAT, ["M"]), (left, BOOL, ["M"])):
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    value = b.Where(left, b.Mul(salient, far), -1.0)
    # Not ArgMax: which of equal values it returns differs between backends.
    first = b.Where(b.Equal(value, b.ReduceMax(value, [0], keepdims=1)), index, float(_END))
    best = b.Cast(b.ReduceMin(first, [0], keepdims=1), to=INT64)
    nearer = b.Sub(1.0, b.Squeeze(b.Gather(alike, best, axis=0), [0]))
    outputs = b.constant(True, BOOL), b.Min(far, nearer), b.And(left, b.Not(b.Equal(index, b.Cast(best, to=FLOAT))))
    for name, value, dtype in zip(("goes_on", "far_out", "left_out"), outputs, (BOOL, FLOAT, BOOL), strict=True):
        value.name, value.type = name, ir.TensorType(dtype)
    for n, node in enumerate(b.tape.nodes):  # default names would repeat those of the enclosing function
        for value in node.outputs:
            value.name = value.name or f"step_{n}"
    return ir.Graph([turn, going, far, left], outputs, nodes=b.tape.nodes, name="step")


def _earlier(b: Body, index: ir.Value) -> ir.Value:
    """[n, n] bool: whether the row is before the column."""
    return b.Less(b.column(index), b.row(index))


def _beats(b: Body, value: ir.Value, earlier: ir.Value) -> ir.Value:
    """[n, n] bool: whether the row's element ranks before the column's: a larger value, or an equal one and earlier."""
    other, mine = b.column(value), b.row(value)
    return b.Or(b.Greater(other, mine), b.And(b.Equal(other, mine), earlier))


def places_of(b: Body, taken: ir.Value, slot: ir.Value) -> ir.Value:
    """The indices of the true values of `taken [M]`, ascending, int64, as many as there are slots 0, 1, ... [N]."""
    index = index_of(b, b.Squeeze(b.Shape(taken, start=0, end=1)))
    place = b.Sub(b.CumSum(b.number(taken), [0]), 1.0)
    here = b.And(b.row(taken), b.Equal(b.row(place), b.column(slot)))  # [N, M]
    return b.Cast(b.ReduceSum(b.Where(here, b.row(index), 0.0), [1], keepdims=0), to=INT64)


def index_of(b: Body, size: ir.Value) -> ir.Value:
    """0, 1, ... as fp32; `size` is an int64 scalar."""
    return b.Cast(b.Range(b.Squeeze([0]), size, b.Squeeze([1])), to=FLOAT)


BODIES: dict[str, Callable[..., ir.Function]] = {
    CELL_PLAN: cell_plan,
    SELECT_ROUNDS: select_rounds,
    SELECT_GREEDY: select_greedy,
}
"""The builder of each function's body."""
