"""A small run of `python -m tests.fuzz_video`, and that it sees what it counts."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("tests.fuzz_video")


def test_sixty_broken_files_are_frames_or_one_line() -> None:
    command = [sys.executable, "-m", "tests.fuzz_video", "60", "7"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(done.stdout.splitlines()[-1])
    assert tally["frames"] + tally["one line"] == 60
    assert tally["frames"] > 10
    assert tally["one line"] > 10


def test_files_are_broken_by_the_seed_alone(fuzz: Any, tmp_path: Path) -> None:
    clips = fuzz.write_clips(tmp_path)
    made = [fuzz.broken(clips, 1, index) for index in range(50)]
    assert made == [fuzz.broken(clips, 1, index) for index in range(50)]
    assert made != [fuzz.broken(clips, 2, index) for index in range(50)]
    assert sum(content != path.read_bytes() for path, content in made) > 40


@pytest.mark.parametrize(
    ("does", "outcome"), [("os.abort()", "crash"), ("time.sleep(1000)", "hang"), ("sys.exit(3)", "crash")]
)
def test_a_process_that_does_not_get_through_is_counted(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, outcome: str
) -> None:
    start = subprocess.Popen
    program = f"import os, sys, time; print('{{\"begins\": 0}}', flush=True); {does}"
    monkeypatch.setattr(fuzz, "HANG", 0.5)
    monkeypatch.setattr(fuzz.subprocess, "Popen", lambda _, **given: start([sys.executable, "-c", program], **given))
    tally, failures = fuzz.run(1, 5, tmp_path)
    assert [name for _, name in tally] == [outcome]
    assert [failure["outcome"] for failure in failures] == [outcome]


def test_an_error_of_another_kind_is_counted(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fuzz.write_clips(tmp_path)
    calls = []

    def load(*given: Any, **kinds: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise IndexError("of PyAV's")

    monkeypatch.setattr(fuzz, "load_clip", load)
    fuzz.load_all(tmp_path, 5, 0, 2)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["outcome"] for line in lines if "ends" in line] == ["traceback", "frames"]
    assert "IndexError" in lines[1]["told"]
