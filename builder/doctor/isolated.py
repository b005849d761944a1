"""Run a function in a process of its own with a time limit, and return its outcome.

A crash, a hang, a kill for lack of memory and an exception each give a `FAILED` outcome with the reason, and none ends
the caller. The process has its own session, so that its children end with it, and it ends when its parent does
(`builder.doctor.child`).
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
_GRACE = 5.0  # seconds that a hanging process has to print its stack
_running: set[subprocess.Popen[bytes]] = set()
_LONGEST = 400  # characters of a reason


class NotPossible(Exception):  # noqa: N818 - a statement about the machine, not an error
    """Something that a part needs is missing here; the message says what."""


class Wrong(Exception):  # noqa: N818
    """A part ran with a wrong result; the message has the result and what was expected."""


@dataclass(frozen=True)
class PartOutcome:
    """The outcome of a part.

    Attributes:
        status: `OK`, `FAILED`, `NOT_HERE`, or `NOT_TRIED` for lack of time.
        why: one line, empty after `OK`.
        seconds: duration, including the start of its process.
        figures: its measurements, in plain JSON types.
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
    """Call `target` ("module:function") with `arguments` in a process of its own; failures are outcomes, not raised.

    Args:
        seconds: time limit.
        log: file for its output; its outcome is written beside it.
        environment: variables in addition to this process's.
    """
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    words = [sys.executable, "-X", "faulthandler", "-m", "builder.doctor.child", target, json.dumps(arguments)]
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                [*words, str(answer)],
                stdin=subprocess.PIPE,  # the child ends when this pipe closes
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
    """`count` threads that call `run`; an exception in the block (Ctrl-C) kills their processes."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(_running):
                _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait, at most `seconds`, then kill the process and its children; returns whether it was too late."""
    late = False
    _running.add(process)
    try:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGABRT)  # faulthandler prints its stack
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
    """The meaning of an exit status without an outcome."""
    if status == -signal.SIGKILL:
        return "the system ended the process, as it does where memory is short"
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status} and said nothing"


def _where(log: Path) -> str:
    """Where in the sources a process was when it ended, else its last line of output, else ""."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if "(most recent call first)" in line and line.startswith("Current thread") and number + 1 < len(lines):
            found = re.match(r'File "(.*)", line (\d+) in (\S+)', lines[number + 1])
            return f", in {found[3]} ({found[1]}:{found[2]})" if found else ""
    return f": {lines[-1]}" if lines else ""


def _cut(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
