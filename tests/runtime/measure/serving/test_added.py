"""What a server adds is a difference between two that take turns."""

from __future__ import annotations

import pytest

from runtime.measure.serving import added
from runtime.measure.serving.client import ServedAnswer


class FakeClock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def serve(self, body: bytes) -> ServedAnswer:
        self.now += 0.012
        self.calls.append(f"serve {body.decode()}")
        return ServedAnswer("200", 0.012, text="mine" if body != b"3" else "other", inside=0.01)

    def ask(self) -> str:
        self.now += 0.007
        self.calls.append("ask")
        return "mine"

    def body(self) -> bytes:
        self.now += 5.0  # is not counted
        return str(len(self.calls) // 2).encode()


def test_they_take_turns_and_only_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(added, "time", clock)
    got = added.in_turn(clock.body, clock.serve, clock.ask, warmup=1, repeats=3)
    assert clock.calls == ["serve 0", "ask", "ask", "serve 1", "serve 2", "ask", "ask", "serve 3"]
    assert got["served"]["p50"] == pytest.approx(0.012)
    assert got["pipeline"]["p50"] == pytest.approx(0.007)
    assert got["added"]["p50"] == pytest.approx(0.005)
    assert got["added_quiet"] == pytest.approx(0.005)
    assert got["outside_engine"]["p50"] == pytest.approx(0.002)
    assert (got["repeats"], got["different_answers"]) == (3, 1)
