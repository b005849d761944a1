"""The folder of engines: all or nothing, one builder at a time, damage counts as missing."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from builder import cache
from earlytom.errors import UserError
from runtime.engine import layout
from runtime.manifest import Manifest


def quiet() -> None:
    """Nobody is waited for in most tests."""
    raise AssertionError("waited for another process")


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    """A copy of the session's engine that a test may damage."""
    return Path(shutil.copytree(engine, tmp_path / engine.name))


def test_staging_is_fresh_hidden_and_gone_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "deeper" / "engine"
    with cache.staging(folder, quiet) as place:
        assert place.parent == folder.parent
        assert place.name.startswith(".")
        assert not list(place.iterdir())
        (place / "half").write_text("x")
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, SystemExit])
def test_nothing_is_left_of_a_failed_build(tmp_path: Path, error: type[BaseException]) -> None:
    def build() -> None:
        with cache.staging(tmp_path / "engine", quiet) as place:
            (place / "half").write_text("x")
            raise error

    with pytest.raises(error):
        build()
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_build_are_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    with cache.staging(folder, quiet) as place:
        name = place.name
    (tmp_path / name).mkdir()
    (tmp_path / name / "half").write_text("of a build that was killed")
    (tmp_path / f".{folder.name}.lock").touch()  # the file is there, nobody holds it
    with cache.staging(folder, quiet) as place:
        assert not list(place.iterdir())
    assert not list(tmp_path.iterdir())


def test_publish_takes_the_final_name_in_place_of_what_had_it(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    for content in ("first", "second"):
        with cache.staging(folder, quiet) as place:
            (place / content).touch()
            cache.publish(place, folder)
        assert [path.name for path in folder.iterdir()] == [content]
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_old_engine_survives_an_interrupted_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = tmp_path / "engine", os.replace
    folder.mkdir()
    (folder / "old").touch()

    def interrupted(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".building"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), cache.staging(folder, quiet) as place:
        cache.publish(place, folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert [path.name for path in folder.iterdir()] == ["old"]


def test_one_at_a_time(tmp_path: Path) -> None:
    """Several builders of one thing, many times over: never two inside, though each removes the lock's file."""
    folder, busy, overlaps, turns = tmp_path / "engine", tmp_path / "busy", [], []

    def work() -> None:
        for _ in range(6):
            with cache.staging(folder, lambda: None) as place:
                try:
                    os.close(os.open(busy, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    overlaps.append(1)
                    return
                (place / "half").touch()
                time.sleep(0.002)
                turns.append(len(list(place.iterdir())))
                busy.unlink()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not overlaps
    assert turns == [1] * 24
    assert not list(tmp_path.iterdir())


def test_builders_of_different_things_do_not_wait(tmp_path: Path) -> None:
    with cache.staging(tmp_path / "one", quiet), cache.staging(tmp_path / "two", quiet):
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_who_waits_says_so_once(tmp_path: Path) -> None:
    folder, said, inside = tmp_path / "engine", [], threading.Event()

    def second() -> None:
        with cache.staging(folder, lambda: said.append("waiting")):
            inside.set()

    with cache.staging(folder, quiet):
        thread = threading.Thread(target=second)
        thread.start()
        while not said:
            time.sleep(0.001)
        assert not inside.is_set()
    thread.join(timeout=60)
    assert inside.is_set()
    assert said == ["waiting"]


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere"])
def test_an_out_that_cannot_be_written_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*--out"), cache.staging(tmp_path / out / "engine", quiet):
        raise AssertionError("not reached")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_find_takes_what_is_whole_and_of_this_key(copy: Path) -> None:
    key = Manifest.read(copy).key
    found = cache.find(copy, key, verified=True)
    assert found is not None
    assert found.key == key
    assert cache.find(copy, key[:-1] + "0" if key[-1] != "0" else key[:-1] + "1", verified=True) is None
    assert cache.find(copy.with_name("missing"), key, verified=True) is None


@pytest.mark.parametrize("name", [layout.MANIFEST_FILE, layout.ONNX_FILE, layout.REPORT_FILE])
def test_damage_counts_as_missing(copy: Path, name: str) -> None:
    key = Manifest.read(copy).key
    path = copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert cache.find(copy, key, verified=False) is None
    path.unlink()
    assert cache.find(copy, key, verified=False) is None


def test_an_unverified_engine_is_no_verified_one(copy: Path) -> None:
    manifest = Manifest.read(copy)
    values = manifest.to_dict() | {"verification": None, "polygraphy": ""}
    Manifest.from_dict(values).write(copy)
    assert cache.find(copy, manifest.key, verified=True) is None
    assert cache.find(copy, manifest.key, verified=False) is not None
