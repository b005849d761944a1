"""Everything a user can get wrong about a build: one line with the value and the remedy, status 2, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from builder import build
from earlytom import micro
from runtime import cli, trt
from tests.processes import HANG_SECONDS

ROOT = Path(build.__file__).resolve().parents[1]
ONNX = ["--backend", "onnx"]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to trip over: text.mp4, one.mp4 (one frame), empty.mp4, `other` (a checkpoint of another family)."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "empty.mp4").touch()
    with av.open(str(folder / "one.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")))
        container.mux(stream.encode())
    (folder / "other").mkdir()
    for path in Path(micro.PATH).glob("*.json"):
        shutil.copy(path, folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(config | {"model_type": "blip_2"}))
    return folder


# What is typed, and what the line must hold: the value that is wrong, and what mends it.
CASES = [
    ("--ratio 0", ["--ratio", "(0, 1]", "0.0"]),
    ("--ratio 1.5", ["--ratio", "(0, 1]", "1.5"]),
    ("--ratio -0.3", ["--ratio", "(0, 1]", "-0.3"]),
    ("--ratio nan", ["--ratio", "(0, 1]", "nan"]),
    ("--ratio inf", ["--ratio", "(0, 1]", "inf"]),
    ("--ratio abc", ["--ratio", "'abc'", "not a number"]),
    ("--frames 0", ["--frames", "got 0", "between 1 and 128"]),
    ("--frames -1", ["--frames", "got -1", "between 1 and 128"]),
    ("--frames 1000", ["--frames", "got 1000", "between 1 and 128"]),
    ("--frames 2.5", ["--frames", "'2.5'", "whole number"]),
    ("--tau 2", ["--tau", "[-1, 1]", "2.0"]),
    ("--tau nan", ["--tau", "[-1, 1]", "nan"]),
    ("--compression fast", ["--compression", "'fast'", "auto", "plugin", "native"]),
    ("--compression plugin", ["--compression", "ONNX file", "--compression native", "--backend tensorrt"]),
    ("--model {place}/none", ["--model", "{place}/none", "no such folder", "ORG/NAME"]),
    ("--model {place}/text.mp4", ["--model", "{place}/text.mp4", "is a file"]),
    ("--model {place}", ["--model", "config.json"]),
    ("--model {place}/other", ["--model", "'blip_2'", "llava_onevision"]),
    ("--model random:gpt-5", ["random:gpt-5", "random: knows", "llava-onevision-qwen2-7b-ov"]),
    ("--merge-layers 2,99", ["--merge-layers", "99", "0 to 7", "for example"]),
    ("--merge-layers a,b", ["--merge-layers", "'a,b'", "none"]),
    ("--merge-layers 4,2", ["--merge-layers", "ascending", "(4, 2)"]),
    ("--merge-layers -1", ["--merge-layers", "-1"]),
    ("--frame-budget 0", ["--frame-budget", "(0, 1]", "0.0"]),
    ("--frame-budget x", ["--frame-budget", "'x'", "0.75"]),
    ("--frame-budget 9,8", ["--frame-budget", "2 frame counts for 3 merge layers"]),
    ("--frame-budget 7,8,9", ["--frame-budget", "[7, 8, 9]", "grow"]),
    ("--frame-budget 40,7,7", ["--frame-budget", "40", "16 frames", "--frames"]),
    ("--frame-budget 7,0,0", ["--frame-budget", "at least 1", "0"]),
    ("--target h200", ["--target", "'h200'", "a100", "8.0"]),
    ("--schedule adaptive --frame-budget 0.5", ["--frame-budget", "--schedule budget", "the video decides"]),
    ("--schedule adaptive --frame-budget auto", ["--frame-budget", "--schedule budget"]),
    ("--preset videomme --ratio 0.3", ["'videomme'", "0.3", "0.25", "--merge-layers"]),
    ("--preset kinetics", ["--preset", "'kinetics'", "videomme"]),
    ("--preset videomme --ratio 0.1", ["10", "0 to 7", "--merge-layers"]),  # made for 26 layers
    ("--workspace 0", ["--workspace", "0.0"]),
    ("--workspace inf", ["--workspace", "inf"]),
    ("--workspace nan", ["--workspace", "nan"]),
    ("--calibration {place}/none.mp4", ["--calibration", "{place}/none.mp4", "no such file"]),
    ("--calibration {place}", ["--calibration", "{place}", "not a file", "video files"]),
    ("--no-verify --verify-text", ["--verify-text", "--no-verify", "one of the two"]),
    ("--out {place}/caf\udce9", ["--out", "UTF-8", "LC_ALL"]),
    ("--calibration {place}/text.mp4", ["text.mp4", "FFmpeg"]),
    ("--calibration {place}/one.mp4", ["one.mp4", "1 frame", "at least 2"]),
    ("--calibration {place}/empty.mp4", ["empty.mp4", "empty", "copy or download it again"]),
    ("--out {place}/text.mp4", ["{place}/text.mp4", "--out"]),
    ("--out {place}/text.mp4/below", ["{place}/text.mp4/below", "--out"]),
    ("--out /proc/nowhere", ["/proc/nowhere", "--out"]),
    ("--hardware-compatible", ["--hardware-compatible", "--backend tensorrt", "onnx"]),
    ("--fp16 --fp32", ["--fp32", "--fp16"]),
    ("--verify", ["--verify", "--help"]),  # no abbreviation of --verify-text
    ("--nonsense", ["--nonsense", "--help"]),
    ("video.mp4", ["video.mp4", "--help"]),
    ("--backend cuda", ["--backend", "'cuda'", "onnx"]),
    ("--ratio", ["--ratio", "expected one argument"]),
]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, hold its failure against the rule of one line, and return the line."""
    assert cli.run(build.main, words) == cli.USER_ERROR
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    assert len(stderr) < 400
    return stderr


@pytest.mark.parametrize(("typed", "said"), CASES, ids=[typed for typed, _ in CASES])
def test_one_line_with_the_remedy(
    typed: str, said: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(place=place) for word in typed.split()]
    line = refused([*ONNX, "--out", str(tmp_path / "out"), *words], capsys)
    for part in said:
        assert part.format(place=place) in line, line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_same_command_without_a_fault_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative control: what is refused above is refused for its fault."""
    words = [*ONNX, "--out", str(tmp_path / "out"), "--ratio", "0.3", "--merge-layers", "2,4,6", "--dry-run"]
    assert cli.run(build.main, words) == cli.OK
    assert capsys.readouterr().err == ""


@pytest.mark.skipif("tensorrt" in trt.flavours(), reason="tensorrt is installed here, so it is not missing")
def test_missing_tensorrt_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["--backend", "tensorrt", "--out", str(tmp_path)], capsys)
    assert "tensorrt" in line
    assert "pip install" in line


@pytest.mark.skipif("tensorrt-rtx" not in trt.flavours(), reason="tensorrt-rtx is not installed (pip install .[rtx])")
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--hardware-compatible", ["--hardware-compatible", "--backend tensorrt", "tensorrt-rtx"]),
        ("--target 7.0", ["7.0", "8.0", "--target"]),
        ("--target 99.9 --dry-run", ["99.9", "8.0", "--target"]),
        ("--compression plugin", ["--compression", "tensorrt-rtx has no plugins", "--backend tensorrt", "native"]),
    ],
)
def test_what_tensorrt_rtx_cannot_do(
    typed: str, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["--backend", "tensorrt-rtx", "--out", str(tmp_path), *typed.split()], capsys)
    assert all(part in line for part in said), line
    assert not list(tmp_path.iterdir())


def test_as_a_process(tmp_path: Path) -> None:
    """The real command, once: exit status, one line on stderr, nothing on stdout."""
    words = [sys.executable, "-m", "builder.build", "--ratio", "1.5", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --ratio must be in (0, 1], got 1.5\n"
