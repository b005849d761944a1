"""`python -m builder.evaluate` on a few clips, from the command line to its files; and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builder import arguments as build_arguments
from builder import build, evaluate
from builder.evaluation import bench as bench_module
from builder.evaluation import record, report
from builder.evaluation.bench import Answers, Bench, Job, run
from builder.evaluation.blind import Blind, questions_of
from builder.evaluation.engine import TWIN, build_engine, check_engine
from builder.evaluation.methods import Method
from builder.evaluation.results import Result, comparisons, results
from builder.evaluation.timing import Prefill
from earlytom import flops, micro
from earlytom.budget import token_count
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.micro.data import KINDS, Question, labelled_clip
from runtime import cli
from runtime.checkpoint import describe
from runtime.errors import EngineError

from .test_evaluate_methods import BASE

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


@pytest.fixture(scope="module")
def answered() -> tuple[Bench, Answers]:
    """Three clips in a few settings."""
    bench = Bench(Job("micro", BASE, ("budget", "merging", "adaptive", "frames"), (0.1, 0.5)))
    return bench, bench.measure(range(3))


def last_line(stdout: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return found


# The command


def test_the_whole_command(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='matplotlib is not installed (pip install ".[plot]")')
    figures, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    words = ["--methods", "earlytom", "controls", "merging", "--ratios", "0.1", "0.25"]
    status, stdout, stderr = command(*SMALL, *words, "--json", str(figures), "--plot", str(picture))
    assert (status, stderr) == (0, "")
    whole = json.loads(figures.read_text())
    asked = sum(len(questions_of("test", index, 0)) for index in range(3))
    assert (whole["clips"], whole["questions"], whole["split"], whole["seed"]) == (3, asked, "test", 0)
    assert whole["weights"] == record.weights_digest()
    assert EarlyTomConfig.from_dict(whole["settings"]).merge_layers == (2, 4, 6)
    settings = {(result["method"], result["ratio"]) for result in whole["results"]}
    names = ("budget", "adaptive", "random", "frames", "top-k", "pooling", "pooling-space")
    assert settings == {("full", None), ("merging", None), *((name, ratio) for name in names for ratio in (0.1, 0.25))}
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
    assert (line["clips"], line["ratio"], line["engine"]) == (3, 0.1, None)
    for shown in (
        "EarlyTom budget",
        "uniform frame dropping",
        "no video",
        "on the same clips",
        "direction",
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
    changed = "--tau 0.5 --merge-layers 1,3 --frame-budget 12,6"
    assert command(*words.split(), *changed.split(), "--json", str(figures))[0] == 0
    whole = json.loads(figures.read_text())
    config = EarlyTomConfig.from_dict(whole["settings"])
    assert (config.tau, config.merge_layers, config.frame_budget) == (0.5, (1, 3), (12, 6))
    assert (whole["split"], whole["seed"], whole["no_video"]) == ("validation", 5, None)
    assert whole["questions"] == len(questions_of("validation", 0, 5))
    budget = next(result for result in whole["results"] if result["method"] == "budget")
    assert (budget["frames"], budget["tokens"]) == (6, token_count(16, 25, 0.2, frames_out=6))
    assert budget["vision_ms"] is None


def test_the_help_text_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.parser().parse_args(["--help"])
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
        (["--frame-budget", "2"], "frame_budget must be in (0, 1]"),
        (["--frame-budget", "12,8"], "frame_budget names 2 frame counts for 3 merge layers"),
        (["--frame-budget", "20,8,8"], "frame budget 20 at merge 1 is more than the 16 frames"),
        (["--frame-budget", "much"], "--frame-budget 'much': give a share"),
        (["--split", "train"], "--split"),
        (["--model", "random:llava-onevision-qwen2-0.5b-ov"], "frames of 384 x 384, and the task's clips are 72 x 72"),
        (["--model", "nowhere/at/all"], "--model nowhere/at/all: no such folder"),
        (["--json", "no/such/folder/a.json"], "its folder does not exist"),
        (["--plot", "."], "it is a folder"),
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

    monkeypatch.setattr(evaluate, "Bench", load)
    status, _, stderr = command(*words)
    assert status == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert said in stderr


def test_a_plot_without_matplotlib(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, stderr = command(*SMALL, "--plot", str(tmp_path / "plot.png"))
    assert status == 2
    assert 'pip install "earlytom-engine-builder[plot]"' in stderr


# Measurement


def test_equal_settings_are_asked_once(answered: tuple[Bench, Answers], monkeypatch: pytest.MonkeyPatch) -> None:
    """At ratio 0.5 the budget schedule keeps every token of its frames."""
    bench, answers = answered
    rows = {(one.method.name, one.ratio): row for row, one in enumerate(bench.settings)}
    assert (answers.right[rows["budget", 0.5]] == answers.right[rows["merging", None]]).all()
    asked: list[int] = []
    real = bench.scorer.score

    def score(visual: Any, packs: Any) -> Any:
        asked.append(len(visual))
        return real(visual, packs)

    monkeypatch.setattr(bench.scorer, "score", score)
    again = bench.measure(range(3))
    assert len(bench.settings) - 2 <= len(asked) < len(bench.settings)
    assert (again.right == answers.right).all()


def test_every_question_is_asked_of_its_clip(answered: tuple[Bench, Answers]) -> None:
    _, answers = answered
    kinds = [[question.kind for question in labelled_clip("test", index).questions] for index in range(3)]
    assert [list(KINDS)[kind] for kind in answers.kind] == [kind for row in kinds for kind in row]
    assert answers.asked().tolist() == [len(row) for row in kinds]
    assert answers.asked(0).tolist() == [row.count("colour") for row in kinds]
    assert (answers.correct(0) <= answers.asked()).all()


def test_costs_are_those_of_the_shapes(answered: tuple[Bench, Answers]) -> None:
    bench, answers = answered
    config: Any = bench.checkpoint.config
    rows = {(one.method.name, one.ratio): row for row, one in enumerate(bench.settings)}
    for name, ratio, stages, layers, tokens in (
        ("full", None, (16,), (), 400),
        ("budget", 0.1, (16, 12, 9, 7), (2, 4, 6), 42),
        ("frames", 0.1, (2,), (), 50),
    ):
        row = rows[name, ratio]
        wanted = flops.vision_encoder(config.vision_config, stages, layers, 8) + flops.projector(config, stages[-1])
        assert answers.vision[row].tolist() == [wanted] * 3
        assert answers.prefill[row].tolist() == [flops.prefill(config.text_config, tokens)] * 3
        assert answers.tokens[row].tolist() == [tokens] * 3
        assert answers.frames[row].tolist() == [stages[-1]] * 3


def test_clips_may_be_spread_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever portions, the answers are the same, in the same order."""
    job = Job("micro", BASE, ("random",), (0.1,), "validation", 1)
    whole = Bench(job).measure(range(5))
    monkeypatch.setattr(bench_module, "CLIPS_AT_ONCE", 2)
    for workers in (1, 2):
        done: list[int] = []
        spread = run(job, 5, workers, done.append)
        assert done == [2, 4, 5]
        for name in Answers.__dataclass_fields__:
            assert np.array_equal(getattr(spread, name), getattr(whole, name)), (workers, name)


def test_the_decoders_first_token_is_the_scorers(answered: tuple[Bench, Answers]) -> None:
    """The prefill that is timed is the one that is scored."""
    bench, _ = answered
    clip, known = bench.clip(0)
    questions = known.questions
    tokens = bench.settings[0].visual(clip).tokens
    prefill = Prefill(bench.model, bench.tokenizer)
    (outcomes,) = bench.scorer.score([tokens], [bench.scorer.pack(questions)])
    assert [prefill(tokens, question.text) for question in questions] == [outcome.said[0] for outcome in outcomes]


def test_guessing_without_video() -> None:
    blind = Blind(300, 0)
    learned = [question for index in range(300) for question in questions_of("train", index, 0)]
    share = blind.right(learned).mean()
    assert 0.25 < share < 0.75  # it has seen these
    counts = {answer: sum(q.answer == answer for q in learned if q.text == "What color is the dot?") for answer in "ab"}
    assert not any(counts.values())  # no such colours
    for text in ("What color is the dot?", "How many shapes appeared?"):
        answers = [question.answer for question in learned if question.text == text]
        guessed = blind.answer(Question("dot", text, ""))
        assert answers.count(guessed) == max(map(answers.count, answers))
    assert blind.answer(Question("dot", "never asked?", "")) in {q.answer for q in learned if q.kind == "dot"}
    assert blind.answer(Question("no such kind", "never asked?", "")) == ""


# Figures


def fake(right: list[list[bool]], clips: list[int]) -> Answers:
    """Answers of settings that were right as given, about questions that belong to these clips."""
    rows, total = len(right), max(clips) + 1
    ones = np.ones((rows, total), np.int64)
    kind = np.arange(len(clips)) % len(KINDS)
    nothing = np.zeros(0, np.bool_)
    return Answers(np.array(clips), kind, np.array(right), nothing, ones, ones, ones, ones, np.full(total, 0.5))


def test_figures_and_comparisons(answered: tuple[Bench, Answers]) -> None:
    settings = [one for one in answered[0].settings if one.ratio in (None, 0.1)]
    names = [one.method.name for one in settings]
    assert names == ["full", "budget", "adaptive", "merging", "frames"]
    clips = [clip for clip in range(40) for _ in range(5)]
    full = [True] * 190 + [False] * 10
    worse = [place % 5 != 0 for place in range(200)]
    answers = fake([full, full, worse, full, worse], clips)
    found = {result.name: result for result in results(answers, settings, None)}
    assert found["full"].accuracy.value == pytest.approx(0.95)
    assert found["budget"].relative is not None
    assert found["budget"].relative.value == 1
    assert found["adaptive"].accuracy.value == pytest.approx(0.8)
    pairs = {(one.name, one.to): one for one in comparisons(answers, settings, 0)}
    assert set(pairs) == {
        *((name, "full") for name in names[1:]),
        ("budget", "adaptive"),
        ("budget", "frames"),
        ("adaptive", "frames"),
    }
    assert (pairs["budget", "full"].difference.value, pairs["budget", "full"].p) == (0, 1)
    assert pairs["budget", "frames"].difference.value == pytest.approx(0.15)
    assert pairs["budget", "frames"].difference.low > 0
    assert pairs["budget", "frames"].p < 0.001
    assert pairs["adaptive", "frames"].p == 1


def test_the_ratio_of_the_short_tables() -> None:
    def at(*ratios: float | None) -> list[Result]:
        return [Result("budget", "", "earlytom", ratio, *[None] * 8) for ratio in ratios]  # type: ignore[arg-type]

    assert report.main_ratio(at(0.05, 0.1, 0.5, None)) == 0.1
    assert report.main_ratio(at(0.3, 0.25)) == 0.25
    assert report.main_ratio(at(None)) is None


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

    def turned(folder: str) -> list[Method]:
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
    asked: list[list[str]] = []

    def main(words: list[str]) -> int:
        asked.append(words)
        print("a stage\n" if "--json" not in words else json.dumps({"folder": str(tmp_path / "made")}))
        return 0

    monkeypatch.setattr(build, "main", main)
    config = EarlyTomConfig(merge_layers=(1, 3, 5), tau=0.6, frame_budget=budget)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert build_engine("micro", config, 0.15, tmp_path) == tmp_path / "made"
    assert printed.getvalue() == ""
    options, wanted, _ = build_arguments.parse(asked[0])
    assert wanted.earlytom == config.replace(retention_ratio=0.15, schedule="budget")
    assert (wanted.frames, wanted.dtype, wanted.backend) == (16, "fp16", "onnx")
    assert (options.out, options.verify) == (tmp_path, True)


def test_the_twin_has_the_engines_settings(build_engine: Callable[..., Path]) -> None:
    folder = build_engine("--ratio", "0.3", "--fp32")
    bench = Bench(Job("micro", BASE.replace(merge_layers=(1, 3, 5)), ("full",), (0.1,), engine=str(folder)))
    clip, _ = bench.clip(0)
    seen = {one.method.name: one.visual(clip) for one in bench.settings}
    torch.testing.assert_close(seen["engine"].tokens, seen[TWIN].tokens, rtol=1e-3, atol=1e-3)
    assert seen["engine"].merge_layers == seen[TWIN].merge_layers == (2, 4, 6)
    assert seen["engine"].stages == seen[TWIN].stages == (16, 12, 9, 7)


# The record


def test_a_record_is_of_the_whole_table_of_the_trained_model() -> None:
    trained = replace(describe(None), trained=True)
    whole: dict[str, Any] = {"split": "test", "seed": 0, "clips": record.CLIPS, "whole": True}
    record.check_recordable(trained, **whole)
    with pytest.raises(UserError, match="not trained"):
        record.check_recordable(replace(trained, trained=False), **whole)
    with pytest.raises(UserError, match="those of elsewhere"):
        record.check_recordable(replace(trained, source="elsewhere"), **whole)
    for change in ({"split": "validation"}, {"seed": 1}, {"clips": record.CLIPS - 1}, {"whole": False}):
        with pytest.raises(UserError, match="whole table"):
            record.check_recordable(trained, **(whole | change))


def test_a_record_can_be_read_again_and_compared_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    whole: dict[str, Any] = {
        "weights": "w",
        "none": None,
        "results": [{"a": [1 / 3, 2]}, {"b": {"c": "é"}}],
        "empty": [],
    }
    record.write(path, whole)
    assert json.loads(path.read_text()) == whole | {"results": [{"a": [0.333333, 2]}, {"b": {"c": "é"}}]}
    assert len(path.read_text().splitlines()) == 9
    for bad in (float("nan"), [float("inf")]):
        with pytest.raises(ValueError, match="not JSON compliant"):
            record.write(path, {"value": bad})
    assert json.loads(path.read_text())["weights"] == "w"


def test_a_record_of_other_weights_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((micro.PATH / "model.safetensors").read_bytes())
    path = tmp_path / "accuracy.json"
    with pytest.raises(UserError, match=r"builder.evaluate --record"):
        record.read(path)
    record.write(path, {"weights": record.weights_digest()})
    assert record.read(path) == {"weights": record.weights_digest()}
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="record of other weights"):
        record.read(path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        record.read(path)
