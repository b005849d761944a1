"""Place and bias of kept tokens, in the last stage of a chain, as an ONNX function with a body of ordinary operators.

    AdaptiveStanding(features [n, P, E], positions int64 [M], sources fp32 [n, F], count int64 [1])
            -> place int64 [M], bias fp32 [M]

Mirrors `earlytom.standing` for M rows, a size that the exporter cannot express; rows from `count` on are padding, to
which no token belongs. Static graphs need no such function: there `earlytom.standing` itself is traced.
"""

from __future__ import annotations

import onnx_ir as ir

from builder.export.functions import Body
from earlytom.standing import SHARE_NOISE, SMALLEST

ADAPTIVE_STANDING = "AdaptiveStanding"


def adaptive_standing(*, per_frame: int, opset: int) -> ir.Function:
    """The body of AdaptiveStanding for `per_frame` tokens a frame."""
    b = Body()
    features, positions, sources, count = (
        ir.Value(name=name) for name in ("features", "positions", "sources", "count")
    )
    largest = b.GreaterOrEqual(sources, b.Sub(b.ReduceMax(sources, [1], keepdims=1), SHARE_NOISE))
    time = b.ArgMax(b.number(largest), axis=1, keepdims=0)  # [n], the first
    size = b.ReduceSum(b.number(b.Greater(sources, 0.0)), [1], keepdims=0)  # [n]
    slot = b.Div(positions, [per_frame])
    place = b.Add(b.Mul(b.Gather(time, slot), [per_frame]), b.Sub(positions, b.Mul(slot, [per_frame])))

    values = b.Cast(features, to=ir.DataType.FLOAT)
    tokens = b.Reshape(values, b.Concat([-1], b.Shape(features, start=2), axis=0))  # [n * P, E]
    centred = b.Sub(tokens, b.ReduceMean(tokens, [0], keepdims=1))
    direction = b.Div(centred, b.Max(b.ReduceL2(centred, [1], keepdims=1), 1e-12))
    when = _of_cells(b, b.Cast(time, to=ir.DataType.FLOAT), per_frame)  # [n * P]
    apart = b.Abs(b.Sub(b.column(b.Gather(when, positions)), b.row(when)))
    frames = b.Cast(b.Shape(sources, start=1), to=ir.DataType.FLOAT)
    near = b.Exp(b.Neg(b.Div(apart, frames)))
    alike = b.Mul(b.MatMul(b.Gather(direction, positions), b.Transpose(direction, perm=[1, 0])), near)  # [M, n * P]
    row = b.Range(b.Squeeze([0]), b.Squeeze(b.Shape(positions)), b.Squeeze([1]))  # [M]
    alike = b.Where(b.column(b.Less(row, count)), alike, -2.0)
    belongs = b.Equal(b.row(b.ArgMax(alike, axis=0, keepdims=0)), b.column(row))  # [M, n * P]
    sizes = b.Squeeze(b.MatMul(b.number(belongs), b.column(_of_cells(b, size, per_frame))), [1])
    bias = b.Log(b.Max(sizes, SMALLEST))
    place.name, bias.name = "place", "bias"
    return b.function(ADAPTIVE_STANDING, [features, positions, sources, count], [place, bias], [], opset)


def _of_cells(b: Body, values: ir.Value, per_frame: int) -> ir.Value:
    """[n] to [n * P]: each value repeated P times."""
    return b.Reshape(b.Tile(b.column(values), [1, per_frame]), [-1])
