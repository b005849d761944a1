"""Peak memory of one call: of the process, and of PyTorch on a GPU.

The process holds the weights of all variants, so a variant's own need is the growth. The process's peak is measured on
Linux only, where the high-water mark can be reset.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)


@dataclass(frozen=True)
class Memory:
    """Bytes; None where they cannot be measured.

    Attributes:
        rss: peak resident memory during the call.
        growth: `rss` less the resident memory before it.
        cuda: peak of PyTorch's allocations on the GPU, without TensorRT's own.
    """

    rss: int | None
    growth: int | None
    cuda: int | None


def peak_memory(call: Callable[[], Any], device: torch.device) -> Memory:
    """The peak of one call, after memory freed by earlier calls has been returned to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = _restart()
    call()
    cuda = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if before is None:
        return Memory(None, None, cuda)
    rss = _status("VmHWM")
    return Memory(rss, max(0, rss - before), cuda)


def resident() -> int | None:
    """Resident bytes of the process; None if they cannot be measured."""
    return _status("VmRSS") if _STATUS.is_file() else None


def _restart() -> int | None:
    """Trim the heap and reset the high-water mark; resident bytes, None if the mark cannot be reset."""
    # glibc keeps freed memory, which a later call would reuse without growth; other C libraries cannot be trimmed
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
        return _status("VmRSS")
    except OSError:
        return None


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
