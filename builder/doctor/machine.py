"""Facts about this machine and its libraries.

Libraries are loaded in processes of their own (`builder.doctor.isolated`), so that a broken one affects nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.doctor import isolated
from builder.doctor.isolated import PartOutcome
from runtime import trt

DISTRIBUTION = "earlytom-engine-builder"
# Libraries that are loaded to see whether they can be.
PROBES = ("torch", "transformers", "onnx", "onnxruntime", "av", "triton", *trt.FLAVOURS)
_SECONDS = 120.0  # for each; a cold disk is slow


@dataclass(frozen=True)
class Machine:
    """The facts.

    Attributes:
        python: version. missing: unmet requirements of the project.
        driver: version of NVIDIA's driver, None without one. capability: of the first GPU, None without one.
        loaded: outcome of loading each of `PROBES`; its figures have "version" and further facts.
        torch_tensorrt: version, None if not installed.
        memory: bytes free. disk: bytes free where engines go.
        extras: whether packages of the extras are installed, by name.
    """

    python: tuple[int, int]
    missing: tuple[str, ...]
    driver: str | None
    capability: tuple[int, int] | None
    loaded: dict[str, PartOutcome]
    torch_tensorrt: str | None
    memory: float
    disk: float
    extras: dict[str, bool]

    def usable(self, name: str) -> bool:
        """Whether one of `PROBES` can be loaded."""
        return self.loaded[name].status == isolated.OK

    def about(self, name: str) -> dict[str, Any]:
        """The facts about one of `PROBES`."""
        return self.loaded[name].figures

    @property
    def torch_gpu(self) -> str | None:
        """The GPU that torch can use, by name."""
        name = self.about("torch").get("gpu")
        return None if name is None else str(name)

    @property
    def gpu(self) -> bool:
        """Whether compiled engines can run: the driver shows a GPU, and torch can use it."""
        return self.capability is not None and self.torch_gpu is not None


def look(place: Path, work: Path) -> Machine:
    """Collect the facts.

    Args:
        place: folder for engines; it need not exist.
        work: an empty folder for the processes' output.
    """
    with isolated.side_by_side(2) as pool:
        outcomes = pool.map(lambda name: _load(name, work), PROBES)
        loaded = dict(zip(PROBES, outcomes, strict=True))
    there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    return Machine(
        python=sys.version_info[:2],
        missing=tuple(_missing()),
        driver=_driver(),
        capability=trt.gpu_capability(),
        loaded=loaded,
        torch_tensorrt=_version("torch-tensorrt"),
        memory=float(loaded["torch"].figures.get("free_bytes", 0.0)) or _memory(),
        disk=float(shutil.disk_usage(there).free),
        extras={name: importlib.util.find_spec(name) is not None for name in ("fastapi", "matplotlib", "PIL")},
    )


def _load(name: str, work: Path) -> PartOutcome:
    target = "builder.doctor.machine:" + ("flavour" if name in trt.FLAVOURS else "library")
    return isolated.run(target, {"name": name}, seconds=_SECONDS, log=work / f"look-{name}.log")


def library(name: str) -> dict[str, Any]:
    """Load a library; returns its version and further facts."""
    if importlib.util.find_spec(name) is None:
        raise isolated.NotPossible("not installed")
    module: Any = importlib.import_module(name)
    about: dict[str, Any] = {"version": str(getattr(module, "__version__", _version(name)))}
    if name == "torch":
        gpu = module.cuda.is_available()
        about |= {"cuda": module.version.cuda, "gpu": module.cuda.get_device_name(0) if gpu else None}
        about |= {"gpu_bytes": module.cuda.mem_get_info(0)[1] if gpu else None, "threads": module.get_num_threads()}
        about["free_bytes"] = precision_of_decoders().free_bytes()
    if name == "onnxruntime":
        about["providers"] = list(module.get_available_providers())
    if name == "av":
        about["ffmpeg"] = {of: ".".join(map(str, number)) for of, number in module.library_versions.items()}
        about["encoders"] = [codec for codec in ("libx264", "mpeg4") if codec in module.codecs_available]
    return about


def precision_of_decoders() -> Any:
    """The module with `free_bytes`, imported here as it imports PyTorch."""
    return importlib.import_module("runtime.checkpoint.precision")


def flavour(name: str) -> dict[str, Any]:
    """Load a TensorRT flavour: its version, and whether it takes plugins."""
    if importlib.util.find_spec(trt.FLAVOURS[name].module) is None:
        raise isolated.NotPossible("not installed")
    module = trt.load(name)
    about: dict[str, Any] = {"version": str(module.__version__)}
    try:
        trt.load_plugins(name)
    except trt.EngineError as error:
        return about | {"plugins": False, "why": str(error)}
    return about | {"plugins": True}


def _missing() -> list[str]:
    """The installed project's requirements that the environment does not meet."""
    from packaging.requirements import Requirement

    try:
        texts = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [DISTRIBUTION]
    found = []
    for one in map(Requirement, texts):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        have = _version(one.name)
        if have is None or not one.specifier.contains(have, prereleases=True):
            found.append(f"{one.name}{one.specifier}" + (f" (here: {have})" if have else ""))
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Version of NVIDIA's kernel driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)*)\b", text.partition("Module")[2] or text)
    return found[1] if found else "unknown"


def _memory() -> float:
    """Bytes available without swapping; infinite if unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return float("inf")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return float(found[1]) * 1024 if found else float("inf")
