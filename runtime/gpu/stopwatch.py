"""Measures seconds of work on a device without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds between its creation and `stop`; on a GPU by events on the stream. Without a `stop` on a CPU it is 0."""

    def __init__(self, device: torch.device | None) -> None:
        self.events: list[Any] = []
        self.started = self.stopped = time.perf_counter()
        if device is not None and device.type == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()

    def stop(self) -> None:
        self.stopped = time.perf_counter()
        if self.events:
            self.events[1].record()

    def seconds(self) -> float:
        """The seconds; on a GPU valid once the host has waited for the device, as it does for every token."""
        if self.events:
            return self.events[0].elapsed_time(self.events[1]) / 1000
        return self.stopped - self.started
