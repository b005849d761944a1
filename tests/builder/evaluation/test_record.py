"""The record of the bundled model's accuracy: what may be one, how it is written and read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.evaluation import arguments, record, run
from builder.evaluation.results import Result
from earlytom import micro
from earlytom.errors import UserError
from runtime import cli
from runtime.checkpoint import describe


def test_a_record_is_of_the_whole_table_of_the_trained_model() -> None:
    trained = replace(describe(None), trained=True)
    whole: dict[str, Any] = {"split": "test", "seed": 0, "clips": record.CLIPS, "whole": True}
    record.check_recordable(trained, **whole)
    with pytest.raises(UserError, match="not trained"):
        record.check_recordable(replace(trained, trained=False), **whole)
    with pytest.raises(UserError, match="those of elsewhere"):
        record.check_recordable(replace(trained, source="elsewhere"), **whole)
    for change in ({"split": "validation"}, {"seed": 1}, {"clips": record.CLIPS - 1}, {"overruled": True}):
        with pytest.raises(UserError, match="is for the test split with seed 0"):
            record.check_recordable(trained, **(whole | change))


def test_a_part_of_the_table_is_for_a_record_of_the_same_clips() -> None:
    recorded = record.read()["clips"]
    part: dict[str, Any] = {"split": "test", "seed": 0, "clips": recorded, "whole": False}
    record.check_recordable(describe(None), **part)
    with pytest.raises(UserError, match=f"which is of {recorded} clips"):
        record.check_recordable(describe(None), **(part | {"clips": recorded + 1}))


def table(**changes: Any) -> dict[str, Any]:
    """A record of the full tokens, and one row at a ratio."""
    full = {"method": "full", "ratio": None, "accuracy": [0.98, 0.97, 0.99]}
    row = {"method": "budget", "ratio": 0.1, "accuracy": [0.8, 0.7, 0.9]}
    pair = {"name": "budget", "ratio": 0.1, "to": "full", "to_ratio": None, "p": 0.5}
    plain = {"weights": "w", "split": "test", "seed": 0, "clips": 3, "questions": 20, "settings": {"tau": 0.8}}
    rows = {"ratios": [0.1], "results": [full, row], "comparisons": [pair], "no_video": {"accuracy": [0.2]}}
    return plain | rows | changes


def test_rows_are_put_into_a_record() -> None:
    """In their place or behind; what was not measured again stays."""
    old = table()
    full = old["results"][0] | {"accuracy": [0.9800000001, 0.97, 0.99]}  # as it was, but for what is not written
    again, other = {"method": "budget", "ratio": 0.1, "x": 1}, {"method": "cells-rounds", "ratio": 0.05}
    pair = {"name": "budget", "ratio": 0.1, "to": "full", "to_ratio": None, "p": 0.25}
    more = pair | {"name": "cells-rounds"}
    new = table(
        ratios=[0.05, 0.1], results=[full, again, other], comparisons=[more, pair], no_video=None, cells={"power": 4}
    )
    found = record.joined(old, new)
    assert found["results"] == [old["results"][0], again, other]
    assert found["comparisons"] == [pair, more]
    assert (found["ratios"], found["no_video"], found["cells"]) == ([0.05, 0.1], old["no_video"], {"power": 4})
    assert old == table()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": "v"}, "weights is v, and w in the record"),
        ({"clips": 4}, "clips is 4, and 3 in the record"),
        ({"settings": {"tau": 0.7}}, "settings is"),
        (
            {"results": [{"method": "full", "ratio": None, "accuracy": [0.97, 0.96, 0.98]}]},
            r"the full tokens were 97\.00 % right, and are 98\.00 % in the record",
        ),
    ],
)
def test_rows_of_another_measurement_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        record.joined(table(), table(**changes))


def test_results_can_be_read_from_a_record() -> None:
    for row in record.read()["results"]:
        assert json.loads(json.dumps(Result.from_dict(row).to_dict())) == row


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


def test_the_card_shows_a_new_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "training.json", "model.safetensors"):
        shutil.copy(micro.PATH / name, tmp_path)
    whole = record.read()
    (full,) = (one for one in whole["results"] if one["method"] == "full")
    full["accuracy"][0] = 0.123
    monkeypatch.setattr(record, "PATH", tmp_path / "accuracy.json")
    run.save(arguments.read(["--record"]), whole, [], cli.Screen(json_only=True))
    assert record.read(record.PATH)["results"][0]["accuracy"][0] == 0.123
    assert "| **all** | **12.3** |" in (tmp_path / "README.md").read_text(encoding="utf-8")
