"""Runs the parts of the course, each in a process: builds in parallel if there are enough cores, timed parts alone, all
within one time limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.doctor import isolated
from builder.doctor.course import Part
from builder.doctor.isolated import FAILED, NOT_HERE, NOT_TRIED, OK, PartOutcome

_CORES = 4  # for each of several parallel builds
_LEAST = 5.0  # seconds left without which no part begins


@dataclass(frozen=True)
class Tried:
    """A part and its outcome."""

    part: Part
    outcome: PartOutcome


def treat(
    parts: Sequence[Part],
    work: Path,
    *,
    seconds: float,
    told: Callable[[Tried], object],
    cores: int | None = None,
) -> list[Tried]:
    """Try every part.

    Args:
        parts: each after the one that builds its engine.
        work: a folder for their output.
        seconds: time limit for all together; parts still running are ended, the others not begun.
        told: called with each part as it ends, from any thread.
        cores: default: this machine's.

    Returns:
        All parts, in order.
    """
    end = time.monotonic() + seconds
    outcomes: dict[str, PartOutcome] = {}

    def attempt(number: int) -> None:
        part = parts[number]
        outcome = _lacking(part, outcomes, end) or _run(part, outcomes, work / f"{number:02}.log", end)
        outcomes[part.name] = outcome
        told(Tried(part, outcome))

    several = max(1, (cores or os.cpu_count() or 1) // _CORES)
    for group in _groups(parts):
        with isolated.side_by_side(several if len(group) > 1 else 1) as pool:
            for future in [pool.submit(attempt, number) for number in group]:
                future.result()
    return [Tried(part, outcomes[part.name]) for part in parts]


def _groups(parts: Sequence[Part]) -> Iterator[list[int]]:
    """Indices of parts that may run in parallel: successive ones that are not timed and need no engine of the group."""
    group: list[int] = []
    for number, part in enumerate(parts):
        if part.engine in {parts[other].name for other in group}:
            yield group
            group = []
        if part.timed:
            if group:
                yield group
            yield [number]
            group = []
        else:
            group.append(number)
    if group:
        yield group


def _lacking(part: Part, outcomes: dict[str, PartOutcome], end: float) -> PartOutcome | None:
    """The outcome of a part that cannot begin; None if it can."""
    if part.lacking:
        return PartOutcome(NOT_HERE, part.lacking)
    if end - time.monotonic() < _LEAST:
        return PartOutcome(NOT_TRIED, "the time was up before it began (--minutes)")
    if part.engine and outcomes[part.engine].status != OK:
        return PartOutcome(NOT_HERE, f"it needs the engine of {part.engine!r}, which there is not")
    return None


def _run(part: Part, outcomes: dict[str, PartOutcome], log: Path, end: float) -> PartOutcome:
    arguments = dict(part.arguments)
    if part.engine:
        arguments["folder"] = outcomes[part.engine].figures["folder"]
    left = end - time.monotonic()
    outcome = isolated.run(
        part.target, arguments, seconds=min(part.seconds, left), log=log, environment=part.environment
    )
    if outcome.status == FAILED and left < part.seconds and outcome.seconds >= left:
        return PartOutcome(NOT_TRIED, "the time was up before it was done (--minutes)", outcome.seconds)
    return outcome
