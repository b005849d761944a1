"""Run a chain of graphs stage by stage in ONNX Runtime, as `builder.runners` runs a single one.

What the stages return is put together as if one graph had: values that a stage pads to the frames that arrived are cut
to those that it kept. A stage is loaded, run on every clip and let go before the next one, so that no more than one is
in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from builder.runners import Arrays, run_each, values_of
from earlytom.errors import UserError
from runtime.engine import layout


def run_chain(paths: Sequence[Path], names: Sequence[str], feeds: Sequence[Arrays], *, rounded: bool) -> list[Arrays]:
    """The outputs and the values `names` of a chain for every feed.

    Args:
        paths: the graphs in order; a temporary copy of each with more outputs is written beside it.
        names: values of any of them.
        feeds: frames by the name in `runtime.engine.layout`.
        rounded: as `builder.rounding` has it.

    Raises:
        UserError: no graph has a value of that name, or a stage kept a number of frames that cannot be.
    """
    results: list[Arrays] = [{} for _ in feeds]
    entering = list(feeds)
    for stage, (path, wanted) in enumerate(zip(paths, values_of(paths, names), strict=True)):
        for clip, out in enumerate(run_each(path, wanted, entering, rounded=rounded)):
            entering[clip] = _cut(out, stage, len(paths), len(next(iter(entering[clip].values()))))
            results[clip] |= {name: value for name, value in out.items() if name in (*names, *layout.OUTPUTS)}
    return results


def _cut(out: Arrays, stage: int, stages: int, arrived: int) -> Arrays:
    """Cut in place what a stage padded; returns what enters the next stage."""
    count = int(out[layout.COUNT][0])
    last = stage == stages - 1
    limit = len(out[layout.TOKENS]) if last else arrived
    if not 1 <= count <= limit:
        raise UserError(f"stage {stage} of the chain kept {count} of {limit}: its arithmetic failed, build with --fp32")
    for name in out:
        if name.startswith("weights_") or name in (layout.MERGED_HIDDEN, layout.MERGED_RECEIVED, *layout.OUTPUTS):
            out[name] = out[name][:count]
    inputs = () if last else layout.stage_tensors(stage + 1, stages)[0]
    source = {layout.HIDDEN: layout.MERGED_HIDDEN, layout.RECEIVED: layout.MERGED_RECEIVED}
    return {name: out[source[name]] for name in inputs}
