"""The console scripts of the runtime: `earlytom-ask` is `python -m runtime.ask`, and so on.

A script runs its module as `python -m` does, so that both are one command: signals, child processes and exit statuses
are the same.
"""

from __future__ import annotations

from runtime import cli


def ask() -> None:
    """`earlytom-ask`."""
    cli.run_module("runtime.ask")


def bench() -> None:
    """`earlytom-bench`."""
    cli.run_module("runtime.bench")


def serve() -> None:
    """`earlytom-serve`."""
    cli.run_module("runtime.serve")
