"""Run the two graphs of `builder.chunks` in ONNX Runtime, as `builder.runners` runs a single one.

The head runs on every chunk of a clip, and its values are put together as if it had run on the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import IterationResult, RunResults

from builder.runners import Arrays, write_tapped
from earlytom.errors import UserError
from runtime import contract


def is_chunked(paths: Sequence[Path]) -> bool:
    """Whether these graphs are a head and a rest, and not the stages of the adaptive schedule."""
    outputs = {value.name for value in onnx.load(str(paths[0]), load_external_data=False).graph.output}
    return contract.HIDDEN in outputs


def run_chunks(paths: Sequence[Path], names: Sequence[str], feeds: Sequence[Arrays], *, rounded: bool) -> RunResults:
    """The outputs and the values `names` of the two graphs for every feed.

    Args:
        paths: head and rest; a temporary copy of each with more outputs is written beside it.
        names: values of either of them.
        feeds: frames [F, 3, H, W] by the name in `runtime.contract`.
        rounded: as `builder.rounding` has it.

    Raises:
        UserError: neither graph has a value of that name.
    """
    graphs = [onnx.load(str(path), load_external_data=False).graph for path in paths]
    (frames,) = graphs[0].input
    chunk = frames.type.tensor_type.shape.dim[0].dim_value
    had = [{value.name for value in (*graph.output, *graph.value_info)} for graph in graphs]
    missing = [name for name in names if not any(name in one for one in had)]
    if missing:
        raise UserError(
            f"no graph of {paths[0].parent} has a value named {missing[0]}, so another version exported them: build "
            "again with --force"
        )
    ofs = [[name for name in names if name in one] for one in had]
    clips = [np.split(feed[contract.FRAMES], len(feed[contract.FRAMES]) // chunk) for feed in feeds]
    parts = iter(_run(paths[0], ofs[0], [{contract.FRAMES: some} for clip in clips for some in clip], rounded))
    heads = [_joined([next(parts) for _ in clip]) for clip in clips]
    entering = [value.name for value in graphs[1].input]
    rests = _run(paths[1], ofs[1], [{name: head[name] for name in entering} for head in heads], rounded)
    results = [
        {name: value for name, value in (head | rest).items() if name in (*names, *contract.OUTPUTS)}
        for head, rest in zip(heads, rests, strict=True)
    ]
    return RunResults([("onnxruntime", [IterationResult(out, runner_name="onnxruntime") for out in results])])


def _run(path: Path, names: Sequence[str], feeds: Sequence[Arrays], rounded: bool) -> list[Arrays]:
    tapped = write_tapped(path, names, rounded=rounded)
    try:
        with OnnxrtRunner(SessionFromOnnx(str(tapped)), name="onnxruntime") as runner:
            return [{name: np.array(value) for name, value in runner.infer(feed).items()} for feed in feeds]
    finally:
        tapped.unlink()


def _joined(parts: Sequence[Arrays]) -> Arrays:
    """The values of a clip's chunks, frame after frame."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
