"""The folder of engines: all or nothing, one builder at a time, damage counts as missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import cache
from earlytom.errors import UserError
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from tests.processes import HANG_SECONDS

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


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
        thread.join(timeout=HANG_SECONDS)
    assert not overlaps
    assert turns == [1] * 24
    assert not list(tmp_path.iterdir())


def test_builders_of_different_things_do_not_wait(tmp_path: Path) -> None:
    with cache.staging(tmp_path / "one", quiet), cache.staging(tmp_path / "two", quiet):
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_who_waits_says_so_once(tmp_path: Path) -> None:
    folder, said, waits, inside = tmp_path / "engine", [], threading.Event(), threading.Event()

    def say() -> None:
        said.append("waiting")
        waits.set()

    def second() -> None:
        with cache.staging(folder, say):
            inside.set()

    with cache.staging(folder, quiet):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(HANG_SECONDS)
        assert not inside.is_set()
    thread.join(timeout=HANG_SECONDS)
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


# Builds that are killed


def leave(folder: Path, name: str) -> None:
    """What a killed build of `name` leaves."""
    (folder / f".building-{name}" / "deep").mkdir(parents=True)
    (folder / f".building-{name}" / "deep" / ".vision.engine.12ab.partial").touch()
    (folder / f".{name}.lock").touch()


def test_leftovers_of_every_engine_are_cleared(tmp_path: Path) -> None:
    leave(tmp_path, "another")
    (tmp_path / ".third.lock").touch()
    (tmp_path / ".building-fourth").mkdir()
    (tmp_path / ".report.json.12ab.partial").touch()
    finished = tmp_path / "another"
    finished.mkdir()
    with cache.staging(tmp_path / "engine", quiet) as place:
        assert sorted(os.listdir(tmp_path)) == [place.name, ".engine.lock", "another"]
    assert os.listdir(tmp_path) == ["another"]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / ".other.lock").write_text("a lock of another program, with content")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "building-x").mkdir()
    before = sorted(os.listdir(tmp_path))
    with cache.staging(tmp_path / "engine", quiet):
        pass
    assert sorted(os.listdir(tmp_path)) == before


def test_a_live_build_is_not_disturbed(tmp_path: Path) -> None:
    with cache.staging(tmp_path / "one", quiet) as first:
        (first / "half").touch()
        with cache.staging(tmp_path / "two", quiet):
            assert os.listdir(first) == ["half"]
            assert (tmp_path / ".one.lock").exists()
    assert not os.listdir(tmp_path)


def test_an_engine_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    """Killed between the two moves of `publish`."""
    for name in ("engine", "another"):
        (tmp_path / f".old-{name}").mkdir()
        (tmp_path / f".old-{name}" / "vision.onnx").touch()
        leave(tmp_path, name)
    (tmp_path / ".old-third").mkdir()
    (tmp_path / "third").mkdir()  # killed after them
    with cache.staging(tmp_path / "engine", quiet):
        assert os.listdir(tmp_path / "engine") == os.listdir(tmp_path / "another") == ["vision.onnx"]
    assert sorted(os.listdir(tmp_path)) == ["another", "engine", "third"]


def test_links_named_like_ours_are_not_followed(tmp_path: Path) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    out.mkdir()
    mine.mkdir()
    (mine / "file").write_text("mine")
    for name in ("engine", "another"):
        (out / f".building-{name}").symlink_to(mine)
        (out / f".old-{name}").symlink_to(mine)
        (out / f".{name}.lock").symlink_to(mine / "file")
    (out / ".vision.onnx.12ab.partial").symlink_to(mine / "file")
    (out / ".third.lock").symlink_to(out / ".third.lock")
    with cache.staging(out / "engine", quiet) as place:
        (place / "half").touch()
    assert (mine / "file").read_text() == "mine"
    assert os.listdir(mine) == ["file"]
    assert not (out / ".building-engine").exists()


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, Path.mkdir])
def test_anything_may_have_the_names_of_leftovers(tmp_path: Path, make: Callable[[Path], None]) -> None:
    for name in (".building-engine", ".building-other", ".old-other", ".vision.onnx.12ab.partial"):
        make(tmp_path / name)
    (tmp_path / "other").mkdir()
    with cache.staging(tmp_path / "engine", quiet) as place:
        assert not os.listdir(place)
    assert "other" in os.listdir(tmp_path)
    assert ".building-other" not in os.listdir(tmp_path)


def test_leftovers_without_write_permission_are_cleared(tmp_path: Path) -> None:
    leave(tmp_path, "engine")
    leave(tmp_path, "another")
    for name in ("engine", "another"):
        os.chmod(tmp_path / f".building-{name}" / "deep", 0o500)
        os.chmod(tmp_path / f".building-{name}", 0o000)
    with cache.staging(tmp_path / "engine", quiet) as place:
        assert not os.listdir(place)
    assert not os.listdir(tmp_path)


AS_NOBODY = """
import os, sys
from pathlib import Path
from builder import cache
from earlytom.errors import UserError
os.setgid(65534)
os.setuid(65534)
out = Path(sys.argv[1])
with cache.staging(out / "engine", lambda: None) as place:
    (place / "half").touch()
os.chmod(out / "mine", 0o500)
try:
    with cache.staging(out / "taken", lambda: None) as place:
        print("not reached")
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
def test_leftovers_of_another_user_stay_and_disturb_nobody(tmp_path: Path) -> None:
    """In a folder for everybody, such as /tmp, in which each may remove their own only."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        os.chmod(out, 0o1777)
        leave(out, "another")
        leave(out, "taken")
        (out / "mine").mkdir()
        os.chown(out / "mine", 65534, 65534)
        (out / ".third.lock").touch()
        before = sorted(os.listdir(out))
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, name],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            env=ENVIRONMENT,
        )
        assert done.stderr == ""
        assert "cannot write to" in done.stdout
        assert done.stdout.count("\n") == 1
        assert sorted(os.listdir(out)) == before


@pytest.mark.parametrize("seed", [1, 2])
def test_builds_that_are_killed_at_any_point(tmp_path: Path, seed: int) -> None:
    out, watch = tmp_path / "out", tmp_path / "watch"
    out.mkdir()
    watch.mkdir()
    program = [sys.executable, str(Path(__file__).with_name("killed_builds.py")), str(out), str(watch), str(seed)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=HANG_SECONDS, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.read_text() for path in watch.glob("wrong-*")] == []
    names = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    assert names
    with cache.staging(out / "last", quiet) as place:
        cache.publish(place, out / "last")
    assert {*names, "last"} <= set(os.listdir(out)) <= {"one", "two", "three", "last"}
    for name in set(os.listdir(out)) - {"last"}:
        assert (out / name / "whole").read_text() == (out / name / "deep" / "token").read_text()
