"""In which precision a decoder runs on a CPU, where nobody has said: fp32 if that fits into the memory that is free.

Free is the least of three: what the machine has to give without swapping (MemAvailable), what the container's control
group allows beyond what it uses (pages of files count as free: they can be read again), and what the process may still
map (`ulimit -v`).
"""

from __future__ import annotations

import math
import resource
from pathlib import Path

import torch

from runtime.checkpoint.describe import Checkpoint

_RESERVE = 1.1  # times the weights: cache, activations, a tensor that is being converted
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def fitting_dtype(checkpoint: Checkpoint, *, whole: bool = False) -> tuple[torch.dtype, str | None]:
    """fp32, or the dtype of the stored weights where fp32 would not fit, and then a line that says so.

    Of the decoder, or of the `whole` model.
    """
    shapes = checkpoint.shapes if whole else checkpoint.decoder_shapes
    count = sum(shape.numel() for shape in shapes.values())
    needed, free = _RESERVE * 4 * count, free_bytes()
    if needed <= free:
        return torch.float32, None
    own = stored_dtype(checkpoint)
    if own == torch.float32:
        return own, None
    what = "model" if whole else "decoder"
    return own, (
        f"the {what} runs in {_NAMES[own]}: in fp32 it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
        "(--dtype fp32 runs it in fp32 all the same)"
    )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """fp16 or bf16 where the decoder is stored in that, else fp32; random weights are as good in any, bf16."""
    if checkpoint.files is None:
        return torch.bfloat16
    dtype = checkpoint.weights.dtype_of(checkpoint.family.embeddings_name)
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(dtype, torch.float32)


def free_bytes() -> float:
    """Memory that this process can still have; infinite where the system does not say."""
    return min(_machine(), _group(), _process())


def _machine() -> float:
    fields = _fields(Path("/proc/meminfo"))
    return fields.get("MemAvailable:", math.inf) * 1024


def _group() -> float:
    """What is left to the control group, or to one above it: version 2, else 1."""
    least = math.inf
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return least
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = _GROUPS / controllers
        names = ("memory.max", "memory.current") if not controllers else (
            "memory.limit_in_bytes", "memory.usage_in_bytes"
        )  # fmt: skip
        here = top / place.lstrip("/")
        for group in (here, *here.parents):
            if group != top and top not in group.parents:
                break
            limit, used = (_number(group / name) for name in names)
            cached = _fields(group / "memory.stat").get("inactive_file", 0)
            if limit is not None and used is not None:
                least = min(least, limit - used + cached)
    return max(least, 0)


def _process() -> float:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return math.inf
    return max(limit - _fields(Path("/proc/self/status")).get("VmSize:", 0) * 1024, 0)


def _fields(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file of the kernel's."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number in a file of the kernel's; None where there is none, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
