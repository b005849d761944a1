"""The record of the bundled model's accuracy: what may be one, how it is written and read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.evaluation import arguments, record, run
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


def test_the_card_shows_a_new_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "training.json", "model.safetensors"):
        shutil.copy(micro.PATH / name, tmp_path)
    whole = record.read()
    (full,) = (one for one in whole["results"] if one["method"] == "full")
    full["accuracy"][0] = 0.123
    monkeypatch.setattr(record, "PATH", tmp_path / "accuracy.json")
    run.save(arguments.read(["--record"]), whole, [], None, cli.Screen(json_only=True))
    assert record.read(record.PATH)["results"][0]["accuracy"][0] == 0.123
    assert "| **all** | **12.3** |" in (tmp_path / "README.md").read_text(encoding="utf-8")
