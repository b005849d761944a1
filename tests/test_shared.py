"""What workers share is made once, whole, and seen to be changed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS
from tests.shared import Shared, name_of


def test_it_is_made_once_however_many_ask(tmp_path: Path) -> None:
    """Each thread is a worker: it has a `Shared` of its own, and the lock is of files."""
    makers, found = list[Path](), list[Path]()

    def make(folder: Path) -> None:
        makers.append(folder)
        (folder / "file").write_text("one")

    def work() -> None:
        found.append(Shared(tmp_path, tmp_path)("name", make))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert len(makers) == 1
    assert found == [tmp_path / "name"] * 4
    assert (found[0] / "file").read_text() == "one"


def test_what_failed_is_made_again_from_nothing(tmp_path: Path) -> None:
    shared = Shared(tmp_path / "all", tmp_path / "own")

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        shared("name", fail)
    folder = shared("name", lambda folder: (folder / "whole").touch())
    assert list(folder.iterdir()) == [tmp_path / "all" / "name" / "whole"]


def test_changes_are_seen(tmp_path: Path) -> None:
    shared = Shared(tmp_path / "all", tmp_path / "own")
    for name in ("kept", "written", "longer", "more", "less"):
        shared(name, lambda folder: (folder / "file").write_text("text"))
    assert shared.changed() == []
    place = tmp_path / "all"
    os.utime(place / "written" / "file", ns=(1, 1))
    (place / "longer" / "file").write_text("text, and more")
    (place / "more" / "other").touch()
    (place / "less" / "file").unlink()
    assert shared.changed() == ["less", "longer", "more", "written"]


def test_a_copy_is_the_worker_s_own(tmp_path: Path) -> None:
    shared, other = (Shared(tmp_path / "all", tmp_path / name) for name in ("one", "other"))
    mine = shared.copy("name", lambda folder: (folder / "file").write_text("text"))
    (mine / "file").write_text("changed")
    assert shared.copy("name", lambda folder: None) == mine
    assert (other.copy("name", lambda folder: None) / "file").read_text() == "text"
    assert shared.changed() == []


def test_names_go_by_the_words() -> None:
    assert name_of("engine", ["a b"]) == name_of("engine", ("a b",)) != name_of("engine", ["a", "b"])
