"""What facts allow, and what mends them."""

from __future__ import annotations

import shlex

import pytest

from builder.doctor.findings import BROKEN, GOOD, LACKING, Finding, can_ask, can_build, findings
from builder.doctor.isolated import FAILED, PartOutcome
from builder.doctor.machine import Machine
from tests.builder.doctor.machines import ABSENT, WITH_A_GPU, changed, without_gpu


def found(machine: Machine, name: str) -> Finding:
    (one,) = (one for one in findings(machine) if one.name == name)
    return one


def test_where_everything_is_there_nothing_is_to_be_mended() -> None:
    assert {one.state for one in findings(WITH_A_GPU)} == {GOOD}
    assert not [one for one in findings(WITH_A_GPU) if one.mend]
    assert can_build(WITH_A_GPU)
    assert can_ask(WITH_A_GPU)


def test_without_a_gpu_builds_and_answers_work() -> None:
    machine = without_gpu()
    assert can_build(machine)
    assert can_ask(machine)
    lacking = {one.name for one in findings(machine) if one.state == LACKING}
    assert lacking == {"NVIDIA driver", "tensorrt", "torch-tensorrt"}
    assert "runs on another machine" in found(machine, "tensorrt-rtx").allows


@pytest.mark.parametrize(
    ("machine", "name", "word", "builds"),
    [
        (changed(python=(3, 10)), "Python", "3.10", False),
        (changed(missing=("rich>=13",)), "packages", "rich", False),
        (changed(memory=1e9), "memory", "1.0 GB", False),
        (changed(disk=1e6), "disk", "0.0 GB", False),
        (changed(loaded={"torch": ABSENT}), "torch", "not installed", False),
        (changed(loaded={"onnxruntime": PartOutcome(FAILED, "ended by SIGSEGV")}), "onnxruntime", "SIGSEGV", False),
        (changed(loaded={"av": ABSENT}), "FFmpeg (PyAV)", "not installed", True),
    ],
)
def test_what_everything_needs(machine: Machine, name: str, word: str, builds: bool) -> None:
    one = found(machine, name)
    assert one.state == BROKEN
    assert word in one.value
    assert can_build(machine) == builds
    assert not can_ask(machine)


@pytest.mark.parametrize(
    ("machine", "name", "word"),
    [
        (changed(capability=None), "GPU", "no GPU is shown"),
        (
            changed(loaded={"torch": PartOutcome("ok", figures={"version": "2.13.0+cpu"})}),
            "GPU",
            "torch 2.13.0+cpu cannot",
        ),
        (changed(loaded={"tensorrt": ABSENT}), "tensorrt", "with it: compiles"),
        (changed(loaded={"triton": ABSENT}), "Triton", "cannot be compiled"),
        (changed(capability=(7, 5)), "Triton", "no plugin kernels for compute capability 7.5"),
        (changed(torch_tensorrt=None), "torch-tensorrt", "--decoder torch-tensorrt"),
        (changed(extras={"fastapi": False, "matplotlib": True, "PIL": True}), "extra [serve]", "runtime.serve"),
    ],
)
def test_what_is_lacking_is_told_with_what_it_would_be_for(machine: Machine, name: str, word: str) -> None:
    one = found(machine, name)
    assert one.state == LACKING
    assert word in one.allows
    assert can_build(machine)


def test_what_can_be_installed_has_a_command_that_a_shell_takes() -> None:
    absent = dict.fromkeys(WITH_A_GPU.loaded, ABSENT)
    machine = changed(loaded=absent, torch_tensorrt=None, missing=("rich>=13", "numpy>=2.0 (here: 1.26)"))
    mends = [one.mend for one in findings(machine) if one.mend.startswith("pip ")]
    assert len(mends) > 8
    assert all(shlex.split(mend)[:2] == ["pip", "install"] for mend in mends)
    assert 'pip install "rich>=13" "numpy>=2.0"' in mends
