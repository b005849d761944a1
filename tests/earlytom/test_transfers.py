"""Small tensors reach a device; the way to a GPU leads through pinned memory."""

from __future__ import annotations

from typing import Any

import torch

from earlytom.transfers import to_device


def test_on_its_device_a_tensor_stays_what_it_is() -> None:
    values = torch.arange(5)
    assert to_device(values, torch.device("cpu")) is values
    assert to_device(values, torch.device("meta")).device.type == "meta"


class Told:
    """Stands for a tensor of the host, and notes what becomes of it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def pin_memory(self) -> Told:
        self.calls.append("pinned")
        return self

    def to(self, device: torch.device, **how: bool) -> Told:
        self.calls.append((device.type, how))
        return self


def test_the_host_does_not_wait_for_a_gpu() -> None:
    told: Any = Told()
    to_device(told, torch.device("cuda", 0))
    assert told.calls == ["pinned", ("cuda", {"non_blocking": True})]
