"""Small tensors on their way from the host to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, for work that is queued there from now on; the host waits for nothing.

    Out of ordinary memory a copy to a GPU first waits for everything that its stream has to do, the vision engine for
    example. Out of pinned memory it takes its place in the line; torch keeps such memory to use it again.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
