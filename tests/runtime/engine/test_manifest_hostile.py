"""A manifest that somebody wrote to do harm, or by mistake: an `EngineError` of one line, soon."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import cache
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from tests.runtime.engine.test_manifest import PLUGIN, edit, make, refused, several, with_plugins

NEST: Any = []
for _ in range(40):
    NEST = [NEST]
ANYTHING = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**39, -(10**39), 0.5, 1e308, "", "x", "x" * 5000, "a\0b", "../x",
    "\u202e", [], {}, [[]], {"": 0}, {"passed": True}, ["x"] * 3000, list(range(1, 3000)), [10**30] * 3, NEST,
    {"k" * 300: {"bytes": 1, "sha256": "0" * 64}}, {f"f{i}": {"bytes": i, "sha256": "0" * 64} for i in range(500)},
    "2026-01-02", "8.0", "tensorrt", "adaptive", "plugin",
]  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, Any]]]:
    folders = []
    for number, maker in enumerate((make, several, with_plugins)):
        folder = tmp_path_factory.mktemp("hostile") / f"e{number}"
        maker(folder).write(folder)
        values = json.loads((folder / "manifest.json").read_text())
        del values["manifest_sha256"]
        folders.append((folder, values))
    return folders


def places(values: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    if not isinstance(values, dict | list):
        return []
    keys = list(values) if isinstance(values, dict) else range(len(values))
    return [(values, key) for key in keys] + [place for key in keys for place in places(values[key])]


@given(st.data())
def test_a_changed_manifest_is_read_or_refused_in_one_line(
    valid: list[tuple[Path, dict[str, Any]]], data: st.DataObject
) -> None:
    folder, values = data.draw(st.sampled_from(valid))
    values = copy.deepcopy(values)
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(places(values)))
        change = data.draw(st.sampled_from(("drop", "replace", "add", "repeat")))
        if change == "drop":
            del container[key]
        elif change == "replace":
            container[key] = copy.deepcopy(data.draw(st.sampled_from(ANYTHING)))
        elif change == "repeat" and isinstance(container[key], list):
            container[key] = container[key] * 50
        elif isinstance(container, dict):
            container[data.draw(st.sampled_from(("x", "chunk", "programs", "batch", "frames_kept")))] = copy.deepcopy(
                data.draw(st.sampled_from(ANYTHING))
            )
    edit(folder, lambda old: (old.clear(), old.update(values)))
    try:
        Manifest.read(folder)
    except EngineError as error:
        message = str(error)
        assert message.count("\n") == 0
        assert len(message) < len(str(folder)) + 700
    assert cache.find(folder, "00", verified=True, text=True) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"frames": 10**9}, "frames: expected `int` <= 100000, got 1000000000"),
        ({"frames": 10**400}, "a number of 401 digits"),
        ({"frame_counts": list(range(1, 1000))}, "frame_counts: expected `array` of length <= 256"),
        ({"name": "x" * 500_000}, "name: expected `str` of length <= 255"),
        ({"key": "g" * 500_000}, "key: expected `str` matching regex"),
        ({"created": "2" * 500_000}, "created: expected an ISO 8601 time"),
        ({"k" * 500_000: 1}, "unknown field `kkk"),
        ({"earlytom": {"k" * 500_000: 1}}, "make no sense"),
        ({"earlytom": {"merge_layers": "6" * 500_000}}, "make no sense"),
        ({"files": {"x" * 500_000: {"bytes": 1, "sha256": "0" * 64}}}, "no plain file name"),
        ({"files": {"x" * 300: {"bytes": 1, "sha256": "0" * 64}}}, "no plain file name"),
        ({"files": {f"{n}": {"bytes": 1, "sha256": "0" * 64} for n in range(100_000)}}, "has more than 1 MiB"),
        (
            {"files": {"vision.engine": {"bytes": 10**39, "sha256": "0" * 64}}},
            r"files.*\.bytes: expected `int` <= 9",
        ),
        ({"figures": {"seconds": 10**39}}, None),
        ({"model": {"source": "x" * 500_000}}, "model"),
        ({"programs": {"../x": {"bytes": 1, "sha256": "0" * 64, "identity": {}}}}, "no plain file name"),
        (
            {"programs": {"x": {"bytes": 1, "sha256": "0" * 64, "identity": {"kind": None}}}},
            r"identity.*: expected `int \| str`",
        ),
        (
            {"programs": {"x": {"bytes": 1, "sha256": "0" * 64}}},
            "programs.* missing required field `identity`",
        ),
        ({"programs": []}, "programs: expected `object`, got `array`"),
        ({"plugins": [{**msgspec.structs.asdict(PLUGIN), "tensors": "x" * 5000}]}, "plugins"),
    ],
)
def test_values_that_are_too_large(tmp_path: Path, change: dict[str, Any], match: str | None) -> None:
    folder = tmp_path / "e"
    make(folder).write(folder)
    edit(folder, lambda values: values.update(change))
    if match is None:
        Manifest.read(folder)
    else:
        assert len(refused(folder, match)) < len(str(folder)) + 400


def test_a_manifest_of_a_hundred_megabytes_is_not_parsed(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    make(folder).write(folder)
    (folder / "manifest.json").write_bytes(b"[" + b"[]," * 40_000_000 + b"[]]")
    refused(folder, "has more than 1 MiB, which none of ours has")


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    with pytest.raises(EngineError, match="has at most 1048576 bytes"):
        make(folder, verification={"passed": True, "notes": ["x" * 2**20]}).write(folder)
    assert not (folder / "manifest.json").exists()
    deep: Any = {"passed": True}
    for _ in range(5000):
        deep = {"passed": True, "steps": deep}
    with pytest.raises(EngineError, match="cannot be written as JSON"):
        make(folder, verification=deep)


def test_a_listed_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    manifest = make(folder)
    manifest.write(folder)
    (folder / "vision.engine").unlink()
    os.mkfifo(folder / "vision.engine")
    refused(folder, r"vision\.engine is missing")


def test_a_file_that_becomes_a_pipe_after_it_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "e"
    manifest = make(folder)
    manifest.write(folder)
    stat = os.stat(folder / "vision.engine")
    (folder / "vision.engine").unlink()
    os.mkfifo(folder / "vision.engine")
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "stat", lambda path: stat if path.name == "vision.engine" else os.stat(path))
    with pytest.raises(EngineError, match=r"vision\.engine is no plain file"):
        manifest.verify(folder)


def test_a_file_that_grows_while_it_is_read_is_read_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.engine import manifest as module

    folder = tmp_path / "e"
    manifest = make(folder)
    manifest.write(folder)
    real, reads = module.open_plain, []

    class Growing:
        """A file that never ends."""

        def __init__(self, path: Path, remedy: str) -> None:
            self._file = real(path, remedy)

        def __enter__(self) -> Growing:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def fileno(self) -> int:
            return self._file.fileno()

        def readinto(self, block: memoryview) -> int:
            reads.append(len(block))
            return len(block)

    monkeypatch.setattr(module, "open_plain", Growing)
    with pytest.raises(EngineError, match="changed since it was built"):
        manifest.verify(folder)
    assert sum(reads) == next(iter(manifest.files.values())).bytes + 1
