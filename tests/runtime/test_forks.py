"""A fork has copies of locks and no threads: whoever asks there is told in one line, and nothing waits."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from runtime.errors import Closed
from runtime.forks import Home
from tests import warm
from tests.processes import HANG_SECONDS

CHILD = """
import contextlib, json, os, sys, threading
import torch
from runtime.pipeline import Pipeline

torch.set_num_threads(1)
frames = torch.arange(4 * 3 * 8 * 8).remainder(255).to(torch.uint8).reshape(4, 3, 8, 8)
pipeline = Pipeline.load(sys.argv[1], device="cpu")
go, begun = threading.Event(), threading.Event()
plain = pipeline._core.answer
def held(ready, **how):
    begun.set()
    go.wait()
    yield from plain(ready, **how)
watched = pipeline.watch(frames)
live = pipeline.open_stream(total=4)
live.push(frames[:2])
pipeline._core.answer = held
answered = pipeline.submit(frames, "What?", max_new_tokens=1)
pending = pipeline.submit(frames, "What?", max_new_tokens=1)
begun.wait()
locks = (pipeline._scheduler._lock, pipeline.watched._lock, live._lock, live._clip._lock)
reader, writer = os.pipe()
with contextlib.ExitStack() as stack:
    for lock in locks:  # as a fork may find them
        stack.enter_context(lock)
    child = os.fork()
    if child == 0:
        found = {}
        calls = {
            "next": lambda: next(pending), "result": pending.result, "timeout": lambda: pending.result(1),
            "done": lambda: pending.done, "cancel": pending.cancel,
            "submit": lambda: pipeline.submit(frames, "What?"), "ask": lambda: pipeline.ask(frames, "What?"),
            "stream": lambda: next(pipeline.stream(frames, "What?")), "watch": lambda: pipeline.watch(frames),
            "watched": lambda: watched.ask("What?"), "counters": lambda: pipeline.watched.counters,
            "clear": pipeline.watched.clear, "push": lambda: live.push(frames[2:]), "finish": live.finish,
            "live": lambda: live.ask("What?"), "open": lambda: pipeline.open_stream(total=4),
            "warm_up": pipeline.warm_up,
        }
        for name, call in calls.items():
            try:
                found[name] = repr(call())
            except BaseException as error:
                found[name] = f"{type(error).__name__}: {error}"
        with pending, watched, live, pipeline:  # leaving them does nothing
            pass
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
os.close(writer)
with open(reader, "rb") as pipe:
    print(pipe.read().decode())
_, status = os.waitpid(child, 0)
go.set()
live.push(frames[2:])
print(status, len(pending.result(60).tokens), len(live.ask("What?", max_new_tokens=1).tokens))
pipeline.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_everything_that_a_child_can_call(chunked_engine: Path) -> None:
    words = [sys.executable, "-c", CHILD, str(chunked_engine)]
    done = warm.run(words, HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.splitlines()
    found = json.loads(child)
    assert len(found) == 17
    for name, line in found.items():
        assert line.startswith("Closed: "), (name, line)
        assert "forked" in line
        assert "\n" not in line
    assert parent == "0 1 1"  # and to the parent nothing happened


def test_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home("this thing")
    home.check()
    assert not home.left
    monkeypatch.setattr("runtime.forks.os.getpid", lambda: -1)
    assert home.left
    with pytest.raises(Closed, match="this thing was made before the process forked"):
        home.check()
