"""What is in a folder may be anything: it is read within limits, or refused in one line, and never waited for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import EngineError
from runtime.files.plain import open_plain, read_json

REMEDY = "make another"


def refused(path: Path, match: str, **limits: int) -> None:
    with pytest.raises(EngineError, match=match) as caught:
        read_json(path, REMEDY, **limits)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(": make another")
    assert message.count("\n") == 0
    assert len(message) < len(str(path)) + 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)  # fmt: skip


@given(VALUES)
def test_what_is_sound_is_read_as_it_is(tmp_path_factory: pytest.TempPathFactory, values: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "file.json"
    path.write_text(json.dumps(values))
    assert read_json(path, REMEDY) == values


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": 1}\0', "not valid JSON"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "'1e999' is no finite number"),
        (b"[-1" + b"0" * 5000 + b"]", "a number of 5002 digits"),
        (b"[1" + b"0" * 4299 + b".0e-4290]", None),
        (b"[" * 5000, "not valid JSON"),
        (b"[" * 5000 + b"]" * 5000, "not valid JSON"),
        (b"[" * 60 + b"]" * 60, "more than 50 lists and objects"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "more than 50 lists and objects"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b'{"' + b"k" * 500 + b'": 1, "' + b"k" * 500 + b'": 2}', "there twice"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b'["\\udfff"]', "surrogates not allowed"),
        (b"[" + b"[]," * 330_000 + b"[]]", None),
        (b"[" + b"[]," * 600_000 + b"[]]", "more than 1000000 values"),
        (b"{" + b'"a":1,' * 1_000_001 + b'"b":1}', "more than 1000000 values"),
    ],
)
def test_json_beyond_the_limits(tmp_path: Path, content: bytes, says: str | None) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    if says is None:
        read_json(path, REMEDY, 10**8)
    else:
        refused(path, says, most_bytes=10**8)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.touch()
    os.truncate(path, 10**12)  # sparse
    refused(path, "has more than 1 MiB")
    path.write_text("[" + " " * (2**20 - 2) + "]")
    assert read_json(path, REMEDY) == []  # negative control: as large as it may be


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size says nothing: that of /proc's files is 0, too."""
    path = tmp_path / "file.json"
    path.write_text("[" + " " * 2**20 + "]")

    class Small:
        st_mode = os.stat(path).st_mode
        st_size = 2

    monkeypatch.setattr(os, "fstat", lambda descriptor: Small())
    refused(path, "has more than 1 MiB")


def loop(path: Path) -> None:
    path.symlink_to(path)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": loop,
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "file.json"
    make(path)
    refused(path, "is no plain file|cannot be read")


def test_the_machine_s_own_trouble_is_not_the_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: Any) -> int:
        raise OSError(24, "Too many open files")

    (tmp_path / "file").touch()
    open_plain(tmp_path / "file", REMEDY).close()
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        open_plain(tmp_path / "file", REMEDY)
