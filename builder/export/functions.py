"""The data-dependent operations as ONNX functions of domain `earlytom`, with bodies of ordinary operators.

A graph that calls `earlytom::FramePlan` and `earlytom::SelectTokens` runs anywhere: ONNX Runtime and TensorRT-RTX run
the bodies below, and TensorRT can replace them by plugins of the same names. The bodies are the tensor programs of
`earlytom.merge` and `earlytom.select`, operator by operator, and decide the same. (One number differs in its last bit:
`1 - ema` is computed in fp32 here and in double there.)

    FramePlan(similarity fp32 [F, F]) -> weights fp32 [frames_out, F], static bool [F]
        attributes frames_out, tau, ema (read by the body), max_window, trailing (unrolled into the body)
    SelectTokens(features [F', P, E], received fp32 [F', P], static bool [F']) -> tokens [F'*places, E], positions int64
        attribute places (read by the body)

and for the adaptive schedule, where n <= F frames arrive, n known only at run time:

    AdaptiveFramePlan(similarity fp32 [n, n]) -> weights fp32 [n, n], static bool [n], count int64 [1]
        attributes tau, ema (read by the body), max_window, trailing (unrolled); rows from count on are zero
    AdaptiveSelectTokens(features [n, P, E], received fp32 [n, P], static bool [n])
            -> tokens [M, E], positions int64 [M], count int64 [1]
        attributes frames (F), ratio (unrolled); M = n * places, of which the first `count` rows are the answer

How many tokens a frame keeps follows from n alone, in double precision; the body looks it up in tables indexed by n.
Rows from `count` on are padding (a repeated token): TensorRT-RTX has no NonZero, which would give N rows.

Frame and cell indices inside are fp32: small integers are exact, and every backend has all operators for fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.tape import Tape

from earlytom.budget import dynamic_tokens, effective_ratio, static_tokens
from earlytom.select import window_of_cell

DOMAIN = "earlytom"
VERSION = 1
FRAME_PLAN = "FramePlan"
SELECT_TOKENS = "SelectTokens"
ADAPTIVE_FRAME_PLAN = "AdaptiveFramePlan"
ADAPTIVE_SELECT_TOKENS = "AdaptiveSelectTokens"


class Body:
    """Writes the nodes of a function: `body.Add(x, y)`; Python numbers become constants."""

    def __init__(self) -> None:
        self.tape = Tape()

    def __getattr__(self, op_type: str) -> Any:
        def add(*inputs: Any, **attributes: Any) -> ir.Value:
            return self.tape.op(op_type, [self._value(x) for x in inputs], attributes)

        return add

    def _value(self, x: Any) -> ir.Value:
        return x if isinstance(x, ir.Value) else self.constant(x)

    def constant(self, x: float | Sequence[float], dtype: ir.DataType | None = None) -> ir.Value:
        """A float is fp32 and a list of whole numbers int64, unless `dtype` says otherwise."""
        default = ir.DataType.INT64 if isinstance(x, list) else ir.DataType.FLOAT
        return self.tape.op("Constant", [], {"value": ir.tensor(x, dtype=dtype or default)})

    def attribute(self, name: str, kind: ir.AttributeType) -> ir.Value:
        """The value that the calling node gives for an attribute, as a scalar."""
        field = "value_int" if kind == ir.AttributeType.INT else "value_float"
        return self.tape.op("Constant", [], {field: ir.RefAttr(field, name, kind)})

    def column(self, x: ir.Value) -> ir.Value:
        """[n] to [n, 1]."""
        return self.Unsqueeze(x, [1])

    def row(self, x: ir.Value) -> ir.Value:
        """[n] to [1, n]."""
        return self.Unsqueeze(x, [0])

    def number(self, mask: ir.Value) -> ir.Value:
        """bool to 0.0 or 1.0."""
        return self.Cast(mask, to=ir.DataType.FLOAT)

    def largest(self, x: ir.Value) -> ir.Value:
        """[n, m] to the maximum of each row, [n]."""
        return self.ReduceMax(x, [1], keepdims=0)

    def function(
        self,
        name: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        attributes: Sequence[ir.Attr],
        opset: int,
    ) -> ir.Function:
        graph = ir.Graph(inputs, outputs, nodes=self.tape.nodes, opset_imports={"": opset}, name=name)
        for node in graph:
            node.name = ""  # a function called twice would give TensorRT two layers of one name
        return ir.Function(DOMAIN, name, graph=graph, attributes=attributes)


@dataclass(frozen=True)
class _Scan:
    """Decisions of the scan over the frames, see `earlytom.merge._adaptive_decisions`; all [F] but `frames`.

    Attributes:
        index: 0, 1, ...; frames: F, a scalar.
        static, paired, kept: bool; pair_weight, step: fp32.
    """

    index: ir.Value
    frames: ir.Value
    static: ir.Value
    step: ir.Value
    pair_weight: ir.Value
    paired: ir.Value
    kept: ir.Value


def frame_plan(*, max_frames: int, max_window: int, trailing: str, opset: int) -> ir.Function:
    """The body of FramePlan for up to `max_frames` frames: `earlytom.merge.plan_similarity`, budget schedule."""
    b = Body()
    similarity = ir.Value(name="similarity")
    frames_out = b.attribute("frames_out", ir.AttributeType.INT)
    scan = _scan(b, similarity, max_frames, max_window, trailing)
    weights, static = _budget_weights(b, similarity, scan, frames_out), scan.static
    weights.name, static.name = "weights", "static"
    attributes = [ir.Attr("frames_out", ir.AttributeType.INT, None), *_plan_attributes()]
    return b.function(FRAME_PLAN, [similarity], [weights, static], attributes, opset)


def adaptive_frame_plan(*, max_frames: int, max_window: int, trailing: str, opset: int) -> ir.Function:
    """The body of AdaptiveFramePlan for up to `max_frames` frames: `earlytom.merge.plan_similarity` without a count."""
    b = Body()
    similarity = ir.Value(name="similarity")
    scan = _scan(b, similarity, max_frames, max_window, trailing)
    weights, static = b.MatMul(_pick(b, scan.kept, scan.index), _pair_rows(b, scan, scan.paired)), scan.static
    count = b.Cast(b.ReduceSum(b.number(scan.kept), [0], keepdims=1), to=ir.DataType.INT64)
    weights.name, static.name, count.name = "weights", "static", "count"
    return b.function(ADAPTIVE_FRAME_PLAN, [similarity], [weights, static, count], _plan_attributes(), opset)


def _plan_attributes() -> list[ir.Attr]:
    return [
        ir.Attr("tau", ir.AttributeType.FLOAT, None),
        ir.Attr("ema", ir.AttributeType.FLOAT, None),
        ir.Attr("max_window", ir.AttributeType.INT, None),
        ir.Attr("trailing", ir.AttributeType.STRING, None),
    ]


def _scan(b: Body, similarity: ir.Value, max_frames: int, max_window: int, trailing: str) -> _Scan:
    """The segments, and which of their middle frames are paired or kept."""
    tau, ema = (b.attribute(name, ir.AttributeType.FLOAT) for name in ("tau", "ema"))
    size = b.Squeeze(b.Shape(similarity, start=0, end=1))  # int64 scalar F
    index = _range(b, size)  # [F]
    frames = b.Cast(size, to=ir.DataType.FLOAT)

    start, end = _segment_bounds(b, similarity, index, frames, tau, ema, max_frames, max_window)
    static = b.And(b.Less(start, index), b.Less(index, end))

    step = _ahead(b, similarity, index, frames, 1, 0.0)  # s_i = c(i, i + 1)
    next_step = _shift(b, step, index, frames)  # s_{i+1}
    place = b.Cast(b.Add(b.Mul(start, frames), end), to=ir.DataType.INT64)
    theta = b.Gather(b.Reshape(similarity, [-1]), place)  # c(a, b)
    last_middle = b.Sub(end, 1.0)
    pair_is_last = b.Equal(b.Add(index, 1.0), last_middle)
    local_best = b.Or(pair_is_last, b.Greater(step, next_step))
    mergeable = b.And(b.And(static, b.Less(index, last_middle)), b.And(b.Greater(step, theta), local_best))
    visited = _orbit(b, b.Add(b.Add(index, 1.0), b.number(mergeable)), index, max_frames)
    paired = b.And(visited, mergeable)
    kept = visited
    if trailing == "released":
        dropped = b.And(b.Equal(index, last_middle), b.GreaterOrEqual(b.Sub(last_middle, start), 2.0))
        kept = b.And(kept, b.Not(dropped))
    near, far = b.Max(step, 0.0), b.Max(next_step, 0.0)
    share = b.Where(b.Greater(near, 0.0), b.Div(near, b.Max(b.Add(near, far), 1e-6)), 1.0)
    return _Scan(index, frames, static, step, b.Where(pair_is_last, 1.0, share), paired, kept)


def _ahead(b: Body, similarity: ir.Value, index: ir.Value, frames: ir.Value, k: int, past_end: float) -> ir.Value:
    """c(i, i + k) of every frame, [F]; `past_end` where there is no frame i + k."""
    target = b.Add(index, float(k))
    inside = b.Less(target, frames)
    column = b.Cast(b.Min(target, b.Sub(frames, 1.0)), to=ir.DataType.INT64)
    return b.Where(inside, b.Squeeze(b.GatherElements(similarity, b.column(column), axis=1), [1]), past_end)


def _shift(b: Body, x: ir.Value, index: ir.Value, frames: ir.Value) -> ir.Value:
    """x[i + 1], and 0 for the last i."""
    target = b.Add(index, 1.0)
    following = b.Gather(x, b.Cast(b.Min(target, b.Sub(frames, 1.0)), to=ir.DataType.INT64))
    return b.Where(b.Less(target, frames), following, 0.0)


def _orbit(b: Body, following: ir.Value, index: ir.Value, max_frames: int) -> ir.Value:
    """[F] bool: the frames that the walk 0 -> following[0] -> ... visits."""
    step = b.Equal(b.column(following), b.row(index))
    reach = b.number(b.Or(step, b.Equal(b.column(index), b.row(index))))
    for _ in range((max_frames - 1).bit_length()):
        reach = b.Min(b.MatMul(reach, reach), 1.0)
    return b.Greater(b.Squeeze(b.Slice(reach, [0], [1], [0]), [0]), 0.0)


def _segment_bounds(
    b: Body,
    similarity: ir.Value,
    index: ir.Value,
    frames: ir.Value,
    tau: ir.Value,
    ema: ir.Value,
    max_frames: int,
    max_window: int,
) -> tuple[ir.Value, ir.Value]:
    """First and last frame of each frame's segment, both [F]."""
    running = b.Expand(1.0, b.Shape(index))
    alive: ir.Value | None = None
    length = running
    for k in range(1, min(max(1, max_window - 1), max_frames)):
        ahead = _ahead(b, similarity, index, frames, k, -2.0)
        running = b.Add(b.Mul(ema, ahead), b.Mul(b.Sub(1.0, ema), running))
        goes_on = b.And(b.GreaterOrEqual(running, tau), b.Less(b.Add(index, float(k)), frames))
        alive = goes_on if alive is None else b.And(alive, goes_on)
        length = b.Add(length, b.number(alive))
    first = b.row(_orbit(b, b.Add(index, length), index, max_frames))
    not_after = b.LessOrEqual(b.row(index), b.column(index))
    start = b.largest(b.Where(b.And(first, not_after), b.row(index), 0.0))
    following = b.Where(b.And(first, b.Not(not_after)), b.row(index), frames)
    return start, b.Sub(b.ReduceMin(following, [1], keepdims=0), 1.0)


def _pair_rows(b: Body, scan: _Scan, merged: ir.Value) -> ir.Value:
    """[F, F]: row i is frame i, or its mixture with frame i + 1 where they are merged."""
    own = b.column(b.Where(merged, scan.pair_weight, 1.0))
    beside = b.number(b.Equal(b.Add(b.column(scan.index), 1.0), b.row(scan.index)))
    return b.Add(b.Mul(own, _eye(b, scan.index)), b.Mul(b.Sub(1.0, own), beside))


def _eye(b: Body, index: ir.Value) -> ir.Value:
    return b.number(b.Equal(b.column(index), b.row(index)))


def _pick(b: Body, stays: ir.Value, out: ir.Value) -> ir.Value:
    """[F', F]: row i is 1 at the i-th frame that stays and 0 elsewhere; `out [F']` holds 0, 1, ..."""
    place = b.Sub(b.CumSum(b.number(stays), [0]), 1.0)
    return b.number(b.And(b.row(stays), b.Equal(b.row(place), b.column(out))))


def _budget_weights(b: Body, similarity: ir.Value, scan: _Scan, frames_out: ir.Value) -> ir.Value:
    """[frames_out, F], see `earlytom.merge._budget_weights`."""
    index, frames, kept = scan.index, scan.frames, scan.kept
    previous = b.Cast(b.Max(b.Sub(index, 1.0), 0.0), to=ir.DataType.INT64)
    step = b.Where(b.Greater(index, 0.0), b.Gather(scan.step, previous), 0.0)  # c(i - 1, i)
    group = b.Where(b.Equal(index, 0.0), -1.0, b.number(b.Not(kept)))
    mine, other = b.row(step), b.column(step)
    tie = b.And(b.Equal(other, mine), b.Less(b.column(index), b.row(index)))
    stronger = b.Or(b.Greater(other, mine), tie)
    same = b.Equal(b.column(group), b.row(group))
    goes_first = b.Or(b.Greater(b.column(group), b.row(group)), b.And(same, stronger))
    rank = b.ReduceSum(b.number(goes_first), [0], keepdims=0)
    wanted = b.Cast(frames_out, to=ir.DataType.FLOAT)
    stays = b.GreaterOrEqual(rank, b.Sub(frames, wanted))
    gone = b.Not(stays)

    # Rows of kept pairs: frame i, mixed with i + 1 where i + 1 is removed.
    second_gone = b.Greater(_shift(b, b.number(gone), index, frames), 0.0)
    rows = _pair_rows(b, scan, b.And(scan.paired, second_gone))

    # Any other removed frame is folded into the nearest kept frame before it.
    earlier = b.Less(b.row(index), b.column(index))
    taker = b.largest(b.Where(b.And(b.row(stays), earlier), b.row(index), 0.0))
    into = b.And(b.row(b.And(gone, kept)), b.Equal(b.row(taker), b.column(index)))
    mix = b.Add(_eye(b, index), b.Mul(b.number(into), b.Max(similarity, 0.0)))
    mixed = b.MatMul(b.Div(mix, b.ReduceSum(mix, [1], keepdims=1)), rows)

    return b.MatMul(_pick(b, stays, _range(b, frames_out)), mixed)


def select_tokens(*, per_frame: int, places: int, opset: int) -> ir.Function:
    """The body of SelectTokens for `per_frame` tokens a frame. Mirrors `earlytom.select.select_fixed`."""
    b = Body()
    features, received, static = (ir.Value(name=name) for name in ("features", "received", "static"))
    k = b.Reshape(b.attribute("places", ir.AttributeType.INT), [1])  # int64 [1]
    window = b.constant(window_of_cell(per_frame, places).tolist())
    limit = b.Where(static, 1.0, b.Cast(k, to=ir.DataType.FLOAT))  # [F']
    cell = _kept_cells(b, received, static, window, limit, k, per_frame)
    size = b.Squeeze(b.Shape(features, start=0, end=1))
    offset = b.Mul(b.Range(b.Squeeze([0]), size, b.Squeeze([1])), [per_frame])
    positions = b.Reshape(b.Add(cell, b.column(offset)), [-1])
    tokens = _rows(b, features, positions)
    tokens.name, positions.name = "tokens", "positions"
    attributes = [ir.Attr("places", ir.AttributeType.INT, None)]
    return b.function(SELECT_TOKENS, [features, received, static], [tokens, positions], attributes, opset)


def adaptive_select_tokens(*, frames: int, per_frame: int, ratio: float, opset: int) -> ir.Function:
    """The body of AdaptiveSelectTokens for up to `frames` frames of `per_frame` tokens. Mirrors
    `earlytom.select.select_varying`."""
    b = Body()
    features, received, static = (ir.Value(name=name) for name in ("features", "received", "static"))
    effective = [effective_ratio(ratio, frames, max(n, 1)) for n in range(frames + 1)]
    windows = [static_tokens(per_frame, share) for share in effective]
    size = b.Shape(features, start=0, end=1)  # n, int64 [1]
    k = b.Gather(b.constant([dynamic_tokens(per_frame, share) for share in effective]), size)  # places, int64 [1]
    places = b.Cast(k, to=ir.DataType.FLOAT)
    table = b.Reshape(
        b.constant([cell for count in windows for cell in window_of_cell(per_frame, count).tolist()]), [-1, per_frame]
    )
    window = b.Squeeze(b.Gather(table, size), [0])  # [P]
    limit = b.Where(static, 1.0, places)  # [n]
    cell = _kept_cells(b, received, static, window, limit, k, per_frame)  # [n, places], of which a frame fills `kept`
    kept = b.Where(static, b.Cast(b.Gather(b.constant(windows), size), to=ir.DataType.FLOAT), places)  # [n]

    # Output row j belongs to the frame with begin <= j < end, and is that frame's kept cell number j - begin.
    end = b.CumSum(kept, [0])  # [n]
    row = _range(b, b.Squeeze(b.Mul(size, k)))  # [M]
    passed = b.number(b.GreaterOrEqual(b.column(row), b.row(end)))  # [M, n]
    last = b.Sub(b.Cast(size, to=ir.DataType.FLOAT), 1.0)
    frame = b.Min(b.ReduceSum(passed, [1], keepdims=0), last)
    begin = b.Gather(b.Sub(end, kept), b.Cast(frame, to=ir.DataType.INT64))
    place = b.Min(b.Sub(row, begin), b.Sub(places, 1.0))
    slot = b.Cast(b.Add(b.Mul(frame, places), place), to=ir.DataType.INT64)
    offset = b.Cast(b.Mul(frame, float(per_frame)), to=ir.DataType.INT64)
    positions = b.Add(b.Gather(b.Reshape(cell, [-1]), slot), offset)
    tokens = _rows(b, features, positions)
    count = b.Cast(b.ReduceSum(kept, [0], keepdims=1), to=ir.DataType.INT64)
    tokens.name, positions.name, count.name = "tokens", "positions", "count"
    attributes = [ir.Attr("frames", ir.AttributeType.INT, None), ir.Attr("ratio", ir.AttributeType.FLOAT, None)]
    inputs, outputs = [features, received, static], [tokens, positions, count]
    return b.function(ADAPTIVE_SELECT_TOKENS, inputs, outputs, attributes, opset)


def _kept_cells(
    b: Body, received: ir.Value, static: ir.Value, window: ir.Value, limit: ir.Value, k: ir.Value, per_frame: int
) -> ir.Value:
    """The first k cells of each frame, int64 [F', k]: in raster order those with fewer than `limit [F']` rivals of more
    attention, then the others. See `earlytom.select.keep_mask`."""
    index = b.constant([float(cell) for cell in range(per_frame)], ir.DataType.FLOAT)  # [P]
    same_window = b.Equal(b.column(window), b.row(window))  # [P, P]: may q (row) compete with p (column)
    mine, other = b.Unsqueeze(received, [1]), b.Unsqueeze(received, [2])  # [F', 1, P], [F', P, 1]
    tie = b.And(b.Equal(other, mine), b.Less(b.column(index), b.row(index)))
    beats = b.Or(b.Greater(other, mine), tie)  # [F', P, P]
    rivals = b.Or(same_window, b.Unsqueeze(b.Not(static), [1, 2]))
    rank = b.ReduceSum(b.number(b.And(beats, rivals)), [1], keepdims=0)  # [F', P]
    mask = b.Less(rank, b.column(limit))

    # All keys differ, so that every backend's TopK returns the same order.
    key = b.Where(mask, b.Sub(float(per_frame), index), b.Sub(-1.0, index))
    _, cell = b.tape.op_multi_out("TopK", [key, k], {"axis": 1, "largest": 1, "sorted": 1}, num_outputs=2)
    return cell


def _rows(b: Body, features: ir.Value, positions: ir.Value) -> ir.Value:
    """The tokens of features [F', P, E] at `positions`."""
    rows = b.Reshape(features, b.Concat([-1], b.Shape(features, start=2), axis=0))
    return b.Gather(rows, positions, axis=0)


def _range(b: Body, size: ir.Value) -> ir.Value:
    """0, 1, ... as fp32; `size` is an int64 scalar."""
    return b.Cast(b.Range(b.Squeeze([0]), size, b.Squeeze([1])), to=ir.DataType.FLOAT)
