"""`python -m runtime.bench --serve`: a real server in a process, small numbers, every figure of answered requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import bench, cli
from tests.processes import HANG_SECONDS
from tests.runtime.serve.test_server import Process

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def server(bundled_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = Process(bundled_engine, tmp_path_factory.mktemp("server"))
    yield made
    made.process.kill()
    made.process.wait(HANG_SECONDS)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key.txt"
    path.write_text("k1\n")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    assert cli.run(bench.main, list(words)) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(lines)


def test_runs_at_given_rates(capsys: pytest.CaptureFixture[str], server: Process, key: Path, tmp_path: Path) -> None:
    record, text = run(
        capsys, "--serve", server.url, "--api-key-file", str(key), "--request-rate", "20,inf", "--requests", "8",
        "--max-concurrency", "4", "--goodput", "ttft:100000", "e2e:0.001", "--plot", str(tmp_path),
    )  # fmt: skip
    assert (record["pairs"], record["objectives"]) == (32, {"ttft": 100, "e2e": 0.000001})
    assert record["different_answers"] > 10
    assert [one["rate"] for one in record["rates"]] == [20, "inf"]
    for one in record["rates"]:
        assert (one["requests"], one["good"], one["wrong"], one["errors"]) == (8, 8, 0, {})
        assert one["ttft"]["p50"] <= one["e2e"]["p50"] <= one["e2e"]["p90"] <= one["e2e"]["max"]
        assert one["requests_per_second"] > 0
        assert one["kept_objectives"] == one["goodput_per_second"] == 0  # nobody answers in a microsecond
        assert 0 < one["cached_share"] < 1  # some videos were known, others not
    assert record["rates"][1]["held"]["max"] > 0
    for words in ("TTFT p50", "TPOT", "ITL", "goodput: ttft:100000 e2e:0.001", "late p50", "plot: "):
        assert words in text
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_videos_for_some_seconds(
    capsys: pytest.CaptureFixture[str], server: Process, key: Path, drawn_clip: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(drawn_clip, folder / "a.mp4")
    shutil.copy(drawn_clip, folder / "b.MP4")
    (folder / "notes.txt").write_text("no video")
    words = ("--video", str(folder), "--question", "Where is it?", "--seconds", "1", "--request-rate", "6")
    record, _ = run(capsys, "--json", "--serve", server.url, "--api-key-file", str(key), "--repeat", "1", *words)
    (one,) = record["rates"]
    assert record["pairs"] == 2
    assert one["good"] == one["requests"] > 0
    assert one["cached_share"] > 0.5


def test_a_soak(capsys: pytest.CaptureFixture[str], server: Process, key: Path) -> None:
    words = ("--soak", "30", "--soak-clients", "3", "--pid", str(server.process.pid))
    record, text = run(capsys, "--serve", server.url, "--api-key-file", str(key), *words)
    assert (record["asked"], record["answered"], record["wrong"], record["errors"]) == (30, 30, 0, {})
    assert [one["answers"] for one in record["samples"]] == list(range(31))
    assert record["held"]["rss"]["first"] > 100 << 20
    assert record["held"]["children_rss"]["first"] > 0  # the decoder's process
    assert "30 of 30 answered" in text
    assert "children descriptors" in text


def test_what_the_server_adds(
    capsys: pytest.CaptureFixture[str], server: Process, key: Path, bundled_engine: Path
) -> None:
    words = ("--added", "--engine", str(bundled_engine), "--device", "cpu", "--repeats", "3", "--warmup", "1")
    record, text = run(capsys, "--serve", server.url, "--api-key-file", str(key), *words)
    for kind in ("known", "fresh"):
        assert record[kind]["different_answers"] == 0
        assert record[kind]["repeats"] == 3
        assert min(record[kind][side]["p50"] for side in ("served", "pipeline", "outside_engine")) > 0
    assert record["body_bytes"] > 100_000
    assert "added p50" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "asks for a key (401)"),
        (("--api-key-file", "KEY", "--max-new-tokens", "100000"), "does not answer '"),
        (("--api-key-file", "KEY", "--soak", "1", "--pid", "4194304"), "--pid 4194304: no process of ours"),
        (("--api-key-file", "KEY", "--request-rate", "0.001", "--seconds", "0.001"), "give more --seconds"),
        (("--api-key-file", "EMPTY"), "it is empty; its first line is the key"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], server: Process, key: Path, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    (tmp_path / "empty.txt").touch()
    real = {"KEY": str(key), "EMPTY": str(tmp_path / "empty.txt")}
    assert cli.run(bench.main, ["--json", "--serve", server.url, *(real.get(word, word) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
