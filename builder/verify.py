"""Look at what an engine was verified against.

    python -m builder.verify ENGINE --polygraphy DIR    keep an engine's reference for comparisons in CI
    python -m builder.verify ENGINE --layers            see where its graph drifts (`builder.gate.drift`)

A build verifies an engine by itself (`builder.gate`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from builder.gate import COMPARE_FILE
from earlytom.errors import UserError
from runtime import cli
from runtime.engine.manifest import Manifest


def parser() -> argparse.ArgumentParser:
    """The command line."""
    what = "Keep an engine's reference for comparisons in CI (--polygraphy), or see where it drifts (--layers)."
    p = cli.Parser(prog="python -m builder.verify", description=what)
    p.add_argument("engine", type=Path, metavar="ENGINE", help="engine folder, built with verification")
    what = f"where to put the inputs, the reference outputs and {COMPARE_FILE}, which runs Polygraphy on them"
    p.add_argument("--polygraphy", type=Path, metavar="DIR", help=what)
    what = "which of the engine's frame counts, if it has several (default: the most)"
    p.add_argument("--frames", type=int, metavar="F", help=what)
    p.add_argument("--layers", action="store_true", help="print how far the graph is from the model after every layer")
    p.add_argument(
        "--video",
        type=Path,
        metavar="VIDEO",
        help="the clip for --layers (default: the one that the engine was verified on, else a drawn one)",
    )
    p.add_argument("--model", metavar="SOURCE", help="where the checkpoint for --layers is now (default: where it was)")
    p.add_argument("--json", action="store_true", help="--layers prints nothing but a JSON line")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options = parser().parse_args(argv)
    if options.polygraphy is None and not options.layers:
        raise UserError(f"nothing to do with {options.engine}: give --polygraphy DIR or --layers")
    if not options.layers and (options.video is not None or options.model is not None):
        raise UserError("--video and --model are for --layers, which was not asked for: add it, or leave them out")
    if options.polygraphy is not None and options.polygraphy.exists() and not options.polygraphy.is_dir():
        raise UserError(f"--polygraphy {options.polygraphy} is a file: give a folder, which need not exist")
    Manifest.read(options.engine, verify_files=False)
    screen = cli.Screen(json_only=options.json)
    if options.polygraphy is not None:
        from builder.gate.kept_reference import keep_reference

        script = keep_reference(options.engine, options.polygraphy, options.frames)
        screen.line(f"compare a graph with this reference: sh {shlex.quote(str(script))} VISION.ONNX")
        if not options.layers:
            screen.result({"engine": str(options.engine), "reference": str(options.polygraphy), "script": str(script)})
    if options.layers:
        from builder.gate import drift

        screen.result(
            drift.report(options.engine, screen, frames=options.frames, video=options.video, model=options.model)
        )
    return 0


if __name__ == "__main__":
    cli.stop_by_signal()
    sys.exit(cli.run(main, sys.argv[1:]))
