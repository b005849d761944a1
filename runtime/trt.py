"""The only module that imports `tensorrt` or `tensorrt_rtx`, inside functions.

The two flavours share one Python API, so other code passes the module that `load` returns:

    tensorrt       for data centre GPUs; builds only on a machine with the GPU; native kernels, plugins
    tensorrt-rtx   compiles ahead of time for a compute capability on a machine without a GPU; no plugins

Nothing here creates a CUDA context, and GPUs are found through the driver library, without torch.
Classes with callbacks (logger, progress monitor, stream writer) are made here too, as their base classes are the
library's. An exception in a callback never reaches the caller (seen with 1.7.1: it is printed, and a build whose write
failed still succeeds), so the writer does not raise but keeps its error.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from runtime.errors import EngineError

Capability = tuple[int, int]


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries: its module, supported versions [minimum, below) and pip extra."""

    name: str
    module: str
    extra: str
    minimum: tuple[int, ...]
    below: tuple[int, ...] | None

    @property
    def versions(self) -> str:
        """The accepted versions as a requirement, such as `>=10.15,<12`."""
        upper = "" if self.below is None else "<" + ".".join(map(str, self.below))
        return ",".join(filter(None, [">=" + ".".join(map(str, self.minimum)), upper]))

    @property
    def install(self) -> str:
        return f'pip install "earlytom-engine-builder[{self.extra}]"'


# 10.14 is refused because its plugin path is broken; 12 is untested.
FLAVOURS: dict[str, Flavour] = {
    "tensorrt": Flavour("tensorrt", "tensorrt", "tensorrt", (10, 15), (12,)),
    "tensorrt-rtx": Flavour("tensorrt-rtx", "tensorrt_rtx", "rtx", (1, 7), None),
}


def version(trt: Any) -> tuple[int, ...]:
    """The version of a loaded module as integers: "1.7.1.116" and "11.0.0b2" become (1, 7, 1, 116) and (11, 0, 0)."""
    parts: list[int] = []
    for part in str(trt.__version__).split("."):
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        parts.append(int(digits.group()))
        if digits.group() != part:
            break
    return tuple(parts)


def load(flavour: str) -> Any:
    """Import a flavour and return its module.

    Raises:
        EngineError: not a flavour, not installed, installed but not loadable, or a version that is not supported.
    """
    if flavour not in FLAVOURS:
        raise EngineError(f"unknown TensorRT flavour {flavour!r}: expected one of {', '.join(FLAVOURS)} (--backend)")
    wanted = FLAVOURS[flavour]
    try:
        trt = importlib.import_module(wanted.module)
    except ModuleNotFoundError as error:
        if error.name == wanted.module:
            raise EngineError(f"{flavour} is not installed: {wanted.install}") from error
        raise _broken(wanted, error) from error
    except (ImportError, OSError, AttributeError) as error:
        raise _broken(wanted, error) from error
    if not hasattr(trt, "Builder") or not hasattr(trt, "__version__"):
        raise _broken(wanted, "it has no Builder")
    have = version(trt)
    if have < wanted.minimum or (wanted.below is not None and have >= wanted.below):
        raise EngineError(
            f"{flavour} {trt.__version__} is not supported, expected {wanted.versions}: {wanted.install} --upgrade"
        )
    return trt


def _broken(flavour: Flavour, cause: object) -> EngineError:
    # PyPI has only placeholders for `tensorrt`'s native libraries: the bindings are installed, the libraries are not.
    return EngineError(
        f"{flavour.name} is installed but cannot be loaded ({_one_line(str(cause))}): its native libraries come from "
        f"NVIDIA's own package index; reinstall where that can be reached, {flavour.install} --force-reinstall"
    )


def load_plugins(flavour: str) -> Any:
    """Import a flavour's module for plugins written in Python (`tensorrt.plugin`) and return it.

    Raises:
        EngineError: a flavour without plugins, or a module that cannot be loaded or has no ahead-of-time plugins.
    """
    trt = load(flavour)
    if flavour != "tensorrt":
        raise EngineError(f"{flavour} has no plugins: use --compression native, or --backend tensorrt")
    try:
        plugins = importlib.import_module(f"{FLAVOURS[flavour].module}.plugin")
    except (ImportError, OSError, AttributeError) as error:
        raise EngineError(
            f"{flavour} {trt.__version__} has no plugin module that can be loaded ({_one_line(str(error))}): "
            f"{FLAVOURS[flavour].install} --upgrade, or use --compression native"
        ) from error
    if not (hasattr(plugins, "aot_impl") and hasattr(plugins, "KernelLaunchParams")):
        raise EngineError(
            f"{flavour} {trt.__version__} cannot take plugins compiled ahead of time: "
            f"{FLAVOURS[flavour].install} --upgrade, or use --compression native"
        )
    return plugins


def flavours() -> dict[str, str]:
    """The flavours that can be loaded, each with its version; `tensorrt` first."""
    usable = {}
    for name in FLAVOURS:
        try:
            usable[name] = str(load(name).__version__)
        except EngineError:
            continue
    return usable


@functools.cache
def _devices() -> tuple[Capability, ...]:
    """Compute capability of every NVIDIA GPU visible to this process; empty without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for index in range(count.value):
        numbers = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            value = ctypes.c_int(0)
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, index) != 0:
                return ()
            numbers.append(value.value)
        found.append((numbers[0], numbers[1]))
    return tuple(found)


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is visible to this process; torch may still be built without CUDA."""
    return bool(_devices())


def gpu_capability() -> Capability | None:
    """Compute capability of the first visible GPU; None if there is none."""
    devices = _devices()
    return devices[0] if devices else None


@dataclass(frozen=True)
class BackendChoice:
    """The backend to build with ("tensorrt", "tensorrt-rtx" or "onnx"), and the reason in one line for the user."""

    backend: str
    reason: str


def resolve_backend(asked: str) -> BackendChoice:
    """Choose the backend for `--backend`.

    `auto` chooses tensorrt if it can be loaded and there is a GPU, else tensorrt-rtx if it can be loaded, else onnx,
    which stops at the ONNX file. A flavour asked for by name is never replaced by another.

    Raises:
        EngineError: unknown name, a flavour that is missing, or tensorrt on a machine without a GPU.
    """
    if asked == "onnx":
        return BackendChoice("onnx", "asked for: the build stops at the ONNX file")
    if asked == "auto":
        return _automatic()
    if asked not in FLAVOURS:
        raise EngineError(f"unknown --backend {asked!r}: expected auto, {', '.join(FLAVOURS)} or onnx")
    trt = load(asked)
    if asked == "tensorrt" and not has_gpu():
        raise EngineError(
            "tensorrt builds only on a machine with an NVIDIA GPU and none was found: use --backend tensorrt-rtx, "
            "which compiles ahead of time, or --backend onnx"
        )
    return BackendChoice(asked, f"asked for: {asked} {trt.__version__}")


def _automatic() -> BackendChoice:
    gpu, usable = has_gpu(), flavours()
    if gpu and "tensorrt" in usable:
        return BackendChoice("tensorrt", f"tensorrt {usable['tensorrt']} and a GPU are here")
    if "tensorrt-rtx" in usable:
        missing = "tensorrt cannot be loaded" if gpu else "no GPU here"
        return BackendChoice("tensorrt-rtx", f"{missing}: tensorrt-rtx {usable['tensorrt-rtx']} compiles ahead of time")
    return BackendChoice(
        "onnx",
        f"neither tensorrt with a GPU nor tensorrt-rtx can be used here, so there is no engine, only the ONNX file "
        f"(to compile ahead of time: {FLAVOURS['tensorrt-rtx'].install})",
    )


class Message(NamedTuple):
    """One line of a library's log. `severity`: INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE."""

    severity: str
    text: str


def collecting_logger(trt: Any, *, verbose: bool = False) -> Any:
    """An `ILogger` that collects messages in `.messages` and prints nothing.

    Args:
        trt: the module from `load`.
        verbose: keep INFO and VERBOSE messages too; a build needs them, as the layer list is among them.
    """
    base: Any = trt.ILogger
    kept = {"INTERNAL_ERROR", "ERROR", "WARNING"} | ({"INFO", "VERBOSE"} if verbose else set())

    class CollectingLogger(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.messages: list[Message] = []

        def log(self, severity: Any, text: str) -> None:
            name = str(severity).rsplit(".", maxsplit=1)[-1]
            if name in kept:
                self.messages.append(Message(name, text))

    return CollectingLogger()


def errors_of(logger: Any) -> list[str]:
    """The messages of a `collecting_logger` of severity ERROR or INTERNAL_ERROR, one line each."""
    return [_one_line(m.text) for m in logger.messages if m.severity in ("INTERNAL_ERROR", "ERROR")]


def parser_errors(parser: Any) -> list[str]:
    """One line for each error of an `OnnxParser`: node, operator, enclosing functions, description."""
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = "the graph"
        if error.node() >= 0:
            where = f"node {error.node_name()!r} ({error.node_operator()})"
        callers = [str(caller) for caller in error.local_function_stack()]
        inside = f" inside {' / '.join(callers)}" if callers else ""
        lines.append(f"{where}{inside}: {_one_line(error.desc())}")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def progress_monitor(trt: Any, report: Callable[[str, int, int], None]) -> Any:
    """An `IProgressMonitor` that calls `report(phase, steps done, steps)` on any of TensorRT's threads."""
    base: Any = trt.IProgressMonitor

    class Monitor(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.open: dict[str, tuple[str | None, int, int]] = {}  # phase -> parent, steps done, steps

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.open[phase] = (parent, 0, steps)
            report(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            parent, _, steps = self.open.get(phase, (None, 0, 0))
            self.open[phase] = (parent, step + 1, steps)
            report(phase, step + 1, steps)
            return True

        def phase_finish(self, phase: str) -> None:
            parent, _, _ = self.open.pop(phase, (None, 0, 0))
            if parent in self.open:
                report(parent, *self.open[parent][1:])

    return Monitor()


def stream_writer(trt: Any, file: BinaryIO) -> Any:
    """An `IStreamWriter` into an open file. Check `.error` after the build: a failed write does not fail it."""
    base: Any = trt.IStreamWriter

    class Writer(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.written = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is not None:
                return -1
            try:
                file.write(data)
            except OSError as error:
                self.error = error
                return -1
            self.written += len(data)
            return len(data)

    return Writer()
