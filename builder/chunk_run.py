"""Run the two graphs of `builder.chunks` in ONNX Runtime, as `builder.runners` runs a single one.

The head runs on every chunk of a clip, and its values are put together as if it had run on the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from builder.runners import Arrays, run_each, values_of
from runtime.engine import layout


def is_chunked(paths: Sequence[Path]) -> bool:
    """Whether these graphs are a head and a rest, and not the stages of the adaptive schedule."""
    outputs = {value.name for value in onnx.load(str(paths[0]), load_external_data=False).graph.output}
    return layout.HIDDEN in outputs


def run_chunks(paths: Sequence[Path], names: Sequence[str], feeds: Sequence[Arrays], *, rounded: bool) -> list[Arrays]:
    """The outputs and the values `names` of the two graphs for every feed.

    Args:
        paths: head and rest; a temporary copy of each with more outputs is written beside it.
        names: values of either of them.
        feeds: frames [F, 3, H, W] by the name in `runtime.engine.layout`.
        rounded: as `builder.rounding` has it.

    Raises:
        UserError: neither graph has a value of that name.
    """
    of_head, of_rest = values_of(paths, names)
    inputs = [onnx.load(str(path), load_external_data=False).graph.input for path in paths]
    chunk = inputs[0][0].type.tensor_type.shape.dim[0].dim_value
    clips = [np.split(feed[layout.FRAMES], len(feed[layout.FRAMES]) // chunk) for feed in feeds]
    chunks = [{layout.FRAMES: some} for clip in clips for some in clip]
    parts = iter(run_each(paths[0], of_head, chunks, rounded=rounded))
    heads = [_joined([next(parts) for _ in clip]) for clip in clips]
    entering = [{value.name: head[value.name] for value in inputs[1]} for head in heads]
    rests = run_each(paths[1], of_rest, entering, rounded=rounded)
    return [
        {name: value for name, value in (head | rest).items() if name in (*names, *layout.OUTPUTS)}
        for head, rest in zip(heads, rests, strict=True)
    ]


def _joined(parts: Sequence[Arrays]) -> Arrays:
    """The values of a clip's chunks, frame after frame."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
