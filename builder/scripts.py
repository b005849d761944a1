"""The console scripts of the builder, as `runtime.scripts` are those of the runtime."""

from __future__ import annotations

from runtime import cli


def build() -> None:
    """`earlytom-build`."""
    cli.run_module("builder.build")


def doctor() -> None:
    """`earlytom-doctor`."""
    cli.run_module("builder.doctor")
