"""Run a function in a process of its own, with a time limit; whatever becomes of it is one outcome.

A crash, a hang, the system's end of a process that takes too much memory, and an exception are all lines that tell why;
none of them ends the caller. The process has a session of its own, so that what it has started ends with it, and it
ends when its parent does (`builder.doctor.child`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, NOT_HERE, NOT_TRIED = "ok", "failed", "not possible here", "not tried"
_GRACE = 5.0  # seconds that a process that hangs has to say where
_running: set[subprocess.Popen[bytes]] = set()
_LONGEST = 400  # characters of a line that tells why


class NotPossible(Exception):  # noqa: N818 - a statement about the machine, not an error
    """What a part needs is not here; the message says what."""


class Wrong(Exception):  # noqa: N818
    """Something ran, and what it gave is not what it must be; the message has both."""


@dataclass(frozen=True)
class PartOutcome:
    """What became of a part.

    Attributes:
        status: `OK`, `FAILED`, `NOT_HERE`, or `NOT_TRIED` for want of time.
        why: one line, empty after `OK`.
        seconds: how long it took, the start of its process included.
        figures: what it measured, in plain JSON types.
    """

    status: str
    why: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def run(
    target: str,
    arguments: Mapping[str, Any],
    *,
    seconds: float,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> PartOutcome:
    """Call `target` ("module:function") with `arguments` in a process of its own; never raises for what it does.

    Args:
        seconds: after which it is ended.
        log: file for what it prints; its outcome is written beside it.
        environment: variables that it has besides this process's.
    """
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    words = [sys.executable, "-X", "faulthandler", "-m", "builder.doctor.child", target, json.dumps(arguments)]
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                [*words, str(answer)],
                stdin=subprocess.PIPE,  # it ends where this end is closed
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            return PartOutcome(FAILED, f"no process can be started: {error.strerror or error}")
        late = _wait(process, seconds)
    took = time.monotonic() - started
    if late:
        return PartOutcome(FAILED, _cut(f"not done after {seconds:.0f} s{_where(log)}"), took)
    try:
        said = json.loads(answer.read_text(encoding="utf-8"))
        return PartOutcome(said["status"], _cut(said["why"]), took, said["figures"])
    except (OSError, ValueError, LookupError, TypeError):
        return PartOutcome(FAILED, _cut(_ending(process.returncode) + _where(log)), took)


@contextmanager
def side_by_side(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that call `run`, so many at a time; what ends the block early (Ctrl-C) ends what they run."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(_running):
                _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process was still running after so many seconds; it and what it has started are gone then."""
    late = False
    _running.add(process)
    try:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGABRT)  # faulthandler writes where it is
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
    finally:  # Ctrl-C, too
        _end(process)
        process.wait()
        _running.discard(process)
        if process.stdin is not None:
            process.stdin.close()
    return late


def _ending(status: int) -> str:
    """What an exit status without an outcome means."""
    if status == -signal.SIGKILL:
        return "the system ended the process, as it does where memory is short"
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status} and said nothing"


def _where(log: Path) -> str:
    """Where in the sources a process was when it ended, or else what it said last; empty where it said nothing."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if "(most recent call first)" in line and line.startswith("Current thread") and number + 1 < len(lines):
            found = re.match(r'File "(.*)", line (\d+) in (\S+)', lines[number + 1])
            return f", in {found[3]} ({found[1]}:{found[2]})" if found else ""
    return f": {lines[-1]}" if lines else ""


def _cut(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
