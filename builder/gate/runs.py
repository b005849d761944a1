"""Runs the graphs of an engine in ONNX Runtime so that they return every value that the gate compares.

A clip's graphs run one after the other, each on the outputs of the one before it (`runtime.engine.layout`), and their
values are put together as if one graph had them. The head of a chunked engine runs on every chunk of a clip, and its
values are joined; an adaptive stage pads its values to the frames that arrived, and they are cut to the frames kept.
Each graph is loaded, run on every clip and freed before the next one is loaded. Nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from polygraphy.comparator import IterationResult, RunResults

from builder.gate.batches import split, stack
from builder.precision.rounding import round_results
from earlytom.errors import UserError
from runtime.engine import layout
from runtime.files.partial import temporary
from runtime.vision.onnxruntime import open_session

Arrays = dict[str, NDArray[Any]]
PLANS = ("weights", "member", "taken")  # traced values of a merge that have a row for each group


def run_tapped(
    onnx_path: Path | Sequence[Path], names: Sequence[str], feeds: list[Arrays], *, rounded: bool, batch: int = 1
) -> RunResults:
    """The outputs and the values `names` of a graph, or of several in order, for every feed; see `write_tapped`.

    Feeds and results are of one clip each; a graph of `batch` videos runs on that many feeds at once.
    """
    if not isinstance(onnx_path, Path):
        results = run_stages(onnx_path, names, feeds, rounded=rounded)
    elif batch == 1:
        results = run_each(onnx_path, names, feeds, rounded=rounded)
    else:
        stacked = stack([feed[layout.FRAMES] for feed in feeds], batch)
        together = run_each(onnx_path, names, [{layout.FRAMES: clips} for clips in stacked], rounded=rounded)
        results = [one for values in together for one in split(values, batch)]
    return RunResults([("onnxruntime", [IterationResult(one, runner_name="onnxruntime") for one in results])])


def run_stages(paths: Sequence[Path], names: Sequence[str], feeds: Sequence[Arrays], *, rounded: bool) -> list[Arrays]:
    """The outputs and the values `names` of an engine's graphs, run in order, for every feed.

    Args:
        paths: the graphs in order; a temporary copy of each with more outputs is written beside it.
        names: values of any of them.
        feeds: frames by the name in `runtime.engine.layout`.
        rounded: round every result (`builder.precision.rounding`).
    """
    graphs = [onnx.load(str(path), load_external_data=False).graph for path in paths]
    results: list[Arrays] = [{} for _ in feeds]
    entering = list(feeds)
    for stage, (path, wanted) in enumerate(zip(paths, values_of(paths, graphs, names), strict=True)):
        rows = graphs[stage].input[0].type.tensor_type.shape.dim[0].dim_value  # 0 where the video decides
        parts = [_parts(values, rows) for values in entering]
        outs = iter(run_each(path, wanted, [part for clip in parts for part in clip], rounded=rounded))
        following = graphs[stage + 1].input if stage + 1 < len(graphs) else ()
        for clip, values in enumerate(parts):
            out = _joined([next(outs) for _ in values])
            if layout.COUNT in out:
                _cut(out, stage, len(next(iter(entering[clip].values()))))
            entering[clip] = {value.name: _entering(out, value.name) for value in following}
            results[clip] |= {name: value for name, value in out.items() if name in (*names, *layout.OUTPUTS)}
    return results


def _parts(values: Arrays, rows: int) -> list[Arrays]:
    """Split a graph's inputs into chunks of `rows` frames; 0: no split."""
    every = len(next(iter(values.values())))
    if not rows or rows == every:
        return [values]
    return [{name: v[first : first + rows] for name, v in values.items()} for first in range(0, every, rows)]


def _joined(parts: Sequence[Arrays]) -> Arrays:
    """Join the values of a clip's chunks along the frames."""
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _entering(out: Arrays, name: str) -> NDArray[Any]:
    """The input `name` of a graph, from the outputs of the one before it."""
    merged = layout.BETWEEN[name]
    return out[merged] if merged in out else out[name]


def _cut(out: Arrays, stage: int, arrived: int) -> None:
    """Cut a stage's padded values in place."""
    count, last = int(out[layout.COUNT][0]), layout.TOKENS in out
    limit = len(out[layout.TOKENS]) if last else arrived
    if not 1 <= count <= limit:
        raise UserError(f"stage {stage} of the chain kept {count} of {limit}: its arithmetic failed, build with --fp32")
    padded = layout.OF_TOKENS if last else (*layout.BETWEEN.values(), *PLANS)
    for name, value in out.items():
        if name in padded or name.rpartition("_")[0] in padded:
            groups = value.ndim - 2 if name.startswith("weights_") else 0  # weights are [..., F', F]
            out[name] = value.take(range(count), axis=groups)


def run_each(onnx_path: Path, names: Sequence[str], feeds: Iterable[Arrays], *, rounded: bool) -> list[Arrays]:
    """The outputs and the values `names` of one graph for every feed."""
    with temporary(onnx_path) as tapped:
        write_tapped(onnx_path, names, rounded=rounded, path=tapped)
        session = open_session(tapped, torch.get_num_threads())
        every = [value.name for value in session.get_outputs()]
        return [dict(zip(every, session.run(every, feed), strict=True)) for feed in feeds]


def values_of(paths: Sequence[Path], graphs: Sequence[Any], names: Sequence[str]) -> list[list[str]]:
    """Which of the values `names` each of several graphs has; `paths` are their files."""
    had = [{value.name for value in (*graph.output, *graph.value_info)} for graph in graphs]
    missing = [name for name in names if not any(name in one for one in had)]
    if missing:
        raise UserError(
            f"no graph of {paths[0].parent} has a value named {missing[0]}, so another version exported them: build "
            "again with --force"
        )
    return [[name for name in names if name in one] for one in had]


def write_tapped(onnx_path: Path, names: Sequence[str], *, rounded: bool, path: Path | None = None) -> Path:
    """Write a copy of the graph that also returns the values `names`; with `rounded`, see `builder.precision.rounding`.

    `path` must be in the graph's folder, where its external data is; default: a hidden file there.
    """
    model = onnx.load(str(onnx_path), load_external_data=False)
    have = {value.name for value in model.graph.output}
    known = {value.name: value for value in model.graph.value_info}
    missing = [name for name in names if name not in have | known.keys()]
    if missing:
        raise UserError(
            f"{onnx_path} has no value named {missing[0]}, so another version exported it: build it again with --force"
        )
    model.graph.output.extend(known[name] for name in names if name not in have)
    if rounded:
        round_results(model)
    path = path or onnx_path.with_name(f".taps-{onnx_path.name}")
    path.write_bytes(model.SerializeToString())
    return path
