"""Machines that there might be."""

from __future__ import annotations

import dataclasses
from typing import Any

from builder.doctor.isolated import NOT_HERE, OK, PartOutcome
from builder.doctor.machine import PROBES, Machine

_ABOUT: dict[str, dict[str, Any]] = {
    "torch": {"cuda": "13.0", "gpu": "A100", "gpu_bytes": 80e9, "threads": 8},
    "onnxruntime": {"providers": ["CPUExecutionProvider"]},
    "av": {"ffmpeg": {"libavcodec": "62.1"}, "encoders": ["libx264"]},
    "tensorrt": {"plugins": True},
    "tensorrt-rtx": {"plugins": False, "why": "no plugins"},
}
ABSENT = PartOutcome(NOT_HERE, "not installed")
WITH_A_GPU = Machine(
    python=(3, 12),
    missing=(),
    driver="580.1",
    capability=(8, 0),
    loaded={name: PartOutcome(OK, figures={"version": "1.2"} | _ABOUT.get(name, {})) for name in PROBES},
    torch_tensorrt="2.13",
    memory=64e9,
    disk=1e12,
    extras={"fastapi": True, "matplotlib": True, "PIL": True},
)


def changed(machine: Machine = WITH_A_GPU, *, loaded: dict[str, PartOutcome] | None = None, **facts: Any) -> Machine:
    """A machine of which some facts are others."""
    return dataclasses.replace(machine, loaded=machine.loaded | (loaded or {}), **facts)


def without_gpu() -> Machine:
    torch = PartOutcome(
        OK, figures={"version": "2.13.0+cpu", "cuda": None, "gpu": None, "gpu_bytes": None, "threads": 2}
    )
    return changed(driver=None, capability=None, torch_tensorrt=None, loaded={"torch": torch, "tensorrt": ABSENT})
