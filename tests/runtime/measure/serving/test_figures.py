"""Figures are sums, quantiles and counts of what was sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.measure.serving.client import ServedAnswer
from runtime.measure.serving.figures import figures, kept
from runtime.measure.serving.generator import SentRequest

WANTED = {"ttft": 0.5, "e2e": 2.0}


def sent(due: float, status: str = "200", late: float = 0.0, **answer: Any) -> SentRequest[str]:
    return SentRequest("question", due, late, 0.0, ServedAnswer(status, **{"seconds": 1.0} | answer))


def right(request: str, answer: ServedAnswer) -> bool:
    return answer.text != "not mine"


def test_golden() -> None:
    run = [
        sent(0.0, first=0.2, gaps=(0.1, 0.3), tokens=5, prompt_tokens=100, cached_tokens=80),
        sent(1.0, first=0.6, tokens=3, prompt_tokens=100, text="not mine", late=0.25),
        sent(2.0, seconds=7.75, first=0.4, tokens=1, prompt_tokens=120, late=0.25),
        sent(3.0, "429"),
        sent(3.0, "429"),
        sent(4.0, "broken"),
    ]
    got = figures(run, right, WANTED)
    assert (got["requests"], got["good"], got["wrong"]) == (6, 3, 1)
    assert got["errors"] == {"429": 2, "broken": 1}
    assert (got["seconds"], got["offered_per_second"]) == (10.0, 1.5)  # the third ended last
    assert (got["requests_per_second"], got["tokens_per_second"]) == (0.3, 0.9)
    assert (got["kept_objectives"], got["goodput_per_second"]) == (1, 0.1)
    assert got["ttft"]["p50"] == pytest.approx(0.4)
    assert got["tpot"]["p50"] == pytest.approx(0.2)  # 0.8 of four further tokens, 0.4 of two; one has none
    assert got["itl"]["p50"] == pytest.approx(0.2)
    assert got["e2e"]["max"] == 7.75
    assert got["late"]["max"] == 0.25
    assert got["cached_share"] == 0.25


def test_nothing_good() -> None:
    got = figures([sent(0.0, "503")], right, {})
    assert (got["ttft"], got["tpot"], got["itl"], got["e2e"], got["goodput_per_second"]) == (None,) * 5
    assert (got["requests_per_second"], got["errors"]) == (0, {"503": 1})


times = st.floats(0.001, 10)


@given(st.lists(st.tuples(times, times, st.integers(1, 50)), min_size=1, max_size=50), times, times)
def test_quantiles_are_numpy_s_and_goodput_is_counted(drawn: list[Any], first: float, whole: float) -> None:
    run = [sent(0.0, seconds=a + b, first=a, tokens=n) for a, b, n in drawn]
    got = figures(run, right, {"ttft": first, "e2e": whole})
    for name, values in (("ttft", [a for a, _, _ in drawn]), ("e2e", [a + b for a, b, _ in drawn])):
        for quantile in (50, 90, 99):
            assert got[name][f"p{quantile}"] == pytest.approx(np.quantile(values, quantile / 100))
    good = sum(a <= first and a + b <= whole for a, b, _ in drawn)
    assert got["kept_objectives"] == good
    assert got["goodput_per_second"] == pytest.approx(good / max(a + b for a, b, _ in drawn))
    assert got["tokens_per_second"] == pytest.approx(sum(n for *_, n in drawn) / got["seconds"])


def test_what_an_answer_does_not_have_keeps_its_objective() -> None:
    answer = ServedAnswer("200", 1.0, first=0.4, tokens=1)
    assert kept(answer, {"tpot": 0.001})
    assert not kept(ServedAnswer("200", 1.0, first=0.4, tokens=2), {"tpot": 0.001})  # negative control
