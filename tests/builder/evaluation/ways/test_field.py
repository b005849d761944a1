"""The one table: of a run, of a record with times of another run, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from builder import evaluate
from builder.evaluation import arguments, record, run
from builder.evaluation.results import Comparison, Result
from builder.evaluation.timing import Times
from builder.evaluation.ways.claims import CLAIMS
from builder.evaluation.ways.compared import ways
from builder.evaluation.ways.field import field_table, of_the_field, timed_rows, with_times
from earlytom import micro
from earlytom.errors import UserError
from runtime import cli

WORDS = (
    "--clips 2 --workers 1 --text-clips 0 --timed-clips 1 --ratios 0.1 --methods cells-rounds budget visionzip dycoke"
)


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of each row by its method."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {cells[0]: cells for cells in lines if cells[0] not in ("method", "---")}


def test_the_table_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason='matplotlib is not installed (pip install ".[plot]")')
    table, picture, figures = (tmp_path / name for name in ("t.md", "t.png", "f.json"))
    words = ["--methods", "cells-rounds", "budget", "visionzip", "dycoke"]
    words += ["--table", str(table), "--table-plot", str(picture), "--json", str(figures)]
    assert cli.run(evaluate.main, [*WORDS.split(), *words]) == 0
    whole = json.loads(figures.read_text())
    rows = rows_of(table.read_text(encoding="utf-8"))
    assert list(rows) == ["full tokens", "DyCoke merging, 0.475", "cells, 7 rounds", "EarlyTom budget", "VisionZip"]
    result = next(row for row in whole["results"] if row["method"] == "visionzip")
    pair = next(row for row in whole["comparisons"] if (row["name"], row["to"]) == ("cells-rounds", "visionzip"))
    cells = rows["VisionZip"]
    assert cells[1] == "48"
    assert cells[3].endswith(f"= {result['vision_ms'] + result['prefill_ms']:.1f}")
    assert 0 <= result["compression_ms"] < result["vision_ms"]
    assert cells[6].startswith(f"{100 * pair['difference'][0]:+.1f} [")
    assert cells[8].strip() == CLAIMS["visionzip"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert "the field, on the same clips" in capsys.readouterr().out


def test_times_alone_become_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "training.json", "model.safetensors"):
        shutil.copy(micro.PATH / name, tmp_path)
    whole = record.read()
    path = tmp_path / "accuracy.json"
    record.write(path, whole)
    monkeypatch.setattr(record, "PATH", path)
    monkeypatch.setattr(record.read, "__defaults__", (path,))
    table = tmp_path / "t.md"
    words = f"--only-times --timed-clips 1 --ratios 0.1 --methods budget random --record --table {table}"
    assert cli.run(evaluate.main, words.split()) == 0
    found = record.read(path)
    assert found["results"] == whole["results"]
    assert [(row["method"], row["ratio"]) for row in found["times"]["rows"]] == [
        ("full", None),
        ("budget", 0.1),
        ("random", 0.1),
    ]
    _, _, own = table.read_text(encoding="utf-8").partition("## Ratio 0.1,")
    rows = rows_of(own.partition("## ")[0])
    assert " = " in rows["random tokens"][3]
    assert " = " not in rows["global top-k by attention"][3]  # times of other runs are not beside these


def result(name: str, group: str, ratio: float | None, tokens: float) -> Result:
    triple: Any = [0.5, 0.4, 0.6]
    return Result.from_dict(
        {
            "method": name,
            "title": name,
            "group": group,
            "ratio": ratio,
            "accuracy": triple,
            "relative": triple,
            "kinds": {},
            "tokens": tokens,
            "frames": 1.0,
            "vision_flops": 2.0,
            "prefill_flops": tokens,
            "vision_ms": 9.0,
            "prefill_ms": 9.0,
        }
    )


def test_ratios_and_groups_of_the_table() -> None:
    found = [
        result("full", "reference", None, 400),
        result("random", "controls", 0.1, 42),
        result("fastv", "compared", 0.1, 400),
        result("budget", "earlytom", 0.15, 63),
        result("budget", "earlytom", 0.05, 21),
        result("merging", "parts", None, 175),
    ]
    assert [(one.name, one.ratio) for one in of_the_field(found)] == [
        ("full", None),
        ("budget", 0.05),
        ("fastv", 0.1),
        ("random", 0.1),
    ]
    pairs = [
        Comparison.from_dict(
            {"name": "budget", "ratio": 0.1, "to": "fastv", "to_ratio": 0.1, "difference": [-0.1, -0.2, 0], "p": 1}
        )
    ]
    timed = with_times(found, timed_rows([("fastv", 0.1)], [Times(30.0, 12.0, 2.0)]))
    table = field_table(timed, pairs)
    assert [line for line in table.splitlines() if line.startswith("## ")] == [
        "## At a ratio of their own",
        "## Ratio 0.05, 20 tokens",
        "## Ratio 0.1, 40 tokens",
    ]
    cells = rows_of(table)["fastv"]
    assert cells[1:4] == ["400", "100, 100", "28.0 + 2.0 + 12.0 = 42.0"]
    assert cells[6:] == ["", "-10.0 [-20.0, +0.0]", CLAIMS["fastv"]]
    assert rows_of(table)["random"][3] == ""


def test_claims_are_of_rows() -> None:
    assert CLAIMS.keys() <= ways(8, 4).keys() | {"budget"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only-times", "--timed-clips", "0"], "--only-times needs clips to measure on"),
        (["--only-times", "--table", "t.md"], "--table and --table-plot need accuracies"),
        (["--table", "no/such/folder/t.md"], "its folder does not exist"),
        (["--record", "--faithful"], "--record is for the test split"),
        (["--methods", "bvllm"], "--methods bvllm: it needs two Q-Formers"),
    ],
)
def test_what_makes_no_sense(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(evaluate.main, words) == 2
    assert said in capsys.readouterr().err


def test_the_released_forms_are_in_no_record() -> None:
    asked = arguments.read(["--faithful", "--methods", "compared"])
    with pytest.raises(UserError, match="--faithful"):
        run.checked(arguments.read(["--faithful", "--record"]), run.describe(None))
    assert run.checked(asked, run.describe(None)).faithful
