"""A file is there whole or not at all, and what killed writers left is cleared by the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime.files import partial as module
from runtime.files.partial import clear, partial
from tests.processes import HANG_SECONDS


def test_it_is_moved_there_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("before")
    with partial(target) as path:
        path.write_text("after")
        assert target.read_text() == "before"
        assert path.parent == tmp_path
    assert (os.listdir(tmp_path), target.read_text()) == (["report.json"], "after")
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode  # as if it had been opened for writing


@pytest.mark.parametrize("name", ["pipe", "folder", "link", "."])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match="s a d") as caught, partial(tmp_path / name):  # a directory, a device or a pipe
        raise AssertionError
    assert caught.value.filename == str(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_one_that_failed(tmp_path: Path, error: type[BaseException] | BaseException) -> None:
    def fail() -> None:
        with partial(tmp_path / "file") as path:
            path.write_text("half")
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        fail()
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from runtime.files.partial import partial
with partial(Path(sys.argv[1])) as path:
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name in ("clip.mp4", "other.mp4"):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / name)], timeout=HANG_SECONDS, env=environment
        )
        assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    with partial(target) as path:
        path.write_text("whole")
        left = [name for name in os.listdir(tmp_path) if name != path.name]
        assert [name.startswith(".other.mp4.") for name in left] == [True]  # not this one's
    clear(tmp_path)
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_file_that_is_being_written_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with partial(target) as first:
        with partial(target) as second:
            assert first != second
            second.write_text("second")
            clear(tmp_path)
            assert first.exists()
        first.write_text("first")
    assert (os.listdir(tmp_path), target.read_text()) == (["file"], "first")


def test_writers_and_clearers_at_once(tmp_path: Path) -> None:
    """Also in the moment between a file's making and its locking."""
    done, failed = threading.Event(), []

    def write(name: str) -> None:
        try:
            for turn in range(200):
                with partial(tmp_path / name) as path:
                    path.write_text(str(turn))
        except BaseException as error:
            failed.append(error)

    def clearing() -> None:
        while not done.is_set():
            clear(tmp_path)

    writers = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    clearer = threading.Thread(target=clearing)
    for thread in (clearer, *writers):
        thread.start()
    for thread in writers:
        thread.join(HANG_SECONDS)
    done.set()
    clearer.join(HANG_SECONDS)
    assert not failed
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_what_is_no_plain_file_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".file.12ab.partial").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / ".file.12ac.partial")
    (tmp_path / ".file.12ad.partial").mkdir()
    before = sorted(os.listdir(tmp_path))
    clear(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "mine").read_text() == "mine"


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent/file'$"), partial(tmp_path / "absent" / "file"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"/folder'$"), partial(tmp_path / "folder"):
        pass
    assert os.listdir(tmp_path) == ["folder"]
    assert module._NAME.fullmatch(".a.b.12ab.partial")["target"] == "a.b"  # type: ignore[index]
