"""Measure how accurate the model stays when its visual tokens are compressed.

    python -m builder.evaluate --plot accuracy.png

The stages of a measurement are in `builder.evaluation.run`. `--coverage` measures the user's own videos instead
(`builder.evaluation.coverage`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from builder.evaluation.arguments import read
from runtime import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    asked = read(argv)
    from builder.evaluation import run

    screen = cli.Screen(json_only=asked.json_only)
    screen.result(run.measure_coverage(asked, screen) if asked.coverage else run.measure(asked, screen))
    return 0


if __name__ == "__main__":
    cli.stop_by_signal()  # as Ctrl-C: the worker processes end too
    sys.exit(cli.run(main, sys.argv[1:]))
