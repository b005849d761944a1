"""The build command from end to end: what it publishes, what it reuses, and that it leaves nothing half-done."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from builder import build, cache, stages
from builder.gate import accuracy, stage
from builder.gate.limits import GATES
from builder.inspection.page import REPORT_PAGE
from builder.settings.arguments import parse
from builder.settings.config import project_version
from earlytom.budget import frames_per_stage, token_count
from earlytom.errors import UserError
from runtime import cli
from runtime.drawing.clips import draw_clip
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from tests.builder.conftest import FRAMES
from tests.builder.needed import needs_rtx
from tests.processes import HANG_SECONDS
from tests.shared import Shared
from tests.warm import WarmPopen

ROOT = Path(build.__file__).resolve().parents[1]
FILES = {
    layout.MANIFEST_FILE,
    layout.ONNX_FILE,
    layout.REFERENCE_INPUTS_FILE,
    layout.REFERENCE_OUTPUTS_FILE,
    layout.REPORT_FILE,
}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(build_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process with --out in `tmp_path`: status, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run(build.main, [*build_arguments, "--out", str(tmp_path / "out"), *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder of engines."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def built(engine: Path, out: Path) -> Path:
    """The session's engine as if it had been built in `out`."""
    return Path(shutil.copytree(engine, out / engine.name))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*args: Any) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(stages, "export", export)


def last_line(stdout: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return record


# The command, whose graph is copied if it was exported before.
EXPORTED = """
import sys
from pathlib import Path
from builder import build, stages
from runtime import cli
from tests.exports import once
from tests.shared import Shared
stages.export = once(Shared(*map(Path, sys.argv[1:3])), stages.export)
cli.stop_by_signal()
sys.exit(cli.run(build.main, sys.argv[3:]))
"""


def start(
    words: list[str], popen: type[subprocess.Popen[str]] = WarmPopen, how: tuple[str, ...] = ("-m", "builder.build")
) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return popen(
        [sys.executable, "-u", *how, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_folder_is_what_the_manifest_says(engine: Path, build_arguments: list[str]) -> None:
    assert {path.name for path in engine.iterdir()} == FILES | {REPORT_PAGE}
    manifest = Manifest.read(engine)
    config = parse(build_arguments)[1]
    assert manifest.name == engine.name == config.name(manifest.key)
    assert manifest.key == config.key()
    assert set(manifest.files) == FILES - {layout.MANIFEST_FILE}
    assert manifest.project_version == project_version()
    assert manifest.verification is not None
    assert manifest.verification["passed"] is True
    assert manifest.verification["clips"] == ["drawn clip"]
    assert manifest.model.digest == config.checkpoint.digest()
    assert (manifest.frames, manifest.tokens_full, manifest.dim) == (FRAMES, FRAMES * 25, 256)
    assert manifest.frames_per_stage == frames_per_stage(FRAMES, merges=2)
    assert manifest.tokens == token_count(FRAMES, 25, 0.3, merges=2)
    assert (manifest.dtype, manifest.target, manifest.backend) == ("fp16", "8.0", "onnx")
    assert manifest.figures["flops_vision"] == config.flops["vision"]
    assert manifest.figures["build_peak_bytes"] > 2**20


def test_the_whole_command_tells_its_stages(command: Command, out: Path) -> None:
    """A build without the gate; then one with it, which the unverified engine does not satisfy."""
    status, stdout, stderr = command("--no-verify")
    assert (status, stderr) == (0, "")
    (folder,) = out.iterdir()
    manifest = Manifest.read(folder)
    assert (manifest.verification, manifest.polygraphy) == (None, "")
    assert {path.name for path in folder.iterdir()} == {
        layout.MANIFEST_FILE,
        layout.ONNX_FILE,
        layout.REPORT_FILE,
        REPORT_PAGE,
    }
    lines = stdout.splitlines()
    stages = [line for line in lines if line.startswith(("export:", "compile:", "verify:"))]
    assert [line.split(":")[0] for line in stages] == ["export", "export"]
    assert any("not verified" in line for line in lines)
    assert any(str(folder) in line and "python -m runtime.ask" in line for line in lines)
    record = last_line(stdout)
    assert (record["built"], record["cached"], record["verified"]) == (True, False, None)

    status, stdout, _ = command()
    assert status == 0
    assert "not verified: it is built again" in stdout
    assert "verify: done" in stdout
    assert "share of next tokens that agree" in stdout  # the decoder is small, so the gate's last step runs
    assert [path.name for path in out.iterdir()] == [folder.name]
    manifest = Manifest.read(folder)
    assert manifest.verification is not None
    assert last_line(stdout)["verified"] is True
    assert manifest.polygraphy


@pytest.mark.usefixtures("no_export")
def test_an_unchanged_build_returns_at_once_and_says_so(command: Command, built: Path, out: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    for words in ((), ("--no-verify",)):
        status, stdout, stderr = command(*words)
        assert (status, stderr) == (0, "")
        assert "unchanged" in stdout
        assert "--force" in stdout
        record = last_line(stdout)
        assert (record["built"], record["cached"], record["verified"]) == (False, True, True)
        assert record["folder"] == str(built)
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before
    assert list(out.iterdir()) == [built]


def test_force_builds_again(command: Command, built: Path, out: Path) -> None:
    inode = (built / layout.ONNX_FILE).stat().st_ino
    status, stdout, _ = command("--force", "--no-verify")
    assert status == 0
    assert "unchanged" not in stdout
    assert last_line(stdout)["built"] is True
    assert (built / layout.ONNX_FILE).stat().st_ino != inode
    assert list(out.iterdir()) == [built]


def test_a_damaged_folder_is_built_again(command: Command, built: Path, out: Path) -> None:
    content = bytearray((built / layout.ONNX_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (built / layout.ONNX_FILE).write_bytes(content)
    status, stdout, _ = command("--no-verify")
    assert status == 0
    assert "damaged" in stdout
    Manifest.read(built)
    assert list(out.iterdir()) == [built]


@pytest.mark.usefixtures("no_export")
def test_dry_run_builds_nothing_and_counts_like_the_budget(command: Command, tmp_path: Path) -> None:
    words = ("--dry-run", "--ratio", "0.2", "--frame-budget", "0.5")
    status, stdout, stderr = command(*words)
    assert (status, stderr) == (0, "")
    assert not (tmp_path / "out").exists()
    record = last_line(stdout)
    rule: Any = {"merges": 2, "frame_budget": 0.5}
    assert record["tokens"] == token_count(FRAMES, 25, 0.2, **rule)
    assert record["frames_per_stage"] == list(frames_per_stage(FRAMES, **rule))
    assert (record["tokens_full"], record["built"], record["cached"]) == (FRAMES * 25, False, False)
    assert record["flops"]["vision"] < record["flops"]["vision_full"]
    for shown in (record["key"], record["folder"], "nothing was built", "tokens to the LLM", "after layer 2"):
        assert shown in stdout


@pytest.mark.usefixtures("no_export")
def test_json_is_one_line(command: Command, built: Path) -> None:
    for words in (("--json",), ("--json", "--dry-run")):
        status, stdout, stderr = command(*words)
        assert (status, stderr) == (0, "")
        assert stdout.count("\n") == 1
        assert json.loads(stdout)["folder"] == str(built)


def test_two_builds_of_one_thing_do_the_work_once(build_arguments: list[str], out: Path) -> None:
    """Two processes at once: one builds, the other waits and takes what was built. Both print one JSON line."""
    words = [*build_arguments, "--out", str(out), "--no-verify", "--json"]
    records = []
    for process in [start(words), start(words)]:
        stdout, stderr = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, stderr
        assert stdout.count("\n") == 1
        assert stderr == ""
        records.append(json.loads(stdout))
    assert sorted(record["built"] for record in records) == [False, True]
    assert sorted(record["cached"] for record in records) == [False, True]
    assert records[0]["folder"] == records[1]["folder"]
    assert records[0]["figures"] == records[1]["figures"]  # of the same build
    assert list(out.iterdir()) == [Path(records[0]["folder"])]
    Manifest.read(records[0]["folder"])


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("plan", signal.SIGINT),
        ("calibrate", signal.SIGTERM),
        ("export", signal.SIGINT),
        ("compile", signal.SIGINT),
        ("compile", signal.SIGTERM),
        ("verify", signal.SIGTERM),
    ],
)
def test_an_interrupted_build_leaves_nothing_behind(
    build_arguments: list[str], out: Path, shared: Shared, stage: str, number: int
) -> None:
    words = [*build_arguments, "--out", str(out)]
    if stage == "calibrate":
        words += ["--schedule", "adaptive"]
    if stage == "compile":
        if importlib.util.find_spec("tensorrt_rtx") is None:
            pytest.skip("tensorrt-rtx is not installed (pip install .[rtx])")
        words[words.index("--backend") + 1] = "tensorrt-rtx"
    if stage in ("compile", "verify"):
        process = start(words, how=("-c", EXPORTED, str(shared.root), str(shared.own)))
    else:
        process = start(words, subprocess.Popen if stage == "calibrate" else WarmPopen)  # once as a user starts it
    assert process.stdout is not None
    mark = "backend:" if stage == "plan" else f"{stage}:"
    assert any(line.startswith(mark) for line in process.stdout)
    assert list(out.iterdir()) or stage == "plan"  # it works there
    process.send_signal(number)
    rest, stderr = process.communicate(timeout=HANG_SECONDS)
    # A Python that was interrupted inside exec() of a string (torch and dataclasses do that) ends by SIGINT itself once
    # everything is cleaned up; a shell reports 130 for both.
    assert process.returncode in (cli.INTERRUPTED, -signal.SIGINT), stderr
    assert stderr == "interrupted\n"
    assert "engine:" not in rest
    assert not list(out.iterdir())


def test_a_build_that_waits_for_another_can_be_interrupted(build_arguments: list[str], engine: Path, out: Path) -> None:
    with cache.staging(out / engine.name, lambda: None) as place:
        process = start([*build_arguments, "--out", str(out)])
        assert process.stdout is not None
        assert any("waiting for it" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode in (cli.INTERRUPTED, -signal.SIGINT), stderr
        assert stderr == "interrupted\n"
        assert sorted(path.name for path in out.iterdir()) == sorted([place.name, f".{engine.name}.lock"])
    assert not list(out.iterdir())


def test_a_build_clears_what_killed_ones_left(command: Command, built: Path, out: Path) -> None:
    """Also of engines of another key, as any change of the code makes it."""
    (out / ".building-older" / "deep").mkdir(parents=True)
    (out / ".older.lock").touch()
    status, _, stderr = command("--force", "--no-verify")
    assert (status, stderr) == (0, "")
    assert list(out.iterdir()) == [built]


@pytest.mark.parametrize("stage", ["export", "describe"])
def test_an_out_that_vanishes_is_one_line(
    command: Command, out: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is removed by somebody else, at the beginning and at the end of a build."""
    real = getattr(stages, stage)

    def vanishing(*words: Any) -> Any:
        if stage == "describe":
            made = real(*words)
            shutil.rmtree(out)
            return made
        shutil.rmtree(out)
        return real(*words)

    monkeypatch.setattr(stages, stage, vanishing)
    status, _, stderr = command("--no-verify")
    assert (status, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("error: ")
    assert str(out) in stderr
    assert not out.exists()


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path)])
def test_an_out_that_is_no_folder_is_one_line(
    build_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    make(tmp_path / "out")
    assert cli.run(build.main, [*build_arguments, "--out", str(tmp_path / "out"), "--no-verify"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: cannot write to {tmp_path / 'out'}: ")
    assert stderr.endswith("choose another folder with --out\n")
    assert stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["out"]


def test_what_fails_the_gate_is_not_published(
    command: Command, built: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = replace(GATES["fp16"], cosine=1.5)
    monkeypatch.setitem(GATES, "fp16", impossible)
    status, stdout, stderr = command("--force")
    assert status == 2
    assert stderr.startswith("error: the graph does not reproduce the model: hidden_1: cosine is ")
    assert stderr.count("\n") == 1
    assert "FAILED" in stdout
    assert list(out.iterdir()) == [built]  # the engine that was there stays
    Manifest.read(built)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_no_more(command: Command, out: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def half(config: Any, place: Path, int8: Any) -> None:
        (place / layout.ONNX_FILE).write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stages, "export", half)
    status, _, stderr = command()
    assert status == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert not list(out.iterdir())


def test_a_disk_that_is_really_full(build_arguments: list[str], out: Path) -> None:
    """A file system of 1 MiB in a namespace of its own, where this system lets us have one."""
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(out)]
    if (
        shutil.which("unshare") is None
        or subprocess.run(probe, capture_output=True, check=False, timeout=HANG_SECONDS).returncode
    ):
        pytest.skip("no file system can be mounted here (user namespaces are off)")
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && "$@"; status=$?; ls -A "$OUT"; exit $status'
    words = [sys.executable, "-m", "builder.build", *build_arguments, "--out", str(out), "--no-verify"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(out), *words],
        cwd=ROOT,
        env={**os.environ, "OUT": str(out)},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 2, done.stderr[-500:]
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "no space" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("export:")  # the listing after it shows nothing


def test_the_gate_runs_on_the_clips_given(command: Command, videos: tuple[Path, ...], tmp_path: Path) -> None:
    """Two files of one name count as two."""
    same = tmp_path / "elsewhere" / videos[0].name
    same.parent.mkdir()
    draw_clip(same, seconds=2, seed=7)
    status, stdout, stderr = command("--fp32", "--calibration", str(videos[0]), str(same))
    assert (status, stderr) == (0, "")
    manifest = Manifest.read(last_line(stdout)["folder"])
    assert manifest.verification is not None
    assert manifest.verification["clips"] == [str(videos[0]), str(same)]


@pytest.mark.usefixtures("no_export")
def test_a_clip_that_cannot_be_read_costs_no_export(command: Command, out: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    status, _, stderr = command("--calibration", str(tmp_path / "text.mp4"))
    assert status == 2
    assert "text.mp4" in stderr
    assert not list(out.iterdir())


def test_decoder_is_loaded_for_the_gate_only_where_its_text_means_something(
    build_arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def next_tokens(checkpoint: Any) -> None:
        asked.append(checkpoint.source)
        raise UserError("stop here")

    monkeypatch.setattr(stage, "NextTokens", next_tokens)
    monkeypatch.setattr(accuracy, "verify", lambda *args, **options: (_ for _ in ()).throw(UserError("gate")))
    clips = {FRAMES: {"clip": torch.zeros(FRAMES, 3, 72, 72, dtype=torch.uint8)}}
    screen = cli.Screen(json_only=True)
    for limit, words, loads in (
        (0, [], 0),
        (stage.SMALL_DECODER, [], 1),
        (stage.SMALL_DECODER, ["--no-verify-text"], 0),
        (0, ["--verify-text"], 1),
    ):
        options, config, _ = parse([*build_arguments, *words])
        monkeypatch.setattr(stage, "SMALL_DECODER", limit)
        asked.clear()
        with pytest.raises(UserError, match="stop here" if loads else "gate"):
            stage.check_each(config, cast(Any, None), [tmp_path], clips, screen, with_text=options.verify_text)
        assert len(asked) == loads


@needs_rtx
def test_an_engine_is_compiled_and_published(command: Command) -> None:
    status, stdout, stderr = command("--backend", "tensorrt-rtx", "--no-verify")
    assert (status, stderr) == (0, "")
    folder = Path(last_line(stdout)["folder"])
    manifest = Manifest.read(folder)
    assert manifest.backend == "tensorrt-rtx"
    assert {layout.ENGINE_FILE, layout.LAYERS_FILE, layout.ONNX_FILE} <= set(manifest.files)
    report = json.loads((folder / layout.REPORT_FILE).read_text())
    assert len(report["compile"]["layers"]["attention_fused"]) == 3  # all but the explicit one
    assert manifest.figures["compile_seconds"] > 0
    assert [line.split(":")[0] for line in stdout.splitlines() if ": done in" in line] == ["export", "compile"]


# From Python


def test_an_engine_is_built_from_python(build_arguments: list[str], tmp_path: Path) -> None:
    config = parse(build_arguments)[1]
    told: list[str] = []
    folder = build.build_engine(config, tmp_path, verify=False, say=told.append)
    assert Manifest.read(folder).key == config.key()
    assert [line.split(":")[0] for line in told] == ["export", "export"]
    told.clear()
    assert build.build_engine(config, tmp_path, verify=False, say=told.append) == folder
    assert told[0].startswith(f"unchanged: {folder} was built ")
    assert len(told) == 1


def test_what_the_gate_measures_is_told_line_by_line(build_arguments: list[str], tmp_path: Path) -> None:
    told: list[str] = []
    folder = build.build_engine(parse(build_arguments)[1], tmp_path, say=told.append)
    assert Manifest.read(folder).verification["passed"]  # type: ignore[index]
    assert any(line.startswith("step ") and "limit" in line for line in told)
    assert not any("\n" in line for line in told)


def test_a_model_that_cannot_be_asked_is_refused_from_python(
    build_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(build_arguments)[1]

    def refuse(checkpoint: Any) -> None:
        raise UserError("no chat template")

    monkeypatch.setattr("builder.source.load_tokenizer", refuse)
    with pytest.raises(UserError, match="no chat template"):
        build.build_engine(config, tmp_path / "out", say=lambda _: None)
    assert not (tmp_path / "out").exists()
