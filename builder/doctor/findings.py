"""What the facts about a machine allow, a line each, and the command that fixes what is missing.

A pure function of a `Machine`: nothing is loaded or run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from builder.doctor.isolated import NOT_HERE
from builder.doctor.machine import DISTRIBUTION, Machine
from builder.plugins import INSTALL as INSTALL_TRITON
from builder.plugins import PTX_VERSIONS
from runtime import trt

GOOD, LACKING, BROKEN = "ok", "-", "!!"
_PYTHON = (3, 11)
_MEMORY, _DISK = 2e9, 5e8  # bytes that the bundled model's build and ask need
_FULL_SIZE = 24e9  # bytes of a GPU that the benchmark at full size needs


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        state: `GOOD`, `LACKING` (something is not possible) or `BROKEN` (the default build or ask cannot work).
        name: of the thing examined. value: its state.
        allows: what that makes possible or impossible.
        mend: the command or step that fixes it; empty if there is none, or nothing to fix.
    """

    state: str
    name: str
    value: str
    allows: str
    mend: str = ""


def findings(machine: Machine) -> list[Finding]:
    """All findings, basic requirements first."""
    return [
        *_basis(machine),
        *_gpu(machine),
        *_flavours(machine),
        _plugin(machine),
        _compiled_decoder(machine),
        *_extras(machine),
    ]


def can_build(machine: Machine) -> bool:
    """Whether `python -m builder.build --ratio 0.3 --fp16` can work."""
    enough = machine.python >= _PYTHON and machine.memory >= _MEMORY and machine.disk >= _DISK
    return enough and not machine.missing and all(map(machine.usable, ("torch", "transformers", "onnx", "onnxruntime")))


def can_ask(machine: Machine) -> bool:
    """Whether `python -m runtime.ask` can answer with an engine of that build."""
    return can_build(machine) and machine.usable("av")


def _basis(machine: Machine) -> Iterator[Finding]:
    version = ".".join(map(str, machine.python))
    old = machine.python < _PYTHON
    yield Finding(BROKEN if old else GOOD, "Python", version, "3.11 or newer is needed")
    wrong = "; ".join(machine.missing)
    yield Finding(
        BROKEN if wrong else GOOD,
        "packages",
        wrong or "all that are required",
        "these are missing or have another version" if wrong else "build and ask have what they import",
        f'pip install "{DISTRIBUTION}"' if DISTRIBUTION in machine.missing else _install(machine.missing),
    )
    yield _library(machine, "torch", _torch(machine), "the reference, the export and the decoder")
    yield _library(machine, "transformers", "", "checkpoints")
    yield _library(machine, "onnx", "", "graphs")
    yield _library(
        machine, "onnxruntime", ", ".join(machine.about("onnxruntime").get("providers", ())), "engines on the CPU, gate"
    )
    libraries = machine.about("av").get("ffmpeg", {})
    known = ", ".join(f"{name} {libraries[name]}" for name in ("libavcodec", "libavformat") if name in libraries)
    yield _library(machine, "av", known, "videos", called="FFmpeg (PyAV)")
    encoders = machine.about("av").get("encoders", [])
    if machine.usable("av"):
        what = "clips and pictures can be written as mp4" if encoders else "clips cannot be drawn"
        mend = "" if encoders else "pip install --force-reinstall av"
        yield Finding(GOOD if encoders else LACKING, "video encoders", ", ".join(encoders) or "none", what, mend)
    short = machine.memory < _MEMORY
    size = "unknown" if machine.memory == float("inf") else f"{_size(machine.memory)} free"
    yield Finding(BROKEN if short else GOOD, "memory", size, f"the bundled model needs {_size(_MEMORY)}")
    short = machine.disk < _DISK
    size = f"{_size(machine.disk)} free"
    yield Finding(BROKEN if short else GOOD, "disk", size, "an engine of a 7B model has 0.9 GB, its ONNX as much")


def _library(machine: Machine, name: str, about: str, what: str, called: str = "") -> Finding:
    outcome = machine.loaded[name]
    if machine.usable(name):
        value = ", ".join(filter(None, (str(outcome.figures.get("version")), about)))
        return Finding(GOOD, called or name, value, what)
    here = outcome.status != NOT_HERE
    again = " --force-reinstall" if here else ""
    why = f"cannot be loaded: {outcome.why}" if here else outcome.why
    return Finding(BROKEN, called or name, why, f"without it there are no {what}", f"pip install{again} {name}")


def _torch(machine: Machine) -> str:
    about = machine.about("torch")
    build = f"built for CUDA {about['cuda']}" if about.get("cuda") else "built for CPUs"
    return f"{build}, {about.get('threads')} threads"


def _gpu(machine: Machine) -> Iterator[Finding]:
    if machine.driver is None and machine.capability is None:
        allows = "engines are compiled ahead of time and not run; videos are answered on the CPU"
        yield Finding(LACKING, "NVIDIA driver", "none", allows, "install NVIDIA's driver, on a machine with its GPU")
        return
    yield Finding(GOOD, "NVIDIA driver", machine.driver or "there, of unknown version", "GPUs can be used")
    if machine.capability is None:
        allows = "no GPU is shown to this process (CUDA_VISIBLE_DEVICES, a container without GPUs)"
        yield Finding(LACKING, "GPU", "none", allows, "start the container with --gpus all")
        return
    capability = ".".join(map(str, machine.capability))
    if machine.torch_gpu is None:
        version = machine.about("torch").get("version", "torch")
        allows = f"torch {version} cannot use the GPU, so nothing runs on it"
        mend = "pip install torch --upgrade --force-reinstall"
        yield Finding(LACKING, "GPU", f"compute capability {capability}", allows, mend)
        return
    size = machine.about("torch").get("gpu_bytes") or 0
    what = "compiled engines and the decoder run on it"
    if size < _FULL_SIZE:
        what += f"; the benchmark at full size needs {_size(_FULL_SIZE)}"
    yield Finding(GOOD, "GPU", f"{machine.torch_gpu}, compute capability {capability}, {_size(size)}", what)


def _flavours(machine: Machine) -> Iterator[Finding]:
    allows = {
        "tensorrt": "compiles engines for the GPU that is here, with plugins",
        "tensorrt-rtx": "compiles engines ahead of time, without a GPU",
    }
    for name, flavour in trt.FLAVOURS.items():
        outcome = machine.loaded[name]
        if not machine.usable(name):
            why = "not installed" if outcome.status == NOT_HERE else outcome.why
            yield Finding(LACKING, name, why, f"with it: {allows[name]}", flavour.install)
        elif name == "tensorrt" and machine.capability is None:
            what = "needs a GPU to compile for: use --backend tensorrt-rtx"
            yield Finding(LACKING, name, outcome.figures["version"], what)
        else:
            runs = "" if machine.gpu else "; what it compiles runs on another machine"
            yield Finding(GOOD, name, outcome.figures["version"], allows[name] + runs)


def _plugin(machine: Machine) -> Finding:
    """Plugin kernels need Triton, a TensorRT that takes plugins, and a GPU with a known PTX version."""
    triton = machine.about("triton").get("version")
    if triton is None:
        allows = "without it the kernels of the compression stage cannot be compiled; engines use the graph's operators"
        return Finding(LACKING, "Triton", machine.loaded["triton"].why, allows, INSTALL_TRITON)
    if not machine.about("tensorrt").get("plugins") or machine.capability is None:
        lacks = "tensorrt" if not machine.about("tensorrt").get("plugins") else "a GPU"
        allows = f"kernels compile for 8.0 and newer; a plugin inside an engine needs {lacks} as well"
        return Finding(GOOD, "Triton", str(triton), allows)
    if machine.capability not in PTX_VERSIONS:
        capability = ".".join(map(str, machine.capability))
        return Finding(
            LACKING, "Triton", str(triton), f"there are no plugin kernels for compute capability {capability}"
        )
    return Finding(GOOD, "Triton", str(triton), "engines of tensorrt get the compression stage as plugins")


def _compiled_decoder(machine: Machine) -> Finding:
    install = 'pip install "earlytom-engine-builder[torch-tensorrt]"'
    if machine.torch_tensorrt is None:
        return Finding(
            LACKING, "torch-tensorrt", "not installed", "with it: --decoder torch-tensorrt, on a GPU", install
        )
    if not machine.gpu:
        return Finding(
            LACKING, "torch-tensorrt", machine.torch_tensorrt, "compiles the decoder, and needs a GPU for that"
        )
    return Finding(GOOD, "torch-tensorrt", machine.torch_tensorrt, "--decoder torch-tensorrt compiles the decoder")


def _extras(machine: Machine) -> Iterator[Finding]:
    for name, extra, what in (
        ("fastapi", "serve", "python -m runtime.serve"),
        ("matplotlib", "plot", "--plot of the benchmark and the evaluation"),
    ):
        install = f'pip install "{DISTRIBUTION}[{extra}]"'
        if machine.extras[name]:
            yield Finding(GOOD, f"extra [{extra}]", "installed", what)
        else:
            yield Finding(LACKING, f"extra [{extra}]", "not installed", f"with it: {what}", install)


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB"


def _install(missing: tuple[str, ...]) -> str:
    """The command that installs requirements."""
    names = [f'"{one.partition(" (")[0]}"' for one in missing]
    return f"pip install {' '.join(names)}" if names else ""
