"""Going through a course: what depends on what, what runs beside what, and when the time is up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder.doctor import treatment
from builder.doctor.course import Part
from builder.doctor.isolated import FAILED, NOT_HERE, NOT_TRIED, OK
from builder.doctor.treatment import Tried, treat
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def part(name: str, function: str, **how: Any) -> Part:
    return Part(name, f"tests.builder.doctor.stand_ins:{function}", **{"seconds": HANG_SECONDS, **how})


def statuses(tried: list[Tried]) -> dict[str, str]:
    return {one.part.name: one.outcome.status for one in tried}


def test_one_that_crashes_and_one_that_hangs_do_not_end_the_others(tmp_path: Path) -> None:
    parts = [
        part("a", "well"),
        part("b", "crash"),
        part("c", "hang", seconds=1.0),
        part("d", "killed"),
        part("e", "well", lacking="no GPU"),
        part("f", "well"),
    ]
    told: list[str] = []
    tried = treat(parts, tmp_path, seconds=4 * HANG_SECONDS, told=lambda one: told.append(one.part.name))
    assert statuses(tried) == {"a": OK, "b": FAILED, "c": FAILED, "d": FAILED, "e": NOT_HERE, "f": OK}
    assert [one.outcome.why for one in tried if one.part.name == "e"] == ["no GPU"]
    assert told == list("abcdef")


def test_an_engine_is_handed_to_those_who_need_it(tmp_path: Path) -> None:
    parts = [
        part("made", "engine", arguments={"place": "there"}),
        part("broken", "crash"),
        part("run", "well", engine="made"),
        part("in vain", "well", engine="broken"),
    ]
    _, broken, run, in_vain = treat(parts, tmp_path, seconds=4 * HANG_SECONDS, told=lambda one: None)
    assert run.outcome.figures == {"given": "there"}
    assert broken.outcome.status == FAILED
    assert (in_vain.outcome.status, in_vain.outcome.why) == (
        NOT_HERE,
        "it needs the engine of 'broken', which there is not",
    )


def test_an_engine_is_waited_for(tmp_path: Path) -> None:
    """Also by what may run side by side with others."""
    parts = [
        part("slow", "engine_later", arguments={"place": "there"}, timed=False),
        part("run", "well", engine="slow", timed=False),
        part("again", "well", engine="slow", timed=False),
    ]
    tried = treat(parts, tmp_path, seconds=4 * HANG_SECONDS, told=lambda one: None, cores=16)
    assert statuses(tried) == {"slow": OK, "run": OK, "again": OK}
    assert tried[2].outcome.figures == {"given": "there"}


def test_what_measures_nothing_runs_side_by_side(tmp_path: Path) -> None:
    """Each of the two waits for the other to begin."""
    own, other = str(tmp_path / "a"), str(tmp_path / "b")
    pair = [
        part("a", "meet", arguments={"own": own, "other": other}, timed=False),
        part("b", "meet", arguments={"own": other, "other": own}, timed=False),
    ]
    tried = treat(pair, tmp_path, seconds=4 * HANG_SECONDS, told=lambda one: None, cores=8)
    assert statuses(tried) == {"a": OK, "b": OK}


def test_what_measures_runs_alone(tmp_path: Path) -> None:
    """Negative control: the first of them waits in vain."""
    own, other = str(tmp_path / "a"), str(tmp_path / "b")
    pair = [
        part("a", "meet", arguments={"own": own, "other": other}, seconds=3.0),
        part("b", "meet", arguments={"own": other, "other": own}),
    ]
    assert statuses(treat(pair, tmp_path, seconds=4 * HANG_SECONDS, told=lambda one: None, cores=8)) == {
        "a": FAILED,
        "b": OK,
    }


def test_when_the_time_is_up_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(treatment, "_LEAST", 1.0)
    parts = [part("a", "hang"), part("b", "well"), part("c", "well", engine="b"), part("d", "well", lacking="no GPU")]
    tried = treat(parts, tmp_path, seconds=2.0, told=lambda one: None)
    assert statuses(tried) == {"a": NOT_TRIED, "b": NOT_TRIED, "c": NOT_TRIED, "d": NOT_HERE}
    assert [one.outcome.why for one in tried] == [
        "the time was up before it was done (--minutes)",
        *["the time was up before it began (--minutes)"] * 2,
        "no GPU",
    ]
