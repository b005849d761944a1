"""The decisions of "cells" in the adaptive schedule as ONNX functions of domain `earlytom`; n <= F frames arrive.

    AdaptiveCellPlan(hidden [n, T, D])
            -> weights fp32 [T, n, n], member fp32 [n, n], taken int64 [n, T], count int64 [1]
        attributes threshold, power (read by the body), prefix (unrolled); rows from count on have no member: their
        weights are zero
    AdaptiveTakeCells(features [n, P, E], salient fp32 [M], alike fp32 [M, M])
            -> tokens [N, E], positions int64 [N], count int64 [1]
        attributes frames (F), ratio, rounds (all unrolled; rounds 0: one after the other); M = n P; all N rows count
    AdaptiveCellStanding(affine fp32 [M, M], time int64 [n, P], size fp32 [n, P], positions int64 [N])
            -> place int64 [N], bias fp32 [N]

How many tokens are taken, and how many in each round, follows from n alone, in double precision; the bodies look it up
in tables indexed by n. So N depends on input shapes only, not on values, as compilers require.
"""

from __future__ import annotations

import onnx_ir as ir

from builder.export.cells import FLOAT, INT64, in_rounds, index_of, look, one_by_one, places_of, weigh
from builder.export.functions import Body
from earlytom.budget import token_count
from earlytom.cells.select import round_sizes
from earlytom.standing import SMALLEST

ADAPTIVE_CELL_PLAN = "AdaptiveCellPlan"
ADAPTIVE_TAKE_CELLS = "AdaptiveTakeCells"
ADAPTIVE_CELL_STANDING = "AdaptiveCellStanding"


def adaptive_cell_plan(*, prefix: int, opset: int) -> ir.Function:
    """The body of AdaptiveCellPlan. Mirrors `earlytom.cells.merge.plan_cells` without a count."""
    b = Body()
    hidden = ir.Value(name="hidden")
    threshold = b.attribute("threshold", ir.AttributeType.FLOAT)
    view = look(b, hidden, prefix)
    starts = b.GreaterOrEqual(b.Max(view.step, 0.0), threshold)
    count = b.Cast(b.ReduceSum(b.number(starts), [0], keepdims=1), to=INT64)
    count.name = "count"
    outputs = [*weigh(b, view, starts, view.index, padded=True), count]
    attributes = [
        ir.Attr("threshold", ir.AttributeType.FLOAT, None),
        ir.Attr("power", ir.AttributeType.FLOAT, None),
        ir.Attr("prefix", ir.AttributeType.INT, None),
    ]
    return b.function(ADAPTIVE_CELL_PLAN, [hidden], outputs, attributes, opset)


def adaptive_take_cells(*, frames: int, per_frame: int, ratio: float, rounds: int | None, opset: int) -> ir.Function:
    """The body of AdaptiveTakeCells for up to `frames` frames of `per_frame` tokens. Mirrors `Cells.choose`."""
    b = Body()
    features, salient, alike = (ir.Value(name=name) for name in ("features", "salient", "alike"))
    counts = [token_count(frames, per_frame, ratio, frames_out=max(n, 1)) for n in range(frames + 1)]
    left = b.Shape(features, start=0, end=1)  # n, int64 [1]
    count = b.Gather(b.constant(counts), left)  # N, int64 [1]
    if rounds is None:
        taken = one_by_one(b, salient, alike, count)
    else:
        sizes = [round_sizes(count, rounds) for count in counts]
        most = max(map(len, sizes))
        tables = [b.constant([float(s[n]) if n < len(s) else 0.0 for s in sizes], FLOAT) for n in range(most)]
        taken = in_rounds(b, salient, alike, [b.Squeeze(b.Gather(table, left), [0]) for table in tables])
    positions = places_of(b, taken, index_of(b, b.Squeeze(count)))
    tokens = b.Gather(b.Reshape(features, b.Concat([-1], b.Shape(features, start=2), axis=0)), positions, axis=0)
    # Counted, not looked up: a compiler may place an output that depends on shapes alone on the host.
    number = b.Cast(b.ReduceSum(b.number(taken), [0], keepdims=1), to=INT64)
    tokens.name, positions.name, number.name = "tokens", "positions", "count"
    attributes = [
        ir.Attr("frames", ir.AttributeType.INT, None),
        ir.Attr("ratio", ir.AttributeType.FLOAT, None),
        ir.Attr("rounds", ir.AttributeType.INT, None),
    ]
    inputs = [features, salient, alike]
    return b.function(ADAPTIVE_TAKE_CELLS, inputs, [tokens, positions, number], attributes, opset)


def adaptive_cell_standing(*, per_frame: int, opset: int) -> ir.Function:
    """The body of AdaptiveCellStanding for `per_frame` tokens a frame. Mirrors `Cells.standing`."""
    b = Body()
    affine, time, size, positions = (ir.Value(name=name) for name in ("affine", "time", "size", "positions"))
    cell = b.Sub(positions, b.Mul(b.Div(positions, [per_frame]), [per_frame]))
    place = b.Add(b.Mul(b.Gather(b.Reshape(time, [-1]), positions), [per_frame]), cell)
    mine = b.Gather(affine, positions, axis=1)  # [M, N]
    count = b.Squeeze(b.Shape(positions))
    index = index_of(b, count)
    best = b.Equal(mine, b.ReduceMax(mine, [1], keepdims=1))
    first = b.Where(best, b.row(index), b.Cast(count, to=FLOAT))  # ties: the first
    owner = b.ReduceMin(first, [1], keepdims=0)
    belongs = b.number(b.Equal(b.column(owner), b.row(index)))  # [M, N]
    sizes = b.Squeeze(b.MatMul(b.Reshape(size, [1, -1]), belongs), [0])
    bias = b.Log(b.Max(sizes, SMALLEST))
    place.name, bias.name = "place", "bias"
    return b.function(ADAPTIVE_CELL_STANDING, [affine, time, size, positions], [place, bias], [], opset)
