"""The clock: what it waits for, what it adds up, and the figures that are made of seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.measure import clock
from runtime.measure.clock import Laps, matmul_rate, median, percentiles, timed

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Hands:
    """Stands in for the host's clock and the device: what is under way on the device ends when it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.under_way = 0.0, 0.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def wait(self, device: Any) -> None:
        self.now, self.under_way = self.now + self.under_way, 0.0

    def launch(self) -> str:
        self.now, self.under_way = self.now + 1, 8.0
        return "launched"


@pytest.mark.parametrize(("device", "seconds"), [(CPU, 1.0), (GPU, 9.0)])
def test_a_call_takes_what_the_device_takes(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, seconds: float
) -> None:
    hands = Hands(monkeypatch)
    hands.under_way = 16.0  # of somebody else, which does not count
    assert timed(device, hands.launch) == ("launched", seconds)


def test_laps_add_up_to_what_elapsed(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch)
    laps = Laps(GPU, ("copy", "vision", "never"))
    for name in ("copy", "vision", "copy"):
        hands.launch()
        laps(name)
    assert laps.seconds == {"copy": 18.0, "vision": 9.0, "never": 0.0}
    assert laps.elapsed == 27.0


def test_percentiles_are_those_of_numpy() -> None:
    assert percentiles([1.0, 2.0, 3.0]) == pytest.approx({"p50": 2.0, "p90": 2.8, "p99": 2.98})
    assert median([1.0, 2.0, 30.0]) == 2.0


def test_the_rate_of_a_matrix_product_is_a_rate() -> None:
    assert 1e8 < matmul_rate(CPU, torch.float32) < 1e15
