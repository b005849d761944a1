"""The cost of the plugins' kernels, measured without a GPU: registers, shared memory, spills and digest per target.

    python -m builder.plugins                                 LLaVA-OneVision-7B with 32 frames, for 8.0 and 9.0
    python -m builder.plugins --frames 64 --ratio 0.2 --target 8.9

The kernels are those of an engine with these counts. Shapes are constants of a kernel, so each merge layer has its own,
and so has the plan after the last one, which finds the final segments. `--method cells` has one kernel, greedy token
selection; its merging and its selection in rounds have none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from builder.settings.options import MAX_FRAMES, parse_target
from earlytom.budget import frames_per_stage, token_count
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.numbers import whole
from runtime import cli

_WIDEST = 1 << 16  # of a token: far above a published model's

if TYPE_CHECKING:
    from builder.plugins.registry import Plugin, Shape

    Call = tuple[Plugin, tuple[str, ...], tuple[Shape, ...], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options = parser().parse_args(argv)
    screen = cli.Screen(json_only=options.json)
    targets = dict.fromkeys(parse_target(text) for text in options.target)  # each once
    checked_stages(options)
    from builder.plugins.ptx import load_triton
    from builder.plugins.registry import Plugins

    wanted = list(calls(options))
    triton = load_triton()
    rows, records = [], []
    for target in targets:
        plugins = Plugins(target)
        for call in wanted:
            plugins.kernel(*call)
        for record in plugins.records:
            name = ".".join(map(str, target))
            records.append({"target": name, **msgspec.structs.asdict(record)})
            sizes = (record.registers, record.shared_bytes, record.spill_bytes)
            grid = " x ".join(map(str, record.grid))
            rows.append((record.name, record.tensors, name, grid, record.threads, *sizes, record.ptx_sha256[:12]))
    columns = ("plugin", "tensors", "GPU", "grid", "threads", "registers", "shared bytes", "spill bytes", "PTX sha256")
    screen.table(columns, rows)
    screen.result({"triton": triton.__version__, "kernels": records})
    return 0


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(
        prog="python -m builder.plugins",
        description="Compile the kernels of the TensorRT plugins and show what they cost. Needs Triton, and no GPU.",
    )
    p.add_argument("--frames", type=int, default=32, metavar="F", help="frames of a clip (default: 32)")
    p.add_argument("--merges", type=int, default=3, metavar="M", help="merge layers (default: 3)")
    p.add_argument("--frame-budget", type=float, default=0.75, metavar="SHARE", help="kept at each (default: 0.75)")
    p.add_argument("--ratio", type=float, default=0.1, metavar="R", help="share of the tokens KEPT (default: 0.1)")
    p.add_argument("--tokens", type=int, default=196, metavar="P", help="tokens of a whole frame (default: 196)")
    p.add_argument("--width", type=int, default=3584, metavar="E", help="width of the LLM (default: 3584)")
    p.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the graph (default: fp16)")
    p.add_argument(
        "--target", nargs="+", default=["8.0", "9.0"], metavar="GPU", help="a100 or capabilities (default: 8.0 9.0)"
    )
    p.add_argument("--method", choices=("earlytom", "cells"), default="earlytom", help="default: earlytom")
    p.add_argument("--json", action="store_true", help="print nothing but the JSON line at the end")
    return p


def checked_stages(options: argparse.Namespace) -> tuple[int, ...]:
    """Frames before the first merge and after each one."""
    if options.merges < 0 or options.width < 1:
        raise UserError(f"--merges must be 0 or more and --width 1 or more, got {options.merges} and {options.width}")
    whole("--width", options.width, 1, _WIDEST)
    if options.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {options.tokens}")
    if options.frames > MAX_FRAMES:
        raise UserError(f"--frames must be between 1 and {MAX_FRAMES}, got {options.frames}")
    stages = frames_per_stage(options.frames, merges=options.merges, frame_budget=options.frame_budget)
    token_count(options.frames, options.tokens, options.ratio, frames_out=stages[-1])
    return stages


def calls(options: argparse.Namespace) -> Iterator[Call]:
    """The plugin calls of an engine: a plan for each merge layer and one for the final segments, and the selection."""
    from builder.plugins.registry import FRAME_PLAN, SELECT_GREEDY, SELECT_TOKENS

    stages = checked_stages(options)
    if options.method == "cells":
        count = token_count(options.frames, options.tokens, options.ratio, frames_out=stages[-1])
        tokens = stages[-1] * options.tokens
        if count < tokens:
            yield SELECT_GREEDY, ("FP32", "FP32", "INT64"), ((tokens,), (tokens, tokens)), {"count": count}
        return
    settings = EarlyTomConfig(schedule="budget")
    method = {name: getattr(settings, name) for name in ("tau", "ema", "max_window", "trailing")}
    for frames, left in zip(stages, (*stages[1:], stages[-1]), strict=True):
        yield FRAME_PLAN, ("FP32", "FP32", "BOOL"), ((frames, frames),), {"frames_out": left, **method}
    kept = stages[-1]
    places = token_count(options.frames, options.tokens, options.ratio, frames_out=kept) // kept
    if places == options.tokens:
        return  # nothing to leave out, so the graph selects nothing
    shapes = ((kept, options.tokens, options.width), (kept, options.tokens), (kept,))
    dtype = options.dtype.upper()
    yield SELECT_TOKENS, (dtype, "FP32", "BOOL", dtype, "INT64"), shapes, {"places": places}


if __name__ == "__main__":
    cli.stop_by_signal()
    sys.exit(cli.run(main, sys.argv[1:]))
