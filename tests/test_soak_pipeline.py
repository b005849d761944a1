"""The soak of a pipeline for two seconds, and that it sees what must not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime import cli
from tests import soak_pipeline
from tests.soak_pipeline import Caller, Held, soak

pytestmark = pytest.mark.usefixtures("one_thread")


def test_callers_of_all_kinds(chunked_engine: Path) -> None:
    record = soak(chunked_engine, 2.0, 0, threads=6)
    assert record["failures"] == []
    assert record["total"] > 6


def test_it_sees_a_wrong_answer_and_an_odd_error(chunked_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(caller: Caller) -> str:
        raise KeyError("not documented")

    plain = Caller.compare

    def wrong(self: Caller, video: Any, kind: str, question: str, tokens: Any) -> str:
        return plain(self, video, kind, question, (*tokens, 1))

    monkeypatch.setattr(Caller, "compare", wrong)
    monkeypatch.setattr(soak_pipeline, "ACTIONS", [("ask", soak_pipeline.ask), ("odd", fail)])
    failures = " ".join(soak(chunked_engine, 0.5, 1, threads=2)["failures"])
    assert "ask: WrongError: " in failures
    assert "odd: KeyError: 'not documented'" in failures


def test_it_sees_what_grows() -> None:
    held, sizes = Held(100, 10, 5), [100] * 20 + [100 + 2 * soak_pipeline.GROWTH] * 11
    assert soak_pipeline._compare(held, held, [100] * 30) == []
    found = soak_pipeline._compare(held, Held(100, 11, 6), sizes)
    assert [line.split()[0] for line in found] == ["memory", "descriptors:", "threads:"]


def test_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(soak_pipeline.main, ["0", "1"]) == 2
    assert "SECONDS must be above 0, got 0.0" in capsys.readouterr().err
