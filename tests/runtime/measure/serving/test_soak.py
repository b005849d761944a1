"""A soak counts what it asked: nothing lost, nothing mixed up, and what the processes held meanwhile."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest

from earlytom.errors import UserError
from runtime.measure.serving import processes, soak
from runtime.measure.serving.client import ServedAnswer
from runtime.measure.serving.processes import ProcessSample
from runtime.measure.serving.questions import SentVideo, Workload
from tests.processes import HANG_SECONDS
from tests.runtime.measure.serving.virtual_time import run


class Stub:
    """A client whose server mixes up some answers and refuses others."""

    def __init__(self, bad: dict[int, str]) -> None:
        self.bad, self.asked, self.streamed = bad, 0, 0

    async def ask(self, body: bytes, *, stream: bool) -> ServedAnswer:
        self.asked += 1
        self.streamed += stream
        await asyncio.sleep(0.5)
        status = self.bad.get(self.asked, "200")
        return ServedAnswer("200", 0.5, text="other") if status == "wrong" else ServedAnswer(status, 0.5, text="mine")


def soaked(stub: Any, pid: int | None = None, requests: int = 20, said: list[str] | None = None) -> dict[str, Any]:
    work = Workload([(SentVideo("a.mp4", b"\0\0\0\x08ftyp"), "Why?")], "tom", 7)
    work.learn(0, "mine")
    how: dict[str, Any] = {"clients": 3, "repeated": 0.5, "seed": 0, "pid": pid}
    return run(soak.soak(stub, work, requests=requests, say=(said if said is not None else []).append, **how))


def test_what_became_of_the_requests() -> None:
    stub, said = Stub({1: "wrong", 5: "wrong", 9: "429", 10: "429", 11: "broken"}), list[str]()
    got = soaked(stub, said=said)  # the first two warm up
    assert (stub.asked, stub.streamed) == (22, 11)
    assert (got["asked"], got["answered"], got["wrong"], got["errors"]) == (20, 17, 1, {"429": 2, "broken": 1})
    assert (got["warmup"], got["held"], got["samples"]) == (2, None, [])
    assert said[-1] == "  20 of 20: 1 wrong, 3 refused or lost"


def test_nothing_went_wrong() -> None:
    """Negative control."""
    got = soaked(Stub({}))
    assert (got["answered"], got["wrong"], got["errors"]) == (20, 0, {})


def test_processes_are_sampled_all_along() -> None:
    got = soaked(Stub({}), pid=os.getpid(), requests=1000)
    assert [one["answers"] for one in got["samples"]] == list(range(0, 1001, 5))
    assert got["held"]["rss"]["first"] > 1 << 20
    assert got["held"]["descriptors"]["peak"] >= 3


def test_a_server_that_ends_ends_the_soak() -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as made:
        stub = Stub({})

        async def ask(body: bytes, *, stream: bool) -> ServedAnswer:
            if stub.asked == 10:
                made.communicate(timeout=HANG_SECONDS)
            return await Stub.ask(stub, body, stream=stream)

        stub.ask = ask  # type: ignore[method-assign]
        with pytest.raises(UserError, match=f"the server, process {made.pid}, ended after 7 answers"):
            soaked(stub, pid=made.pid)


def test_growth() -> None:
    """Of the second half."""
    held = {0: 1000, 100: 9000, 250: 8000, 500: 8500}
    samples = [ProcessSample(answers, rss, 7, 3, 0, 0, 0) for answers, rss in held.items()]
    got = soak.held(samples, "rss")
    assert got == {"first": 1000, "middle": 8000, "last": 8500, "peak": 9000, "growth_per_thousand": 2000}
    flat = soak.held(samples, "descriptors")
    assert flat == {"first": 7, "middle": 7, "last": 7, "peak": 7, "growth_per_thousand": 0}


def test_descriptors_memory_and_children_are_seen() -> None:
    child = "import sys; held = bytearray(b'x' * (64 << 20)); files = [open('/dev/null') for _ in range(50)]; "
    child += "print('ready', flush=True); sys.stdin.read()"
    before = processes.sample(os.getpid(), 0)
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as made:
        assert made.stdout is not None
        assert made.stdout.readline() == b"ready\n"
        own, of_child = processes.sample(os.getpid(), 1), processes.sample(made.pid, 1)
        made.communicate(timeout=HANG_SECONDS)
    assert own.children == before.children + 1
    assert own.children_rss - before.children_rss > 60 << 20
    assert own.children_descriptors - before.children_descriptors >= 50
    assert of_child.descriptors >= 53
    assert of_child.rss > 60 << 20
    with pytest.raises(UserError, match=f"process {made.pid}, ended after 7 answers"):
        processes.sample(made.pid, 7)
    with pytest.raises(UserError, match=f"--pid {made.pid}: no process of ours"):
        processes.check(made.pid)
    processes.check(os.getpid())
