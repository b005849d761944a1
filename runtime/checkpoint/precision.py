"""The default dtype of a decoder on a CPU: fp32 if that fits into free memory.

Free memory is the least of three: the machine's without swapping (MemAvailable), the rest of the container's control
group's limit (inactive file pages count as free), and what the process may still map (`ulimit -v`).
"""

from __future__ import annotations

import math
import resource
from pathlib import Path

import torch

from runtime.checkpoint.describe import Checkpoint

_RESERVE = 1.1  # times the weights' bytes: KV cache, activations, a tensor being converted
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def fitting_dtype(checkpoint: Checkpoint, *, whole: bool = False) -> tuple[torch.dtype, str | None]:
    """fp32, or the stored dtype if fp32 does not fit, with a line for the user (else None).

    For the decoder, or the `whole` model.
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
    """fp16 or bf16 if the decoder is stored so, else fp32; bf16 for random weights."""
    if checkpoint.files is None:
        return torch.bfloat16
    dtype = checkpoint.weights.dtype_of(checkpoint.family.embeddings_name)
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(dtype, torch.float32)


def free_bytes() -> float:
    """Bytes of free memory; infinite if the system does not say."""
    return min(_machine(), _group(), _process())


def _machine() -> float:
    fields = _fields(Path("/proc/meminfo"))
    return fields.get("MemAvailable:", math.inf) * 1024


def _group() -> float:
    """Bytes left to the control group (version 2 or 1), or to the most limited one above it."""
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
    """The lines "name number ..." of a kernel file, as name to number."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number in a kernel file; None if there is no file or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
