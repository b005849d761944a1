"""A part in a process of its own: however it ends, there is one outcome, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builder.doctor import isolated
from builder.doctor.isolated import FAILED, NOT_HERE, OK, PartOutcome
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[3]
STAND_INS = "tests.builder.doctor.stand_ins:"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def outcome(name: str, place: Path, seconds: float = HANG_SECONDS, **arguments: object) -> PartOutcome:
    return isolated.run(f"{STAND_INS}{name}", arguments, seconds=seconds, log=place / "part.log")


def test_a_part_that_works_has_figures(tmp_path: Path) -> None:
    found = outcome("well", tmp_path, answer=42)
    assert (found.status, found.why, found.figures) == (OK, "", {"given": "", "answer": 42})
    assert found.seconds > 0
    assert (tmp_path / "part.log").read_text() == "this is for the log\n"


@pytest.mark.parametrize(
    ("name", "status", "why"),
    [
        ("crash", FAILED, "the process was ended by SIGSEGV, in crash ("),
        ("killed", FAILED, "the system ended the process, as it does where memory is short"),
        ("leave", FAILED, "the process ended with status 7 and said nothing: a library says goodbye"),
        ("refused", FAILED, "give another --flag"),
        ("wrong", FAILED, "3 of 5 are equal"),
        ("absent", NOT_HERE, "there is no such library"),
        ("defect", FAILED, "ValueError: one line"),
        ("no_memory", FAILED, "not enough memory"),
        ("missing", FAILED, "AttributeError: module"),
    ],
)
def test_every_end_is_a_line(name: str, status: str, why: str, tmp_path: Path) -> None:
    found = outcome(name, tmp_path)
    assert found.status == status
    assert found.why.startswith(why), found.why
    assert "\n" not in found.why


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    started = tmp_path / "started"
    found = outcome("hang", tmp_path, 6.0, started=str(started))
    assert found.status == FAILED
    assert found.why.startswith("not done after 6 s, in hang ("), found.why
    assert started.exists()  # the limit is long enough for that
    assert not _running(str(started))


def _running(word: str) -> list[str]:
    """Processes with a word in their command lines; what has just been ended may still be on its way out."""
    end = time.monotonic() + HANG_SECONDS
    while time.monotonic() < end:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            if word in text and path.parent.name != str(os.getpid()):
                found.append(text)
        if not found:
            return []
        time.sleep(0.05)
    return found


def test_variables_are_for_the_part_alone(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    run = {"seconds": HANG_SECONDS, "log": log, "environment": {"DOCTORED": "yes"}}
    found = isolated.run(f"{STAND_INS}environment", {"name": "DOCTORED"}, **run)  # type: ignore[arg-type]
    assert found.figures == {"value": "yes"}
    assert "DOCTORED" not in os.environ


def test_an_outcome_of_before_is_not_taken_for_this_one(tmp_path: Path) -> None:
    assert outcome("well", tmp_path).status == OK
    assert outcome("leave", tmp_path).status == FAILED


def test_a_part_ends_with_its_parent(tmp_path: Path) -> None:
    """However that ends: a signal that cannot be caught, here."""
    started = tmp_path / "started"
    call = (
        "from pathlib import Path; from builder.doctor import isolated; "
        f"isolated.run('{STAND_INS}hang_alone', {{'started': {str(started)!r}}}, seconds=600, "
        f"log=Path({str(tmp_path)!r}) / 'a.log')"
    )
    parent = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT)
    end = time.monotonic() + HANG_SECONDS
    while not started.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert started.exists()
    parent.send_signal(signal.SIGKILL)
    parent.wait(HANG_SECONDS)
    assert not _running(str(tmp_path))


def test_ctrl_c_ends_what_runs(tmp_path: Path) -> None:
    started = tmp_path / "started"
    call = f"""
from pathlib import Path
from builder.doctor import isolated
from runtime import cli

def main(_):
    with isolated.side_by_side(2) as pool:
        part = dict(seconds=600, log=Path({str(tmp_path)!r}) / "a.log")
        pool.submit(isolated.run, "{STAND_INS}hang_alone", {{"started": {str(started)!r}}}, **part).result()

raise SystemExit(cli.run(main, None))
"""
    parent = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + HANG_SECONDS
    while not started.exists() and time.monotonic() < end:
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=HANG_SECONDS)
    assert (parent.returncode, said) == (130, "interrupted\n")
    assert not _running(str(tmp_path))
