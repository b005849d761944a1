"""Timing: seconds on the host, read once the device has finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], T]) -> tuple[T, float]:
    """A call's result, and its seconds including the device's work."""
    wait(device)
    begun = time.perf_counter()
    out = call()
    wait(device)
    return out, time.perf_counter() - begun


class Laps:
    """Seconds between successive calls, added up by the name given; each call waits for the device."""

    def __init__(self, device: torch.device, names: Sequence[str]) -> None:
        self._device = device
        self.seconds = dict.fromkeys(names, 0.0)
        self._started = self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        wait(self._device)
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now

    @property
    def elapsed(self) -> float:
        """Seconds from construction to the last call."""
        return self._last - self._started


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Peak flops a second: the best of a few square matrix products."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(dtype)
    seconds: list[float] = []
    while len(seconds) < 8 and sum(seconds[1:]) < 0.5:  # a CPU may take seconds for one in a half precision
        seconds.append(timed(device, lambda: torch.matmul(matrix, matrix))[1])
    return 2 * side**3 / min(seconds)  # the first one warms up and is never the best


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, interpolated between values; of ten values p99 is nearly the largest."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}


def median(values: Sequence[float]) -> float:
    return float(np.median(values))
