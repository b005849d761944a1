"""In what two engines differ, and why one was built although the other was there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder import build, cache, inspect, stages
from builder.inspection.comparison import SET_BY, compare, set_by
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from tests.builder.inspection.engine_folders import (
    Command,
    drop,
    edit_json,
    seal,
)

ROOT = Path(inspect.__file__).resolve().parents[1]


def rebuilt(folder: Path, change: Callable[[dict[str, Any]], object], **changes: Any) -> Path:
    """A copy of an engine as if it had been built with other parts of the key."""
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    edit_json(other / layout.REPORT_FILE, lambda values: change(values["key_parts"]))
    parts = json.loads((other / layout.REPORT_FILE).read_text())["key_parts"]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    seal(other, key=key, name=other.name, **changes)
    return other


def test_the_parts_that_are_recorded_are_what_the_key_is_made_of(engine: Path) -> None:
    record = inspect.describe(engine)
    parts = json.dumps(record["key_parts"], sort_keys=True).encode()
    assert hashlib.sha256(parts).hexdigest() == record["manifest"]["key"]


def test_every_part_of_the_key_is_explained(engine: Path, build_arguments: list[str]) -> None:
    parts = parse(build_arguments)[1].key_parts()
    recorded = inspect.describe(engine)["key_parts"]
    assert {**parts, "code": None} == {**recorded, "code": None}
    assert set(parts["code"]) == set(recorded["code"])
    for name in (*parts, *(f"earlytom.{setting}" for setting in parts["earlytom"])):
        assert set_by(name) != name, name
    named = {name.split(".")[1] for name in SET_BY if name.startswith("earlytom.")}
    assert named <= set(parts["earlytom"])  # none that there is not


@pytest.mark.parametrize("field", dataclasses.fields(BuildConfig), ids=lambda field: field.name)
def test_every_field_of_a_build_is_explained(field: dataclasses.Field[Any]) -> None:
    """Also one that only some engines have in their keys."""
    part = {"checkpoint": "model"}.get(field.name, field.name)
    assert set_by(part) != part


def test_a_field_without_an_option_has_its_own_name() -> None:
    """Negative control."""
    assert set_by("made_up") == "made_up"


def test_chunks_come_from_the_option(copy: Path) -> None:
    other = rebuilt(copy, lambda parts: parts.update(chunk=2))
    record = compare(inspect.describe(copy), inspect.describe(other))
    assert [(row["field"], row["set_by"]) for row in record["key_parts"]] == [("chunk", "--chunk")]
    assert record["reasons"][0].endswith("What differs comes from: --chunk")


def test_looking_into_engines_is_not_among_the_sources_that_change_them(build_arguments: list[str]) -> None:
    code = parse(build_arguments)[1].key_parts()["code"]
    assert "builder/inspect.py" not in code
    assert (ROOT / "builder" / "inspection" / "layers.py").is_file()
    assert not [name for name in code if name.startswith("builder/inspect")]
    assert {
        "builder/gate/accuracy.py",
        "builder/gate/runners.py",
        "builder/gate/kept_reference.py",
        "earlytom/merge.py",
        "runtime/engine/layout.py",
    } < set(code)


def test_an_engine_differs_in_nothing_from_itself(engine: Path, command: Command) -> None:
    record = compare(inspect.describe(engine), inspect.describe(engine))
    assert (record["same_key"], record["key_parts"], record["differences"]) == (True, [], [])
    assert "--force" in record["reasons"][-1]
    assert "no field differs" in command(engine, "--compare", engine)[1]


@pytest.mark.parametrize(
    ("words", "part", "option"),
    [
        (["--tau", "0.25"], "earlytom.tau", "--tau"),
        (["--ratio", "0.4"], "earlytom.retention_ratio", "--ratio"),
        (["--frames", "8"], "frames", "--frames"),
        (["--fp32"], "dtype", "--fp32"),
        (["--target", "8.9"], "target", "--target"),
        (["--workspace", "1"], "workspace_gib", "--workspace"),
    ],
)
def test_an_option_that_differs_is_named(
    copy: Path, build_arguments: list[str], words: list[str], part: str, option: str
) -> None:
    before, asked = (parse([*build_arguments, *more])[1].key_parts() for more in ([], words))
    other = rebuilt(copy, lambda parts: parts.update({k: v for k, v in asked.items() if v != before[k]}))
    record = compare(inspect.describe(copy), inspect.describe(other))
    assert [row["field"] for row in record["key_parts"]] == [part]
    assert option in record["key_parts"][0]["set_by"]
    assert not record["same_key"]
    (reason,) = record["reasons"]
    assert option in reason


def test_a_source_and_a_library_that_differ_are_named(copy: Path, command: Command) -> None:
    def change(parts: dict[str, Any]) -> None:
        parts["code"]["earlytom/merge.py"] = "0" * 64
        del parts["code"]["builder/gate/accuracy.py"]
        parts["libraries"]["torch"] = "1.0"

    other = rebuilt(copy, change)
    record = compare(inspect.describe(copy), inspect.describe(other))
    rows = {row["field"]: row for row in record["key_parts"]}
    assert set(rows) == {"code.earlytom/merge.py", "code.builder/gate/accuracy.py", "libraries.torch"}
    assert rows["code.builder/gate/accuracy.py"]["other"] is None
    status, stdout, stderr = command(copy, "--compare", other)
    assert (status, stderr) == (0, "")
    for shown in ("000000000000 ", "earlytom/merge.py", "this project's sources; installed libraries"):
        assert shown in stdout, shown


def test_fields_that_differ_are_named_with_both_values(copy: Path, compiled: Path) -> None:
    """`compiled` was made from `copy`, which it changed; the untouched engine is its other side."""
    before = inspect.describe(compiled)
    gate = json.loads(json.dumps(before["manifest"]["verification"]))
    gate["steps"]["tokens"][0]["value"] = 0.5
    other = rebuilt(compiled, lambda parts: parts.update(frames=3), verification=gate, target="8.9")
    record = compare(before, inspect.describe(other))
    rows = {row["field"]: (row["engine"], row["other"]) for row in record["differences"]}
    assert rows["target"] == ("8.0", "8.9")
    assert rows["verification.steps.tokens.tokens: cosine.value"][1] == 0.5
    assert rows["files.report.json.sha256"][0] == before["manifest"]["files"]["report.json"]["sha256"]
    assert {name.split(".")[0] for name in rows} == {"name", "key", "target", "verification", "files"}


def test_what_one_of_them_lacks_is_one_field(copy: Path, command: Command) -> None:
    other = rebuilt(copy, lambda parts: parts.update(dtype="fp32"), verification=None, polygraphy="")
    record = compare(inspect.describe(copy), inspect.describe(other))
    (row,) = (row for row in record["differences"] if row["field"].startswith("verification"))
    assert (row["field"], row["other"]) == ("verification", None)
    assert "(4 fields)" in command(copy, "--compare", other)[1]


def test_an_engine_that_did_not_record_its_key(copy: Path) -> None:
    other = rebuilt(copy, lambda parts: parts.update(frames=3))
    edit_json(other / layout.REPORT_FILE, drop("key_parts"))
    seal(other)
    record = compare(inspect.describe(copy), inspect.describe(other))
    assert record["key_parts"] == []
    (reason,) = record["reasons"]
    assert str(other) in reason
    assert "not recorded" in reason


def test_equal_keys_and_yet_not_reused(copy: Path) -> None:
    gate = Manifest.read(copy).verification
    assert gate is not None
    steps = {step: checks for step, checks in gate["steps"].items() if step != "text"}
    for changes, word in (
        ({"verification": None, "polygraphy": ""}, "--no-verify"),
        ({"verification": gate | {"steps": steps}}, "--verify-text"),
        ({"verification": gate, "name": "another"}, "renamed"),
    ):
        other = Path(shutil.copytree(copy, copy.parent / word / copy.name))
        seal(other, **changes)
        record = compare(inspect.describe(copy), inspect.describe(other))
        assert record["same_key"]
        (_, reason) = record["reasons"]
        assert word in reason
        assert str(other) in reason


def test_a_build_that_asks_for_the_text_step_takes_no_engine_without_it(
    copy: Path, build_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(*args: Any) -> None:
        raise AssertionError("something was built")

    manifest = Manifest.read(copy)
    monkeypatch.setattr(stages, "export", export)
    monkeypatch.setattr(BuildConfig, "key", lambda self: manifest.key)
    words = [*build_arguments, "--out", str(copy.parent)]
    assert build.main([*words, "--verify-text"]) == 0  # it ran when this engine was built
    assert manifest.verification is not None
    steps = {step: checks for step, checks in manifest.verification["steps"].items() if step != "text"}
    seal(copy, verification=manifest.verification | {"steps": steps})
    assert cache.find(copy, manifest.key, verified=True, text=True) is None
    for more in ([], ["--no-verify-text"], ["--no-verify"]):
        assert build.main([*words, *more]) == 0
    capsys.readouterr()
    with pytest.raises(AssertionError, match="something was built"):
        build.main([*words, "--verify-text"])
    assert "not verified: it is built again" in capsys.readouterr().out
