"""The open loop in a time of its own: sent when due, however slow the answers; late only when the generator is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.measure.serving.client import ServedAnswer
from runtime.measure.serving.generator import SentRequest, open_loop
from tests.runtime.measure.serving.virtual_time import busy, run

Runs = list[SentRequest[float]]


async def answered(seconds: float) -> ServedAnswer:
    await asyncio.sleep(seconds)
    return ServedAnswer("200", seconds)


def test_golden() -> None:
    """Ten-second answers hold nobody up: an open loop."""
    sent = run(open_loop([10.0, 10.0, 1.0], [0.5, 0.5, 3.0], answered))
    assert [(one.request, one.due, one.late, one.held) for one in sent] == [
        (10, 0.5, 0, 0),
        (10, 0.5, 0, 0),
        (1, 3, 0, 0),
    ]
    assert [one.ended for one in sent] == [10.5, 10.5, 4]


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.01, 5)), min_size=1, max_size=20))
def test_all_are_sent_when_they_are_due(drawn: list[tuple[float, float]]) -> None:
    due, seconds = sorted(gap for gap, _ in drawn), [length for _, length in drawn]
    sent: Runs = run(open_loop(seconds, due, answered))
    assert [one.request for one in sent] == seconds
    assert [one.ended for one in sent] == pytest.approx([at + length for at, length in zip(due, seconds, strict=True)])
    assert max(max(one.late, one.held) for one in sent) < 1e-6


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=20), st.integers(1, 5))
def test_only_so_many_are_under_way(seconds: list[float], most: int) -> None:
    under, peak = 0, 0

    async def counted(length: float) -> ServedAnswer:
        nonlocal under, peak
        under += 1
        peak = max(peak, under)
        answer = await answered(length)
        under -= 1
        return answer

    sent: Runs = run(open_loop(seconds, [0.0] * len(seconds), counted, most))
    assert peak == min(most, len(seconds))
    assert all(one.held < 1e-6 for one in sent[:most])
    assert all(one.held > 0 for one in sent[most:])
    assert max(one.ended for one in sent) <= sum(seconds) + 1e-6


def test_a_generator_that_is_held_up_says_so() -> None:
    def slow() -> Iterator[float]:
        for length in (1.0, 1.0, 1.0):
            busy(0.75)  # to make a request takes longer than the gap before it
            yield length

    sent = run(open_loop(slow(), [0.5, 1.0, 1.5], answered))
    assert [one.late for one in sent] == pytest.approx([0.25, 0.5, 0.75])
    assert [one.ended - one.due - one.late for one in sent] == pytest.approx([1, 1, 1])


def test_a_client_that_breaks_ends_the_run() -> None:
    async def broken(length: float) -> ServedAnswer:
        raise RuntimeError("a defect")

    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        run(open_loop([1.0], [0.0], broken))
