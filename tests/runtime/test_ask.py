"""`python -m runtime.ask`: what it prints, and one line for everything that can be wrong with what it is given."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from earlytom.errors import UserError
from runtime import ask, cli, trt
from runtime.drawing.clips import draw_clip
from runtime.engine.manifest import Manifest, describe_files
from runtime.pipeline import Pipeline
from runtime.video import load_clip
from tests.processes import HANG_SECONDS
from tests.warm import WarmPopen

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "What happens?"
STAGES = ("waiting", "decode", "preprocess", "vision", "prefill", "first_token", "per_token", "total")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(engine: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("--json", video=..., question=..., engine=...)`: status, stdout, stderr of the command in this process."""

    def call(
        *words: str, video: Path | str = drawn_clip, question: str = QUESTION, engine: Path | None = engine
    ) -> tuple[int, str, str]:
        capsys.readouterr()
        folder = () if engine is None else ("--engine", str(engine))
        status = cli.run(ask.main, [str(video), question, *folder, "--device", "cpu", "--max-new-tokens", "6", *words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """`run`, which must be refused with status 2 and one line; returns the line."""

    def call(*words: str, **changes: Any) -> str:
        status, out, err = run(*words, **changes)
        assert status == 2, (out, err)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        return err

    return call


def start(*words: str, popen: type[subprocess.Popen[str]] = subprocess.Popen) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return popen(
        [sys.executable, "-m", "runtime.ask", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# What it prints


def test_the_answer_the_times_and_one_json_line(run: Run, engine: Path, drawn_clip: Path) -> None:
    status, out, err = run()
    assert (status, err) == (0, "")
    *lines, last = out.splitlines()
    record = json.loads(last)
    with Pipeline.load(engine, device="cpu") as pipeline:
        answer = pipeline.ask(drawn_clip, QUESTION, max_new_tokens=6)
    assert record["answer"] == answer.text != ""
    assert answer.text in out[: out.index("stage")]  # streamed, before the table
    assert record["tokens"] == 6
    assert record["visual_tokens"] == answer.visual_tokens
    assert record["visual_tokens_full"] == pipeline.manifest.tokens_full
    assert (record["engine"], record["backend"]) == (engine.name, "onnxruntime")
    assert tuple(record["seconds"]) == STAGES
    for stage in (
        "waiting",
        "decode video",
        "preprocess",
        "vision engine",
        "prefill",
        "first token",
        "per further token",
        "total",
    ):
        assert any(re.match(rf"{stage}\b.* \d+\.\d$", line) for line in lines), stage
    assert any("not trained" in line for line in lines) == (not pipeline.manifest.model.trained)


def test_several_questions_about_one_video(run: Run, engine: Path, drawn_clip: Path) -> None:
    other = "How many balls are there?"
    status, out, err = run(other, QUESTION)
    assert (status, err) == (0, "")
    record = json.loads(out.splitlines()[-1])
    with Pipeline.load(engine, device="cpu") as pipeline:
        wanted = {q: pipeline.ask(drawn_clip, q, max_new_tokens=6).text for q in (QUESTION, other)}
    assert wanted[QUESTION] != wanted[other]
    assert [one["question"] for one in record["answers"]] == [QUESTION, other, QUESTION]
    assert [one["answer"] for one in record["answers"]] == [wanted[QUESTION], wanted[other], wanted[QUESTION]]
    assert [one["seconds"]["vision"] for one in record["answers"]] == [0, 0, 0]
    assert re.search(r"^encoded and read the video in \d+\.\d ms$", out, re.MULTILINE)
    assert out.index(f"> {QUESTION}") < out.index(wanted[QUESTION]) < out.index(f"> {other}")
    assert re.search(r"^first token .*( +\d+\.\d){3} *$", out, re.MULTILINE)


def test_the_answer_comes_bit_by_bit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(cli.Screen, "write", lambda self, text: written.append(text))
    status, out, _ = run()
    assert status == 0
    begin = next(i for i, text in enumerate(written) if not text.startswith(("engine: ", "note: ")))
    end = next(i for i, text in enumerate(written) if text.startswith("stage"))
    pieces = written[begin : end - 1]  # a line end comes before the table
    assert len([piece for piece in pieces if piece]) > 2
    assert "".join(pieces) == json.loads(out)["answer"]


def test_one_token_has_no_time_for_each_further_one(run: Run) -> None:
    cells = []
    for tokens in ("1", "2"):
        status, out, err = run("--max-new-tokens", tokens)
        assert (status, err) == (0, "")
        assert f"tokens answered: {tokens} (length)" in out
        cells.append(next(line.split()[-1] for line in out.splitlines() if line.startswith("per further token")))
    assert cells[0] == "-"
    assert float(cells[1]) > 0


def test_json_prints_one_line(run: Run) -> None:
    status, out, err = run("--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out)["finish"] == "length"


def test_options_reach_the_decoder(run: Run) -> None:
    def said(*words: str) -> str:
        status, out, err = run("--json", "--max-new-tokens", "16", *words)
        assert (status, err) == (0, "")
        return json.loads(out)["answer"]

    greedy = said()
    sampled = said("--temperature", "1", "--seed", "1")
    assert sampled == said("--temperature", "1", "--seed", "1")
    others = (said("--temperature", "1", "--seed", "2"), said("--system", "Answer briefly."))
    assert len({greedy, sampled, *others}) == 4
    assert greedy == said("--temperature", "1", "--top-k", "1") == said("--temperature", "1", "--top-p", "1e-9")
    assert greedy == said("--backend", "torch")


def test_the_newest_engine_is_the_default(
    run: Run, refused: Callable[..., str], engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = Manifest.read(engine)
    for name, created in (("b", "2026-01-02"), ("c", "2026-01-03"), ("a", "2026-01-01"), (".building-d", "2026-01-04")):
        shutil.copytree(engine, tmp_path / "engines" / name)
        manifest.replace(name=name, created=created).write(tmp_path / "engines" / name)
    (tmp_path / "engines" / "README.md").write_text("engines")
    status, out, _ = run("--json", engine=None)
    assert (status, json.loads(out)["engine"]) == (0, "c")
    (tmp_path / "engines" / "c" / "manifest.json").write_text("{")  # one that cannot be read is passed over
    assert json.loads(run("--json", engine=None)[1])["engine"] == "b"
    for name in "ab":
        (tmp_path / "engines" / name / "manifest.json").write_text("{")
    assert "manifest.json is not valid JSON" in refused(engine=None)


# What it refuses


@pytest.mark.parametrize(
    ("video", "says"),
    [
        ("none.mp4", "does not exist"),
        ("", "video '' does not exist"),
        ("https://a.org/b.mp4", "'https://a.org/b.mp4' is an address; download it"),
        (".", "is not a file"),
        ("empty.mp4", "empty (0 bytes)"),
        ("text.mp4", "cannot be read as a video"),
    ],
)
def test_a_video_that_is_none(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.mp4").touch()
    Path("text.mp4").write_text("no video at all\n" * 100)
    assert says in refused(video=video)


@pytest.mark.parametrize(("question", "says"), [(" \n", "question is empty"), ("what is <video>?", "'<video>'")])
def test_a_question_that_cannot_be_asked(refused: Callable[..., str], question: str, says: str) -> None:
    assert says in refused(question=question)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--max-new-tokens", "0"), "--max-new-tokens must be at least 1, got 0"),
        (("--max-new-tokens", "-3"), "at least 1, got -3"),
        (("--max-new-tokens", "1000000"), "context of 4096"),
        (("--temperature", "nan"), "temperature (--temperature) must be at least 0, got nan"),
        (("--temperature", "1e-9"), "temperature must be 0 (greedy) or at least"),
        (("--temperature", "-1"), "got -1"),
        (("--temperature", "inf"), "got inf"),
        (("--top-p", "0"), "top-p"),
        (("--top-p", "nan"), "top-p"),
        (("--top-k", "-1"), "top_k (--top-k) must be a whole number of at least 0, got -1"),
        (("--top-k", "5"), "--temperature 0 samples nothing"),
        (("--top-p", "0.5"), "--temperature 0 samples nothing"),
        (("--frames", "0"), "--frames must be at least 1, got 0"),
        (("--inner-ratio", "0.9"), "needs --inner-layer"),
        (("--seed", "-1"), "seed"),
        (("--max-pixels", "0"), "--max-pixels must be a whole number of at least 1, got 0"),
        (("--max-frames", "-1"), "--max-frames must be"),
        (("--max-bytes", "1.5"), "--max-bytes"),
        (("--max-seconds", "nan"), "--max-seconds must be above 0, got nan"),
        (("--max-pixels", "100"), "--max-pixels"),
        (("--max-frames", "5"), "--max-frames"),
        (("--max-seconds", "0.5"), "--max-seconds"),
        (("--max-bytes", "100"), "--max-bytes"),
        (("--inner-layer", "99"), "set inner_layer (--inner-layer) to one of them"),
        (("--model", "random:no-such"), "random: knows llava-onevision-qwen2-0.5b-ov"),
        (("--model", "./no/such/folder"), "no such folder"),
        (("--model", "random:llava-onevision-qwen2-0.5b-ov"), "give the model it was built from with --model"),
        (("--backend", "tensorrt"), "was built for onnx, not for tensorrt"),
        (("--backend", "tensorrt-rtx"), "python -m builder.build --backend tensorrt-rtx"),
    ],
)
def test_values_that_make_no_sense(refused: Callable[..., str], words: tuple[str, ...], says: str) -> None:
    assert says in refused(*words)


def test_a_model_of_another_family(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model family 'llama' is not supported" in refused("--model", str(tmp_path))


def test_no_engine_at_all(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "build one with python -m builder.build" in refused(engine=None)
    (tmp_path / "engines").mkdir()
    assert "no engine under engines/" in refused(engine=None)


def test_not_an_engine_folder(refused: Callable[..., str], tmp_path: Path, drawn_clip: Path) -> None:
    assert "no manifest.json" in refused(engine=tmp_path)
    assert "does not exist" in refused(engine=tmp_path / "none")
    assert "is not a folder" in refused(engine=drawn_clip)


@pytest.fixture
def compiled(engine: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """A copy of the engine that says it was compiled by a flavour and its version."""

    def make(flavour: str, version: str) -> Path:
        place = tmp_path / "compiled"
        shutil.copytree(engine, place)
        (place / "vision.engine").write_bytes(b"not a plan")
        changes: dict[str, Any] = {"backend": flavour, "backend_version": version, "files": describe_files(place)}
        Manifest.read(engine).replace(**changes).write(place)
        return place

    return make


def test_tensorrt_that_is_not_installed(
    refused: Callable[..., str], compiled: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "tensorrt is not installed: pip install" in refused(
        "--backend", "tensorrt", engine=compiled("tensorrt", "11.0")
    )


def test_an_engine_of_another_tensorrt(
    refused: Callable[..., str], compiled: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tensorrt-rtx" not in trt.flavours():
        pytest.skip("tensorrt-rtx is not installed (extra rtx)")
    line = refused("--backend", "tensorrt-rtx", engine=compiled("tensorrt-rtx", "1.6.0.5"))
    assert "was built with tensorrt-rtx 1.6.0.5" in line


def test_a_compiled_engine_without_a_gpu(
    refused: Callable[..., str], run: Run, compiled: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = trt.flavours()
    if "tensorrt-rtx" not in versions:
        pytest.skip("tensorrt-rtx is not installed (extra rtx)")
    monkeypatch.setattr(trt, "has_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = compiled("tensorrt-rtx", versions["tensorrt-rtx"])
    assert "use --backend onnxruntime" in refused("--backend", "tensorrt-rtx", engine=folder)
    assert run("--backend", "onnxruntime", engine=folder)[0] == 0  # the remedy works


def test_what_needs_no_model_is_refused_before_one_is_loaded(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(Pipeline, "load", load)
    refused(video=tmp_path / "none.mp4")
    refused(question="")
    refused("--max-new-tokens", "0")
    refused("--temperature", "nan")
    with pytest.raises(AssertionError, match="loaded"):  # negative control
        refused()


# As a process


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ask.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    options = [name for action in ask.parser()._actions for name in action.option_strings]
    assert len(options) > 10
    assert all(re.search(rf"(^|\s){name}\b", shown) for name in options)
    assert all(action.help for action in ask.parser()._actions)
    assert "VIDEO" in shown
    assert "QUESTION" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "required: VIDEO, QUESTION"),
        (("clip.mp4",), "required: QUESTION"),
        (("clip.mp4", "Why?", "--nonsense"), "--nonsense"),
        (("clip.mp4", "Why?", "--js"), "--js"),
        (("clip.mp4", "Why?", "--top-k", "x"), "--top-k: invalid int value: 'x'"),
        (("clip.mp4", "Why?", "--backend", "openvino"), "--backend: invalid choice: 'openvino'"),
    ],
)
def test_usage_errors_are_one_line_too(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(ask.main, list(words)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert says in err


def test_the_command_itself(engine: Path, drawn_clip: Path) -> None:
    process = start(str(drawn_clip), QUESTION, "--engine", str(engine), "--max-new-tokens", "3")
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["tokens"] == 3


def test_a_refusal_by_the_command_itself() -> None:
    process = start("none.mp4", QUESTION)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: video 'none.mp4' does not exist")


@pytest.fixture
def streaming(engine: Path, drawn_clip: Path) -> Iterator[subprocess.Popen[str]]:
    """The command with a long answer before it, at the moment when it has loaded its engine."""
    words = (str(drawn_clip), QUESTION, "--engine", str(engine), "--max-new-tokens", "3000")
    process = start(*words, popen=WarmPopen)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("engine: ")
    yield process
    process.kill()
    process.communicate(timeout=HANG_SECONDS)


def test_ctrl_c(streaming: subprocess.Popen[str]) -> None:
    streaming.send_signal(signal.SIGINT)
    out, err = streaming.communicate(timeout=HANG_SECONDS)
    assert (streaming.returncode, err.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in err
    assert '"answer"' not in out


def test_a_reader_that_goes_away(streaming: subprocess.Popen[str]) -> None:
    assert streaming.stdout is not None
    streaming.stdout.close()
    assert streaming.stderr is not None
    assert streaming.wait(HANG_SECONDS) == 141
    assert "Traceback" not in streaming.stderr.read()


def test_a_video_path_may_be_relative_to_anywhere(
    run: Run, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_clip("here.mp4", seconds=1, size=(48, 64))
    assert run(video=Path("here.mp4"))[0] == 0


@pytest.mark.parametrize("name", ["kept.png", "kept.mp4"])
def test_a_picture_of_the_answer(run: Run, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    status, out, err = run("And then?", "--picture", str(tmp_path / name))
    assert (status, err) == (0, "")
    assert f"picture: {tmp_path / name}\n" in out
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name == "kept.mp4":
        clip = load_clip(tmp_path / name, 16, (54, 96)).frames
        assert len(clip.unique(dim=0)) > 8  # one frame of the video after the other
    else:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_picture_from_python(engine: Path, drawn_clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with Pipeline.load(engine, device="cpu") as pipeline:
        answer = pipeline.ask(drawn_clip, QUESTION, max_new_tokens=2, kept=True)
        plain = pipeline.ask(drawn_clip, QUESTION, max_new_tokens=2)
    assert answer.grid == (5, 5)
    frames = load_clip(drawn_clip, 40, (60, 80)).frames
    made = [
        answer.picture(tmp_path / f"{n}.png", video) for n, video in enumerate((drawn_clip, frames, str(drawn_clip)))
    ]
    assert made[0].read_bytes() == made[2].read_bytes() != made[1].read_bytes()
    with pytest.raises(UserError, match="kept=True"):
        plain.picture(tmp_path / "a.png", drawn_clip)
    with pytest.raises(UserError, match="png or"):
        answer.picture(tmp_path / "a.gif", drawn_clip)
