"""Peak memory of one call: of the process, and of PyTorch on a GPU.

The process holds the weights of everything that is compared, so what a variant needs for itself is the growth. Linux
keeps the high-water mark of a process and lets it be reset; elsewhere there is no figure for the process.
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
        rss: most that the process had resident during the call.
        growth: that, less what was resident before it.
        cuda: most that PyTorch had allocated on the GPU; what TensorRT takes for itself is not in it.
    """

    rss: int | None
    growth: int | None
    cuda: int | None


def peak_memory(call: Callable[[], Any], device: torch.device) -> Memory:
    """Call once, after giving back what earlier calls have freed."""
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
    """Bytes that the process has in memory now; None where that cannot be measured."""
    return _status("VmRSS") if _STATUS.is_file() else None


def _restart() -> int | None:
    """Give freed memory back, reset the high-water mark, return what is resident; None where that is not offered."""
    # glibc keeps freed memory, which a later call would take unseen; with another C library the growth may be too small
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
