"""Copies of small tensors from the host to a GPU without a sync."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, for work queued on the current stream afterwards; the host does not wait.

    A copy from pageable memory would wait for all work of its stream, the vision engine for example; one from pinned
    memory is only queued. torch caches pinned memory.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
