"""`python -m runtime.bench --soak`: it asks as often as it says, sees memory that is not given back, and one line."""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runtime import bench, cli
from runtime.errors import EngineError, Overloaded
from runtime.measure.memory import resident
from runtime.measure.soak import MemorySample, Soak, _line, soak
from runtime.pipeline import Pipeline
from runtime.service.requests import Delta
from runtime.video import Clip
from tests.processes import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 2**20
CLIP = Clip(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), (), 2, 0.0, 0.0, 0.0)


class Fake:
    """What a soak needs of a pipeline: clients meet in `ask`, and each request leaves `leak` bytes behind."""

    def __init__(self, clients: int, *, leak: int = 0, fails_at: int | None = None) -> None:
        self.decoder = SimpleNamespace(device=torch.device("cpu"))
        self.asked: list[str] = []
        self.kept: list[mmap.mmap] = []
        self.met = threading.Barrier(clients)
        self.leak, self.fails_at = leak, fails_at

    def ask(self, clip: Clip, question: str, *, max_new_tokens: int) -> None:
        self.met.wait(HANG_SECONDS)  # nobody comes through alone
        self.asked.append(question)
        if self.leak:  # pages of its own: a heap may have some to spare
            self.kept.append(mmap.mmap(-1, self.leak))
            self.kept[-1].write(b"\x01" * self.leak)
        if self.fails_at is not None and len(self.asked) >= self.fails_at:
            raise Overloaded("full")

    def stream(self, clip: Clip, question: str, *, max_new_tokens: int) -> Iterator[Delta]:
        self.ask(clip, question, max_new_tokens=max_new_tokens)
        yield Delta("a", 1)


def run(fake: Fake, requests: int, clients: int) -> Soak:
    return soak(cast(Pipeline, fake), CLIP, "Why?", requests=requests, clients=clients, new_tokens=2)


def test_so_many_clients_ask_so_often() -> None:
    fake = Fake(4)
    found = run(fake, 40, 4)
    assert len(fake.asked) == 40 + 4 == found.requests + found.warmup
    assert [sample.requests for sample in (found.samples[0], found.samples[-1])] == [0, 40]
    assert sorted(sample.requests for sample in found.samples[1:-1]) == list(range(1, 41))


@pytest.mark.skipif(resident() is None, reason="no figure for resident memory on this system")
def test_memory_that_is_not_given_back_shows() -> None:
    leaking, steady = (run(Fake(2, leak=leak), 60, 2).memory("rss") for leak in (MIB, 0))
    assert leaking is not None
    assert steady is not None
    assert leaking["growth_per_thousand"] > 900 * MIB  # 1000 are left behind
    assert leaking["peak"] >= leaking["last"] > leaking["first"] + 50 * MIB
    assert abs(steady["growth_per_thousand"]) < 100 * MIB


def test_growth_is_of_what_counts() -> None:
    samples = (MemorySample(0, 100, None), MemorySample(250, 900, None), MemorySample(500, 150, None))
    found = Soak(500, 4, 50, 2.0, samples)
    assert found.memory("rss") == {"first": 100, "last": 150, "peak": 900, "growth_per_thousand": 100}
    assert found.memory("cuda") is None


def test_an_error_of_a_client_ends_it() -> None:
    with pytest.raises(Overloaded, match="full"):
        run(Fake(1, fails_at=5), 1000, 1)


def command(engine: Path, clip: Path, *words: str) -> int:
    return cli.run(bench.main, ["--engine", str(engine), "--video", str(clip), "--device", "cpu", *words])


def test_the_command(engine: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--soak", "12", "--soak-clients", "3")
    status = command(engine, drawn_clip, *words)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    *_, line, last = out.splitlines()
    record: dict[str, Any] = json.loads(last)
    assert (record["soak"], record["clients"], record["new_tokens"]) == (12, 3, 2)
    assert record["requests_per_second"] == pytest.approx(12 / record["seconds"])
    assert record["engine"] == engine.name
    assert record["cuda"] is None
    assert f"{record['requests_per_second']:.1f} requests/s; resident " in line
    assert "in a thousand requests" not in line  # twelve tell nothing of that
    assert "KiB in a thousand requests" in _line(record | {"soak": 1000})
    assert command(engine, drawn_clip, *words, "--json") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_without_an_engine_it_says_how_to_build_one(
    drawn_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match=r"no engine under engines/: build one"):
        bench.main(["--soak", "1", "--video", str(drawn_clip)])
