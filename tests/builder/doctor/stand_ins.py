"""Parts that go wrong in every way, for the doctor's tests: they run in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from builder.doctor.isolated import NotPossible, Wrong
from earlytom.errors import UserError


def well(folder: str = "", **figures: Any) -> dict[str, Any]:
    print("this is for the log")
    return {"given": folder, **figures}


def engine(place: str) -> dict[str, Any]:
    return {"folder": place}


def engine_later(place: str) -> dict[str, Any]:
    time.sleep(1)
    return engine(place)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(started: str = "") -> None:
    if started:
        subprocess.Popen([sys.executable, "-c", f"open({started!r}, 'w').write('x'); import time; time.sleep(600)"])
    time.sleep(600)


def hang_alone(started: str) -> None:
    Path(started).touch()
    time.sleep(600)


def leave() -> None:
    print("a library says goodbye", file=sys.stderr, flush=True)
    os._exit(7)


def refused() -> None:
    raise UserError("give another --flag")


def wrong() -> None:
    raise Wrong("3 of 5 are equal")


def absent() -> None:
    raise NotPossible("there is no such library")


def defect() -> None:
    raise ValueError("one line\nand another")


def no_memory() -> None:
    raise MemoryError


def environment(name: str) -> dict[str, Any]:
    return {"value": os.environ.get(name)}


def meet(own: str, other: str) -> dict[str, Any]:
    """Ends when the other one has begun: of two that run one after the other, the first never does."""
    Path(own).touch()
    while not Path(other).exists():
        time.sleep(0.01)
    return {}
