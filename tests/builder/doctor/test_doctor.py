"""The command, the course, and the report."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from builder.doctor import __main__ as doctor
from builder.doctor import machine as machines
from builder.doctor.course import MODES, PLUGINS, Part, course, only
from builder.doctor.findings import findings
from builder.doctor.isolated import FAILED, NOT_HERE, NOT_TRIED, OK, PartOutcome
from builder.doctor.machine import Machine
from builder.doctor.report import markdown, record
from builder.doctor.treatment import Tried
from builder.settings.parser import parser as build_parser
from earlytom.errors import UserError
from runtime import cli, trt
from tests.builder.doctor.machines import ABSENT, WITH_A_GPU, changed, without_gpu


def test_on_a_gpu_every_part_can_be_tried() -> None:
    parts = course(WITH_A_GPU, Path("work"))
    assert [part.name for part in parts if part.lacking] == ["run: onnxruntime, bf16"]


def test_the_course_has_what_the_readmes_call_unverified() -> None:
    names = [part.name for part in course(WITH_A_GPU, Path("work"))]
    assert len(names) == len(set(names))
    for flavour in trt.FLAVOURS:
        assert {f"{kind}: {flavour}, {mode}" for kind in ("build", "run") for mode in MODES} <= set(names)
    assert {f"run: tensorrt, {mode}" for mode in PLUGINS} <= set(names)
    for what in ("CUDA graph", "kernels on the GPU", "uploads", "resizing", "torch-tensorrt decoder", "at 7B", "peak"):
        assert any(what in name for name in names), what


def test_without_a_gpu_the_list_is_the_same_and_says_why() -> None:
    parts = course(without_gpu(), Path("work"))
    assert {part.name for part in course(WITH_A_GPU, Path("work")) if "(cuda)" not in part.name} <= {
        part.name for part in parts
    } | {"run: onnxruntime, bf16"}
    lacking = {part.name: part.lacking for part in parts if part.lacking}
    assert lacking["run: tensorrt-rtx, plain"] == "no NVIDIA GPU"
    assert lacking["build: tensorrt, plain"] == "tensorrt: not installed"
    assert lacking["benchmark at 7B"] == "no NVIDIA GPU"
    assert "build: tensorrt-rtx, chain" not in lacking
    assert "run: onnxruntime, chain" not in lacking


def test_without_any_flavour_graphs_are_built_for_onnx_runtime() -> None:
    parts = course(changed(without_gpu(), loaded={"tensorrt-rtx": ABSENT}), Path("work"))
    engines = {part.name: part.engine for part in parts if part.name.startswith("run: onnxruntime")}
    assert engines["run: onnxruntime, chunks"] == "build: onnx, chunks"
    assert {part.name for part in parts} >= set(engines.values())


@pytest.mark.parametrize("machine", [WITH_A_GPU, without_gpu()], ids=["gpu", "cpu"])
def test_parts_are_functions_that_take_their_arguments(machine: Machine) -> None:
    """What is built is what the builder's command line takes, and what is needed comes before."""
    seen: set[str] = set()
    for part in course(machine, Path("work")):
        module, name = part.target.split(":")
        code = getattr(importlib.import_module(module), name).__code__
        given = {*part.arguments, *(["folder"] if part.engine else [])}
        assert given <= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        assert not part.engine or part.engine in seen
        if name == "build":
            build_parser().parse_args([*part.arguments["words"], "--out", part.arguments["out"]])
        seen.add(part.name)


def test_a_part_is_chosen_with_the_engine_that_it_needs() -> None:
    parts = course(WITH_A_GPU, Path("work"))
    assert [part.name for part in only(parts, "Polygraphy")] == ["build: onnx, verified", "compare by Polygraphy"]
    assert only(parts, None) == parts
    with pytest.raises(UserError, match="no part is called that"):
        only(parts, "nonsense")


def tried(*outcomes: PartOutcome) -> list[Tried]:
    return [Tried(Part(f"part {n}", "a:b"), outcome) for n, outcome in enumerate(outcomes)]


def test_the_report_has_every_part() -> None:
    ends = (
        PartOutcome(OK, "", 1.0, {"encode_ms": 3.25}),
        PartOutcome(FAILED, "a | b", 2.0),
        PartOutcome(NOT_HERE, "no GPU"),
        PartOutcome(NOT_TRIED, "the time was up"),
        PartOutcome(NOT_HERE, "no GPU"),
    )
    result = record(without_gpu(), findings(without_gpu()), tried(*ends), build=True, ask=True)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["counts"] == {OK: 1, FAILED: 1, NOT_HERE: 2, NOT_TRIED: 1}
    page = markdown(result)
    assert "| part 0 | ok | 1.0 | encode_ms 3.25 |" in page
    assert "| part 1 | failed | 2.0 | a \\| b |" in page
    assert "## Not possible here\n\n* no GPU: part 2; part 4\n" in page
    assert "## Not tried\n\n* the time was up: part 3\n" in page
    assert "mend it: install NVIDIA's driver" in page


def run(monkeypatch: pytest.MonkeyPatch, machine: Machine, outcome: PartOutcome | None, *words: str) -> int:
    monkeypatch.setattr(doctor, "look", lambda place, work: machine)
    if outcome is not None:
        monkeypatch.setattr(doctor, "treat", lambda parts, work, **how: [Tried(part, outcome) for part in parts])
    return cli.run(doctor.main, list(words))


@pytest.mark.parametrize(
    ("machine", "outcome", "status"),
    [
        (WITH_A_GPU, None, 0),
        (without_gpu(), None, 0),
        (changed(missing=("av>=15",)), None, 1),
        (without_gpu(), PartOutcome(OK), 0),
        (without_gpu(), PartOutcome(NOT_HERE, "no GPU"), 0),
        (without_gpu(), PartOutcome(FAILED, "other tokens"), 1),
    ],
)
def test_the_exit_status(
    machine: Machine,
    outcome: PartOutcome | None,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    words = [] if outcome is None else ["--run", "--report", str(tmp_path / "report")]
    assert run(monkeypatch, machine, outcome, *words) == status
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert ("can work here" in printed) == result["build"]
    if outcome is not None:
        assert json.loads((tmp_path / "report" / "doctor.json").read_text()) == result
        assert (tmp_path / "report" / "doctor.md").read_text() == markdown(result)


def test_json_is_all_that_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, WITH_A_GPU, None, "--json") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_this_machine_is_looked_at_and_a_part_is_tried(tmp_path: Path, capsys: Any) -> None:
    """The real thing, of which the rest are stand-ins."""
    words = ["--run", "--only", "kernels in", "--report", str(tmp_path), "--out", str(tmp_path / "engines")]
    pytest.importorskip("triton")
    assert cli.run(doctor.main, words) == 0
    result = json.loads((tmp_path / "doctor.json").read_text())
    assert [part["status"] for part in result["parts"]] == [OK]
    assert result["parts"][0]["figures"]["select_tokens"] == "equal"
    assert capsys.readouterr().out.count("\nok: kernels") == 1


def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["numpy>=9999", "numpy>=1", "there-is-none>=1", 'fastapi>=9999; extra == "serve"']
    monkeypatch.setattr(machines.metadata, "requires", lambda name: asked)
    have = machines.metadata.version("numpy")
    assert machines._missing() == [f"numpy>=9999 (here: {have})", "there-is-none>=1"]
