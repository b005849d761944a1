"""A program is in the store whole and unchanged, or not at all."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.decoder.store import PROGRAM_FILE, ProgramStore
from tests.processes import HANG_SECONDS

IDENTITY = {"kind": "decode", "tokens": 1, "cache": 64, "weights": "ab" * 32, "torch": "2.13.0"}
CONTENT = b"a program" * 1000


def write(file: Path) -> dict[str, float]:
    file.write_bytes(CONTENT)
    return {"compile_seconds": 1.5}


@pytest.fixture
def store(tmp_path: Path) -> ProgramStore:
    return ProgramStore(tmp_path / "engine" / "decoder")


@pytest.fixture
def filled(store: ProgramStore) -> ProgramStore:
    with store.locked(IDENTITY):
        store.add(IDENTITY, write)
    return store


def visible(folder: Path) -> list[str]:
    """What is in the store but its locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_what_was_added_is_found(filled: ProgramStore) -> None:
    file = filled.find(IDENTITY)
    assert file == filled.path(IDENTITY) / PROGRAM_FILE
    assert file.read_bytes() == CONTENT
    manifest = json.loads((file.parent / "manifest.json").read_text())
    assert manifest["identity"] == IDENTITY
    assert manifest["file"]["bytes"] == len(CONTENT)
    assert manifest["figures"] == {"compile_seconds": 1.5}
    assert visible(filled.folder) == [file.parent.name]
    assert file.parent.name.startswith("decode-")


def test_an_empty_store_has_nothing_and_is_not_made_by_looking(store: ProgramStore) -> None:
    assert store.find(IDENTITY) is None
    assert not store.folder.exists()


@pytest.mark.parametrize("change", [{"torch": "2.14.0"}, {"cache": 65}, {"weights": "cd" * 32}, {"gpu": "another"}])
def test_another_identity_is_another_program(filled: ProgramStore, change: dict[str, str | int]) -> None:
    assert filled.find(IDENTITY | change) is None
    with filled.locked(IDENTITY | change):
        filled.add(IDENTITY | change, write)
    assert filled.find(IDENTITY | change) != filled.find(IDENTITY) is not None  # side by side


def damage_byte(place: Path) -> None:
    content = bytearray((place / PROGRAM_FILE).read_bytes())
    content[4000] ^= 1
    (place / PROGRAM_FILE).write_bytes(content)


def edit(place: Path, name: str, value: object) -> None:
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {name: value}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte of the program": damage_byte,
    "truncated program": lambda place: os.truncate(place / PROGRAM_FILE, 100),
    "no program": lambda place: (place / PROGRAM_FILE).unlink(),
    "no manifest": lambda place: (place / "manifest.json").unlink(),
    "truncated manifest": lambda place: os.truncate(place / "manifest.json", 40),
    "binary manifest": lambda place: (place / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "a manifest that is a list": lambda place: (place / "manifest.json").write_text("[]"),
    "foreign identity": lambda place: edit(place, "identity", IDENTITY | {"torch": "2.0"}),
    "another schema": lambda place: edit(place, "schema", 99),
    "no file record": lambda place: edit(place, "file", None),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_program_counts_as_missing_and_is_replaced(
    filled: ProgramStore, damage: Callable[[Path], object]
) -> None:
    damage(filled.path(IDENTITY))
    assert filled.find(IDENTITY) is None
    with filled.locked(IDENTITY):
        filled.add(IDENTITY, write)
    file = filled.find(IDENTITY)
    assert file is not None
    assert file.read_bytes() == CONTENT
    assert visible(filled.folder) == [file.parent.name]


def test_a_stray_file_is_no_damage(filled: ProgramStore) -> None:
    (filled.path(IDENTITY) / "notes.txt").write_text("mine")
    assert filled.find(IDENTITY) is not None


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt(), ValueError("figures")])
def test_a_failed_write_leaves_the_store_as_it_was(filled: ProgramStore, error: BaseException) -> None:
    def fail(file: Path) -> dict[str, float]:
        file.write_bytes(b"half a prog")
        raise error

    before = visible(filled.folder)
    for identity in (IDENTITY, IDENTITY | {"cache": 128}):
        with pytest.raises(type(error)), filled.locked(identity):
            filled.add(identity, fail)
    assert visible(filled.folder) == before
    assert filled.find(IDENTITY) is not None


def test_figures_that_are_no_numbers_do_not_get_in(store: ProgramStore) -> None:
    def nan(file: Path) -> dict[str, float]:
        return write(file) | {"relative_error": float("nan")}

    with pytest.raises(ValueError, match="JSON"), store.locked(IDENTITY):
        store.add(IDENTITY, nan)
    assert visible(store.folder) == []


def test_leftovers_of_a_killed_process_are_cleared(store: ProgramStore) -> None:
    left = store.folder / f".writing-{store.path(IDENTITY).name}"
    left.mkdir(parents=True)
    (left / "huge").write_bytes(b"0" * 100)
    with store.locked(IDENTITY):
        file = store.add(IDENTITY, write)
    assert sorted(path.name for path in file.parent.iterdir()) == ["manifest.json", PROGRAM_FILE]
    assert visible(store.folder) == [file.parent.name]


def test_one_at_a_time_inside_the_lock(store: ProgramStore) -> None:
    other = ProgramStore(store.folder)
    entered = threading.Event()

    def enter() -> None:
        with other.locked(IDENTITY):
            entered.set()

    with store.locked(IDENTITY):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.3)
        with store.locked(IDENTITY | {"cache": 128}):  # another program's lock is another lock
            pass
    assert entered.wait(HANG_SECONDS)
    thread.join(HANG_SECONDS)
