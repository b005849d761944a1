"""`python -m builder.evaluate` on a few clips, from the command line to its files; and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from builder import evaluate
from builder.evaluation import bench as bench_module
from builder.evaluation import engine as engine_module
from builder.evaluation import record, run
from builder.evaluation.bench import EvaluationBench, EvaluationJob
from builder.evaluation.blind import questions_of
from builder.evaluation.engine import TWIN, built_engine, check_engine
from builder.evaluation.ways.row import Row
from builder.settings import arguments as build_arguments
from builder.settings.config import BuildConfig
from earlytom.budget import token_count
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.families.qwen3_vl import Qwen3Vl
from earlytom.micro.data import KINDS
from runtime import cli
from runtime.checkpoint import describe
from runtime.errors import EngineError
from tests.builder.evaluation.test_methods import BASE

Command = Callable[..., tuple[int, str, str]]
SMALL = ["--clips", "3", "--workers", "1", "--timed-clips", "1", "--text-clips", "40"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: status, stdout, stderr."""

    def start(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run(evaluate.main, list(words))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return start


def last_line(stdout: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return found


# The command


def test_the_whole_command(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='matplotlib is not installed (pip install ".[plot]")')
    figures, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    words = ["--methods", "earlytom", "cells-rounds", "controls", "merging", "budgets", "--ratios", "0.1", "0.25"]
    words += ["--budgets", "1,3:8,4"]
    status, stdout, stderr = command(*SMALL, *words, "--json", str(figures), "--plot", str(picture))
    assert (status, stderr) == (0, "")
    whole = json.loads(figures.read_text())
    asked = sum(len(questions_of("test", index, 0)) for index in range(3))
    assert (whole["clips"], whole["questions"], whole["split"], whole["seed"]) == (3, asked, "test", 0)
    assert whole["weights"] == record.weights_digest()
    assert EarlyTomConfig.from_dict(whole["settings"]).merge_layers == (2, 4, 6)
    settings = {(result["method"], result["ratio"]) for result in whole["results"]}
    names = ("budget", "adaptive", "budget-bias", "cells-rounds")
    names += ("random", "frames", "top-k", "pooling", "pooling-space")
    merged = {("cells@1,3:8,4", 0.1), ("budget@1,3:8,4", 0.1)}
    ratios = {(name, ratio) for name in names for ratio in (0.1, 0.25)}
    assert settings == {("full", None), ("merging", None), *merged, *ratios}
    for result in whole["results"]:
        value, low, high = result["accuracy"]
        assert 0 <= low <= value <= high <= 1
        assert set(result["kinds"]) == set(KINDS)
        assert result["vision_ms"] > 0
        assert result["prefill_ms"] > 0
    budget = next(result for result in whole["results"] if (result["method"], result["ratio"]) == ("budget", 0.1))
    assert budget["tokens"] == token_count(16, 25, 0.1) == 42
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    line = last_line(stdout)
    assert line["budget"]["accuracy"] == pytest.approx(budget["accuracy"], abs=1e-6)
    assert line["cells"]["method"] == "cells-rounds"
    assert (line["clips"], line["ratio"], line["engine"]) == (3, 0.1, None)
    for shown in (
        "EarlyTom budget",
        "uniform frame dropping",
        "no video",
        "on the same clips",
        "direction",
        "cells, 7 rounds at 0.1",
        "cells, 1,3:8,4",
        "against EarlyTom",
        str(picture),
    ):
        assert shown in stdout
    assert [line[:1] for line in stdout.splitlines()].count("{") == 1  # one JSON line


def test_json_alone_is_one_line(command: Command) -> None:
    status, stdout, stderr = command(*SMALL, "--methods", "full", "--timed-clips", "0", "--text-clips", "0", "--json")
    assert (status, stderr) == (0, "")
    assert stdout.count("\n") == 1
    line = last_line(stdout)
    assert line["ratio"] is None
    assert line["full"]["tokens"] == 400
    assert "budget" not in line


def test_settings_come_from_the_options(command: Command, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    words = (
        "--clips 1 --workers 1 --timed-clips 0 --text-clips 0 --methods budget --ratios 0.2 --split validation --seed 5"
    )
    changed = "--tau 0.5 --merge-layers 1,3 --frame-budget 12,6 --power 2 --rounds 5 --bias --positions consecutive"
    assert command(*words.split(), *changed.split(), "--json", str(figures))[0] == 0
    whole = json.loads(figures.read_text())
    config = EarlyTomConfig.from_dict(whole["settings"])
    assert (config.tau, config.merge_layers, config.frame_budget) == (0.5, (1, 3), (12, 6))
    cells = CellsConfig.from_dict(whole["cells"])
    assert cells == CellsConfig(merge_layers=(1, 3), frame_budget=(12, 6), power=2.0, rounds=5)
    assert whole["told"] == {"bias": True, "positions": "consecutive"}
    assert (whole["split"], whole["seed"], whole["no_video"]) == ("validation", 5, None)
    assert whole["questions"] == len(questions_of("validation", 0, 5))
    budget = next(result for result in whole["results"] if result["method"] == "budget")
    assert (budget["frames"], budget["tokens"]) == (6, token_count(16, 25, 0.2, frames_out=6))
    assert budget["vision_ms"] is None


def test_the_help_text_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for word in ("--engine", "controls", "validation", "examples:", "--record"):
        assert word in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clips", "0"], "--clips must be at least 1, got 0"),
        (["--clips", "many"], "--clips"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--timed-clips", "-1"], "--timed-clips must be at least 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--methods", "magic"], "no method named 'magic'"),
        (["--ratios", "0"], "--ratios must be in (0, 1], got 0.0"),
        (["--ratios", "0.1", "1.5"], "--ratios must be in (0, 1], got 1.5"),
        (["--ratios", "nan"], "--ratios must be in (0, 1], got nan"),
        (["--tau", "7"], "tau must be in [-1, 1]"),
        (["--merge-layers", "2,x"], "--merge-layers '2,x': give layer numbers"),
        (["--merge-layers", "2,40"], "merge layer 40 does not exist"),
        (["--frame-budget", "2"], "frame_budget names 1 frame counts for 3 merge layers"),
        (["--frame-budget", "1.5"], "frame_budget must be in (0, 1]"),
        (["--frame-budget", "12,8"], "frame_budget names 2 frame counts for 3 merge layers"),
        (["--frame-budget", "20,8,8"], "frame budget 20 at merge 1 is more than the 16 frames"),
        (["--power", "-1"], "power must be in [0, 64]"),
        (["--rounds", "0"], "rounds must be "),
        (["--rounds", "greedy"], "--rounds greedy is a way of its own: leave it out, and measure cells-greedy"),
        (["--threshold", "4"], "threshold must be in [0, 3]"),
        (["--positions", "anywhere"], "--positions"),
        (["--budgets", "2,4,6"], "--budgets '2,4,6': give merge layers and frames such as"),
        (["--budgets", "2,4:8"], "frame_budget names 1 frame counts for 2 merge layers"),
        (["--budgets", "2,4:20,8"], "frame budget 20 at merge 1 is more than the 16 frames"),
        (["--frames", "32", "--budgets", "2,4:40,8"], "frame budget 40 at merge 1 is more than the 32 frames"),
        (["--frames", "32", "--frame-budget", "40,8,4"], "frame budget 40 at merge 1 is more than the 32 frames"),
        (["--frames", "8"], "--frames must be "),
        (["--frames", "99999999999999999999"], "--frames must be a whole number between 16 and 128"),
        (["--frames", "32", "--record"], "--frames 32 goes without --engine and --record"),
        (["--budgets", "2,40:8,4"], "merge layer 40 does not exist"),
        (["--frame-budget", "much"], "--frame-budget 'much': give a share"),
        (["--split", "train"], "--split"),
        (["--model", "random:llava-onevision-qwen2-0.5b-ov"], "frames of 384 x 384, and the task's clips are 72 x 72"),
        (
            ["--model", "random:llava-next-video-7b"],
            "clips are 72 x 72; use the bundled model or one trained with python -m builder.micro.train, or see what "
            "methods keep with --coverage VIDEO",
        ),
        (
            ["--model", "random:internvl3-1b"],
            "--model random:internvl3-1b: the task's questions are packed for one span of visual tokens a video, and "
            "InternVL has one a frame; use the bundled model, or see what methods keep with --coverage VIDEO",
        ),
        (["--model", "random:smolvlm2-500m"], "SmolVLM2 has one a frame; use the bundled model, or see"),
        (["--model", "nowhere/at/all"], "--model nowhere/at/all: no such folder"),
        (["--json", "no/such/folder/a.json"], "its folder does not exist"),
        (["--plot", "."], "it is a folder"),
        (["--json", "/dev/null"], "it is a device or a pipe"),
        (["--engine", "no/such/engine"], "no/such/engine"),
        (["--record", "--clips", "10"], "--record is for the "),
        (["--record", "--model", "nowhere/at/all"], "no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    """And is noticed before the model is loaded."""

    def load(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run, "EvaluationBench", load)
    status, _, stderr = command(*words)
    assert status == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert said in stderr


def test_positions_on_axes_are_refused_in_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a family with one span a video, too."""
    monkeypatch.setattr(Qwen3Vl, "span_a_frame", False)
    status, _, stderr = command("--model", "random:qwen3-vl-2b")
    assert (status, stderr.count("\n")) == (2, 1)
    assert "of visual tokens a video, and Qwen3-VL places its tokens by time, row and column; use the" in stderr


def test_a_plot_without_matplotlib(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, stderr = command(*SMALL, "--plot", str(tmp_path / "plot.png"))
    assert status == 2
    assert 'pip install "earlytom-engine-builder[plot]"' in stderr


# Engines


def test_an_engine_answers_as_its_twin(command: Command, build_engine: Callable[..., Path], tmp_path: Path) -> None:
    folder = build_engine("--ratio", "0.3", "--fp32")
    words = [*SMALL, "--methods", "full", "--text-clips", "0", "--engine", str(folder)]
    status, stdout, stderr = command(*words, "--json", str(tmp_path / "figures.json"))
    assert (status, stderr) == (0, "")
    assert "questions answered differently than in PyTorch" in stdout
    engine = last_line(stdout)["engine"]
    assert (engine["answered_differently"], engine["within_gate"], engine["dtype"]) == (0, True, "fp32")
    assert engine["name"] == folder.name
    both = [
        result
        for result in json.loads((tmp_path / "figures.json").read_text())["results"]
        if result["group"] == "engine"
    ]
    assert [result["tokens"] for result in both] == [126, 126]
    assert both[0]["accuracy"] == both[1]["accuracy"]


def test_an_engine_that_answers_otherwise_is_noticed(
    command: Command, build_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: tokens turned round."""
    folder = build_engine("--ratio", "0.3", "--fp32")
    real = bench_module.engine_methods

    def turned(folder: str) -> list[Row]:
        engine, twin = real(folder)

        def visual(clip: Any, ratio: float) -> Any:
            seen = engine.visual(clip, ratio)
            return replace(seen, tokens=-2 * seen.tokens.flip(0))

        return [replace(engine, visual=visual), twin]

    monkeypatch.setattr(bench_module, "engine_methods", turned)
    words = [*SMALL, "--methods", "full", "--text-clips", "0", "--timed-clips", "0"]
    status, stdout, _ = command(*words, "--engine", str(folder))
    assert status == 0
    engine = last_line(stdout)["engine"]
    assert engine["answered_differently"] > 0
    assert engine["within_gate"] is False
    assert "FAILED" in stdout


def test_engines_that_cannot_be_measured(engine: Path) -> None:
    """One of another model, with another number of frames."""
    with pytest.raises(EngineError, match="built from other weights"):
        check_engine(engine, describe(None))
    source = json.loads((engine / "manifest.json").read_text())["model"]["source"]
    with pytest.raises(EngineError, match="takes 12 frames and the task's clips have 16"):
        check_engine(engine, describe(source))


@pytest.mark.parametrize("budget", [0.5, (12, 8, 4)])
def test_an_engine_is_built_for_the_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budget: float | tuple[int, ...]
) -> None:
    asked: list[tuple[BuildConfig, Path]] = []
    monkeypatch.setattr(engine_module, "build_engine", lambda config, out, say: asked.append((config, out)) or out)
    config = EarlyTomConfig(merge_layers=(1, 3, 5), tau=0.6, frame_budget=budget)
    assert built_engine("micro", config, 0.15, tmp_path) == tmp_path
    ((wanted, out),) = asked
    assert out == tmp_path
    assert wanted.earlytom == config.replace(retention_ratio=0.15, schedule="budget")
    listed = str(budget) if isinstance(budget, float) else ",".join(map(str, budget))
    words = ["--ratio", "0.15", "--fp16", "--backend", "onnx", "--frames", "16", "--tau", "0.6"]
    words += ["--merge-layers", "1,3,5", "--frame-budget", listed]
    assert wanted.key() == build_arguments.parse(words)[1].key()  # the command's own engine is found


def test_the_twin_has_the_engines_settings(build_engine: Callable[..., Path]) -> None:
    folder = build_engine("--ratio", "0.3", "--fp32")
    bench = EvaluationBench(
        EvaluationJob("micro", BASE.replace(merge_layers=(1, 3, 5)), ("full",), (0.1,), engine=str(folder))
    )
    clip, _ = bench.clip(0)
    seen = {one.method.name: one.visual(clip) for one in bench.settings}
    torch.testing.assert_close(seen["engine"].tokens, seen[TWIN].tokens, rtol=1e-3, atol=1e-3)
    assert seen["engine"].merge_layers == seen[TWIN].merge_layers == (2, 4, 6)
    assert seen["engine"].stages == seen[TWIN].stages == (16, 12, 9, 7)
