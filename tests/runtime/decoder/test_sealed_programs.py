"""The engine's own manifest says which compiled programs are its: another is compiled again and not loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from builder import cache
from builder.inspect import describe
from runtime.decoder.compiled import CompiledDecoder
from runtime.decoder.store import PROGRAM_FILE, ProgramStore
from runtime.engine.manifest import Manifest, describe_files
from runtime.errors import EngineError
from tests.processes import HANG_SECONDS
from tests.runtime.decoder.test_compiled import SIZES, ExportOnly, make_small
from tests.runtime.decoder.test_store import CONTENT, IDENTITY, write
from tests.runtime.engine.test_manifest import make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An engine folder."""
    place = tmp_path / "engine"
    make(place).write(place)
    return place


@pytest.fixture
def store(folder: Path) -> ProgramStore:
    store = ProgramStore(folder / "decoder")
    with store.locked(IDENTITY):
        store.add(IDENTITY, write)
    return store


def forge(store: ProgramStore, content: bytes) -> None:
    """Another program, with a manifest beside it that fits."""
    place = store.path(IDENTITY)
    (place / PROGRAM_FILE).write_bytes(content)
    manifest = json.loads((place / "manifest.json").read_text())
    record = describe_files(place)[PROGRAM_FILE]
    manifest["file"] = {"bytes": record.bytes, "sha256": record.sha256}
    (place / "manifest.json").write_text(json.dumps(manifest))


def test_the_engine_s_manifest_records_what_was_added(folder: Path, store: ProgramStore) -> None:
    manifest = Manifest.read(folder)
    record = manifest.programs[store.path(IDENTITY).name]
    assert (record.bytes, record.identity) == (len(CONTENT), IDENTITY)
    assert store.find(IDENTITY) is not None
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    assert cache.find(folder, manifest.key, verified=True) == manifest  # a build finds it unchanged
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(
        [*manifest.files, "manifest.json"]
    )


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"?", CONTENT + b"?", b""])
def test_a_forged_program_is_not_found(store: ProgramStore, content: bytes) -> None:
    forge(store, content)
    assert store.find(IDENTITY) is None
    assert ProgramStore(shutil.copytree(store.folder, store.folder.parent.parent / "alone")).find(IDENTITY) is not None


def test_a_program_that_is_not_recorded_is_not_found_and_replaced(folder: Path, store: ProgramStore) -> None:
    place = shutil.move(store.path(IDENTITY), folder.parent)
    make(folder).write(folder)
    shutil.move(place, store.folder)
    assert store.find(IDENTITY) is None
    with store.locked(IDENTITY):
        store.add(IDENTITY, write)
    assert store.find(IDENTITY) is not None


def test_the_record_of_another_program_is_none_of_this(folder: Path, store: ProgramStore) -> None:
    other = IDENTITY | {"cache": 128}
    shutil.copytree(store.path(IDENTITY), store.path(other))
    path = store.path(other) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": other}))
    assert store.find(other) is None


def test_a_changed_record_breaks_the_seal(folder: Path, store: ProgramStore) -> None:
    forge(store, CONTENT[::-1])
    text = (folder / "manifest.json").read_text()
    values = json.loads(text)
    (record,) = values["programs"].values()
    record["sha256"] = json.loads((store.path(IDENTITY) / "manifest.json").read_text())["file"]["sha256"]
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(EngineError, match="its digest differs"):
        Manifest.read(folder)
    assert store.find(IDENTITY) is None


def test_records_of_programs_that_are_gone_are_let_go(folder: Path, store: ProgramStore) -> None:
    shutil.rmtree(store.path(IDENTITY))
    other = IDENTITY | {"cache": 128}
    with store.locked(other):
        store.add(other, write)
    assert list(Manifest.read(folder).programs) == [store.path(other).name]


def test_an_inspection_lists_the_programs(engine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engine, tmp_path / engine.name))
    store = ProgramStore(folder / "decoder")
    with store.locked(IDENTITY):
        store.add(IDENTITY, write)
    assert describe(folder)["manifest"]["programs"][store.path(IDENTITY).name]["bytes"] == len(CONTENT)


ADD = """
import sys
from pathlib import Path
from runtime.decoder.store import ProgramStore
store = ProgramStore(Path(sys.argv[1]))
for cache in range(int(sys.argv[2]), int(sys.argv[2]) + 10):
    identity = {"kind": "decode", "cache": cache}
    with store.locked(identity):
        store.add(identity, lambda file: {"bytes": file.write_bytes(str(cache).encode())})
"""


def test_several_processes_record_at_once(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def add(first: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", ADD, str(folder / "decoder"), str(first)]
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=HANG_SECONDS)

    with ThreadPoolExecutor(3) as threads:
        done = list(threads.map(add, (10, 20, 30)))
    assert [(one.returncode, one.stderr) for one in done] == [(0, "")] * 3
    assert {record.identity["cache"] for record in Manifest.read(folder).programs.values()} == set(range(10, 40))
    store = ProgramStore(folder / "decoder")
    assert all(store.find({"kind": "decode", "cache": cache}) for cache in range(10, 40))
    assert [name for name in os.listdir(store.folder) if name.startswith(".")] == []


# The decoder


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name == "runtime.decoder.compiled"]


def compiled(store: ProgramStore, compiler: ExportOnly | None = None) -> int:
    compiler = compiler or ExportOnly()
    CompiledDecoder.compile(make_small(), compiler, store, SIZES[:1])
    return compiler.compiled


def test_a_program_from_elsewhere_is_compiled_again_before_a_byte_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ProgramStore(folder / "decoder")
    assert compiled(store) == 2
    assert compiled(ProgramStore(folder / "decoder")) == 0  # negative control
    assert said(caplog) == []
    good = {path: path.read_bytes() for path in store.folder.glob(f"*/{PROGRAM_FILE}")}
    (one, _) = good
    one.write_bytes(b"a pickle that does harm")
    beside = json.loads((one.parent / "manifest.json").read_text())
    record = describe_files(one.parent)[PROGRAM_FILE]
    beside["file"] = {"bytes": record.bytes, "sha256": record.sha256}
    (one.parent / "manifest.json").write_text(json.dumps(beside))
    real, loaded = torch.export.load, []

    def load(file: Path, **options: Any) -> Any:
        loaded.append(Path(file).read_bytes())
        return real(file, **options)

    monkeypatch.setattr(torch.export, "load", load)
    assert compiled(store) == 1
    assert not any(content.startswith(b"a pickle") for content in loaded)
    (line,) = said(caplog)
    assert "compiled again, not loaded" in line
    assert one.parent.name in line


@pytest.mark.parametrize("where", ["the store", "the engine"])
def test_programs_that_cannot_be_kept_are_compiled_and_said(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ProgramStore(folder / "decoder")
    if where == "the engine":
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    else:
        mkdir = Path.mkdir

        def read_only(path: Path, *words: Any, **options: Any) -> None:
            if path == store.folder:
                raise OSError(errno.EROFS, "Read-only file system")
            mkdir(path, *words, **options)

        monkeypatch.setattr(Path, "mkdir", read_only)
    assert compiled(store) == 2
    assert Manifest.read(folder).programs == {}
    assert not list(store.folder.glob("*"))
    (line,) = said(caplog)
    assert "programs are not kept" in line
