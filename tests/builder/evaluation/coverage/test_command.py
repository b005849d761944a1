"""`python -m builder.evaluate --coverage` on two drawn clips: a table, a JSON line and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from builder.evaluation.coverage.measure import measure_coverage
from builder.evaluation.passes import ClipPasses
from earlytom.config import EarlyTomConfig
from earlytom.methods.earlytom import EarlyTom
from runtime.drawing.clips import draw_clip, write_test_clip
from runtime.video import load_clip
from tests.builder.evaluation.test_evaluate import Command, command, last_line
from tests.builder.evaluation.test_methods import vision

__all__ = ["command"]  # the fixture


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    write_test_clip(folder / "task.mp4", 3)
    draw_clip(folder / "scenes.mp4", seconds=2.0)
    return [folder / "task.mp4", folder / "scenes.mp4"]


def test_two_clips(command: Command, videos: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='matplotlib is not installed (pip install ".[plot]")')
    picture, figures = tmp_path / "coverage.png", tmp_path / "coverage.json"
    words = ["--coverage", *map(str, videos), "--frames", "8", "--ratios", "0.2", "--frame-budget", "6,4,3"]
    status, stdout, stderr = command(*words, "--plot", str(picture), "--json", str(figures))
    assert (status, stderr) == (0, "")
    line = last_line(stdout)
    assert [one["video"] for one in line["coverage"]] == list(map(str, videos))
    assert json.loads(figures.read_text())["mean"][0]["tokens"] == 42
    for one in line["coverage"]:
        assert [row["method"] for row in one["results"]] == [
            "EarlyTom budget 0.2",
            "cells 0.2",
            "uniform frame dropping",
        ]
        assert [row["frames"] for row in one["results"]] == [3, 3, 2]
    for place, mean in enumerate(line["mean"]):
        each = [one["results"][place]["cell_changed"] for one in line["coverage"]]
        assert mean["cell_changed"] == pytest.approx(np.mean(each))
    for shown in ("task.mp4: 8 frames", "mean of 2 videos", "most changed", str(picture)):
        assert shown in stdout
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")

    # what the line says is what the library finds, with these settings and no others
    clip = ClipPasses(vision(), load_clip(videos[0], 8, (72, 72)).frames, 0)
    config = EarlyTomConfig(0.2, (2, 4, 6), schedule="budget", frame_budget=(6, 4, 3))
    (found, _) = measure_coverage(clip, [("", EarlyTom(config))])
    said = line["coverage"][0]["results"][0]
    assert said["cell_changed"] == pytest.approx(found.changed_mean, abs=1e-5)
    (other, _) = measure_coverage(clip, [("", EarlyTom(config.replace(frame_budget=(8, 8, 8))))])
    assert abs(said["frame_mean"] - float(other.frames.mean())) > 1e-3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--coverage", "nowhere.mp4"], "--coverage nowhere.mp4: no such file"),
        (["--coverage", __file__], "cannot be read as a video"),
        (["--coverage", __file__, "--frames", "1"], "--frames must be "),
        (["--coverage", __file__, "--record"], "--coverage goes without --engine, --record, --budgets"),
        (["--coverage", __file__, "--frames", "4", "--frame-budget", "6,4,3"], "more than the 4 frames"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(command: Command, words: list[str], said: str) -> None:
    status, _, stderr = command(*words)
    assert status == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert said in stderr
