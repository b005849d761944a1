"""Resident memory, descriptors and threads of a process and its descendants, from Linux's /proc."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from earlytom.errors import UserError

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessSample:
    """Bytes and counts after `answers` answers: of the process, and the sums over its descendants (`children`)."""

    answers: int
    rss: int
    descriptors: int
    threads: int
    children: int
    children_rss: int
    children_descriptors: int


def check(pid: int) -> None:
    """Raise UserError unless the process can be read."""
    if not _PROC.joinpath("self").exists():
        raise UserError("--pid needs /proc, which this system does not have: leave it out")
    try:
        _held(pid)
    except OSError as error:
        raise UserError(f"--pid {pid}: no process of ours ({error.strerror}): give the server's id") from error


def sample(pid: int, answers: int) -> ProcessSample:
    """A sample now. Raises UserError once the process is gone."""
    try:
        rss, descriptors, threads = _held(pid)
    except OSError as error:
        raise UserError(f"the server, process {pid}, ended after {answers} answers: see what it said") from error
    children = []
    for child in _below(pid):
        try:
            children.append(_held(child))
        except OSError:  # it ended meanwhile
            continue
    below, open_below = sum(one[0] for one in children), sum(one[1] for one in children)
    return ProcessSample(answers, rss, descriptors, threads, len(children), below, open_below)


def _held(pid: int) -> tuple[int, int, int]:
    status = _PROC.joinpath(str(pid), "status").read_text()
    found = {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE)}
    descriptors = sum(1 for _ in _PROC.joinpath(str(pid), "fd").iterdir())
    return 1024 * found.get("VmRSS", 0), descriptors, found.get("Threads", 0)


def _below(pid: int) -> Iterator[int]:
    for task in _PROC.joinpath(str(pid), "task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from _below(child)
