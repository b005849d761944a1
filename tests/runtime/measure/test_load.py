"""Clients: every request is made once, several are under way, and the first error ends them all."""

from __future__ import annotations

import threading

import pytest

from runtime.measure.load import clients
from tests.processes import HANG_SECONDS


@pytest.mark.parametrize(("count", "requests"), [(1, 3), (3, 7), (5, 2)])
def test_every_request_is_made_once(count: int, requests: int) -> None:
    made: list[int] = []
    before = set(threading.enumerate())
    with clients(count, requests, made.append):
        pass
    assert sorted(made) == list(range(1, requests + 1))
    assert set(threading.enumerate()) <= before  # the block's end waits for them


def test_as_many_requests_as_clients_are_under_way() -> None:
    meeting = threading.Barrier(3, timeout=HANG_SECONDS)  # which fewer than three would break
    with clients(3, 6, lambda _: (meeting.wait(), None)[1]):
        pass


def test_the_first_error_is_raised_and_no_other_request_begins() -> None:
    made: list[int] = []

    def ask(number: int) -> None:
        made.append(number)
        if number == 3:
            raise ValueError("no such video")

    with pytest.raises(ValueError, match="no such video"), clients(1, 9, ask):
        pass
    assert made == [1, 2, 3]


def test_an_error_in_the_block_waits_for_no_client() -> None:
    asked, answered = threading.Event(), threading.Event()
    made: list[int] = []

    def ask(number: int) -> None:
        made.append(number)
        asked.set()
        assert answered.wait(HANG_SECONDS)

    def interrupt() -> None:
        assert asked.wait(HANG_SECONDS)
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), clients(1, 9, ask):
        interrupt()
    answered.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG_SECONDS)
    assert made == [1]
