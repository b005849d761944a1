"""`python -m builder.plugins`: what kernels cost, and numbers that make no sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder import build
from builder.export import cells, functions
from builder.plugins import __main__ as command
from runtime import cli
from tests.builder.needed import needs_triton
from tests.processes import HANG_SECONDS

ROOT = Path(build.__file__).resolve().parents[1]


@needs_triton
def test_the_command_shows_what_kernels_cost() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = "--frames 3 --merges 1 --tokens 4 --width 8 --ratio 0.5 --dtype bf16 --target 8.0 8.9 8.0"
    done = subprocess.run(
        [sys.executable, "-m", "builder.plugins", *words.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout.splitlines()[-1])
    kernels = record["kernels"]
    assert [(k["target"], k["tensors"]) for k in kernels] == [
        (target, tensors)
        for target in ("8.0", "8.9")
        for tensors in (
            "fp32 [3, 3] -> fp32 [2, 3], bool [3]",
            "fp32 [2, 2] -> fp32 [2, 2], bool [2]",
            "bf16 [2, 4, 8], fp32 [2, 4], bool [2] -> bf16 [6, 8], int64 [6]",
        )
    ]
    assert all(kernel["spill_bytes"] == 0 for kernel in kernels)
    for kernel in kernels:
        assert kernel["ptx_sha256"][:12] in done.stdout.splitlines()[1 + kernels.index(kernel)]
    assert len({kernel["ptx_sha256"] for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--frames 0", "number of frames"),
        ("--frames 129", "between 1 and 128"),
        ("--frames x", "--frames"),
        ("--merges -1", "--merges must be 0 or more"),
        ("--width 0", "--width 1 or more"),
        ("--width 99999999999999999999", "--width must be a whole number between 1 and 65536"),
        ("--tokens 0", "--tokens must be at least 1"),
        ("--ratio 1.5", "retention ratio must be in (0, 1]"),
        ("--frame-budget 2", "--frame-budget"),
        ("--target h200", "--target 'h200'"),
        ("--dtype int8", "--dtype"),
    ],
)
def test_numbers_that_make_no_sense(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(command.main, typed.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_the_method_cells_has_one_kernel() -> None:
    arguments = command.parser().parse_args(["--method", "cells"])
    ((plugin, types, shapes, attributes),) = command.calls(arguments)
    assert (plugin.name, types) == (cells.SELECT_GREEDY, ("FP32", "FP32", "INT64"))
    assert (shapes, attributes) == (((2744,), (2744, 2744)), {"count": 630})
    assert not list(command.calls(command.parser().parse_args(["--method", "cells", "--ratio", "1"])))


def test_an_engine_that_selects_nothing_has_no_selection() -> None:
    calls = list(command.calls(command.parser().parse_args(["--ratio", "1", "--merges", "0"])))
    assert [call[0].name for call in calls] == [functions.FRAME_PLAN]
