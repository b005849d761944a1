"""What this machine has, what that allows, and whether it works.

    python -m builder.doctor            a line for each finding, with the command that fixes what is missing
    python -m builder.doctor --run      try everything with the bundled model, and write a report

The exit status is 0 if the default build and ask can work here and, with --run, no part failed; else 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from builder.doctor.findings import BROKEN, Finding, can_ask, can_build, findings
from builder.doctor.isolated import FAILED, NOT_HERE, NOT_TRIED, OK
from builder.doctor.machine import look
from builder.doctor.report import by_reason, record, words, write
from builder.doctor.treatment import Tried, treat
from earlytom.numbers import real
from runtime import cli
from runtime.engine.folder import ENGINES

SICK = 1
MINUTES = 8.0
EXAMPLES = """
examples:
  python -m builder.doctor
  python -m builder.doctor --run --report doctor
      every backend that can run here, against the reference; doctor/doctor.md and doctor/doctor.json

The exit status is 0 if the default build and ask can work here and no part that was tried failed, else 1.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(
        prog="python -m builder.doctor",
        description="Tell what this machine has, what that allows and what mends the rest; with --run if it works.",
        epilog=EXAMPLES,
    )
    p.add_argument("--run", action="store_true", help="try the whole chain with the bundled model, each part by itself")
    p.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help=f"of --run (default: {MINUTES:.0f})")
    p.add_argument("--only", metavar="TEXT", help="with --run: only parts whose name has this in it, and their engines")
    p.add_argument("--report", type=Path, default=Path("doctor"), metavar="DIR", help="of --run (default: doctor)")
    p.add_argument("--out", type=Path, default=Path(ENGINES), metavar="DIR", help="where engines go (default: engines)")
    p.add_argument("--json", action="store_true", help="print nothing but one JSON line")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0 or `SICK`; user errors are raised (see `runtime.cli.run`)."""
    options = parser().parse_args(argv)
    real("--minutes", options.minutes, 0, low_open=True)
    screen = cli.Screen(json_only=options.json)
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        with screen.working("looking around"):
            machine = look(options.out, Path(folder))
        found = findings(machine)
        build, ask = can_build(machine), can_ask(machine)
        show(screen, found, build=build, ask=ask)
        tried: list[Tried] = []
        if options.run:
            from builder.doctor.course import course, only

            parts = only(course(machine, Path(folder)), options.only)
            screen.line(f"\n{len(parts)} parts, at most {options.minutes:g} minutes")
            ended: list[Tried] = []

            def told(one: Tried) -> None:
                ended.append(one)
                if one.outcome.status in (OK, FAILED):
                    show_part(screen, one)
                screen.step(one.part.name, len(ended), len(parts))

            with screen.working("trying"):
                tried = treat(parts, Path(folder), seconds=60 * options.minutes, told=told)
    result = record(machine, found, tried, build=build, ask=ask)
    if options.run:
        for status in (NOT_HERE, NOT_TRIED):
            for why, names in by_reason(result["parts"], status).items():
                screen.line(f"{status}: {why}: {len(names)} part{'' if len(names) == 1 else 's'}")
        for path in write(result, options.report):
            screen.line(f"report: {path}")
    screen.result(result)
    failed = any(one.outcome.status == FAILED for one in tried)
    return cli.OK if build and ask and not failed else SICK


def show(screen: cli.Screen, found: Sequence[Finding], *, build: bool, ask: bool) -> None:
    """Print a line for each finding, and whether the default commands can work."""
    width = max(len(one.name) for one in found)
    for one in found:
        screen.line(f"{one.state:2}  {one.name:{width}}  {one.value}; {one.allows}")
        if one.mend:
            screen.line(f"    {'':{width}}  mend it: {one.mend}")
    broken = ", ".join(one.name for one in found if one.state == BROKEN)
    for what, can in (("python -m builder.build --ratio 0.3 --fp16", build), ("python -m runtime.ask", ask)):
        screen.line(f"{what}: {'can work here' if can else f'cannot work here ({broken})'}")


def show_part(screen: cli.Screen, one: Tried) -> None:
    """Print the outcome of a part."""
    outcome = one.outcome
    screen.line(f"{outcome.status}: {one.part.name} ({outcome.seconds:.1f} s) {outcome.why or words(outcome.figures)}")


if __name__ == "__main__":
    cli.stop_by_signal()
    sys.exit(cli.run(main, sys.argv[1:]))
