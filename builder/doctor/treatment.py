"""Go through the course: every part in its process, builds side by side where there are cores for that, measurements
alone, all within one time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.doctor import isolated
from builder.doctor.course import Part
from builder.doctor.isolated import FAILED, NOT_HERE, NOT_TRIED, OK, PartOutcome

_CORES = 4  # for each build that runs beside others
_LEAST = 5.0  # seconds: with less left nothing is begun


@dataclass(frozen=True)
class Tried:
    """A part and what became of it."""

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
        parts: what a part needs comes before it.
        work: a folder for what they say.
        seconds: for all of them together; what has not begun by then does not begin.
        told: called with each as it ends, in any thread.

    Returns:
        all of them, in their order.
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
    """Numbers of parts that may run side by side: those that follow one another, measure nothing and need none of the
    others' engines."""
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
    """Why a part is not begun; None if it can be."""
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
