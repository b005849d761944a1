"""Compiles an ONNX file into a TensorRT engine, and verifies the engine's precision.

    report = compile_engine("vision.onnx", "vision.engine", flavour="tensorrt-rtx", target=(8, 0), dtype="fp16")

writes the engine and `layers.json` beside it, or nothing. Networks are strongly typed: the precision is that of the
graph, and `dtype` is what the finished engine is checked against. TF32 is off, so fp32 means fp32.

The build runs in a process of its own, for reasons seen with tensorrt-rtx 1.7.1: a plugin node can make the parser
abort its process; a KeyboardInterrupt during a build is raised in one of TensorRT's callbacks and swallowed; and the
stage's peak memory can only be measured in a separate process. It costs the start of an interpreter. That process is
`builder.compile.process`; this module starts it, shows its progress, turns its end, however it ends, into a report or
one clear error, and publishes the files.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from builder.compile.layers import LayerSummary
from builder.compile.process import CompileRequest
from builder.plugins import choose, kernel_target
from builder.settings.options import WORKSPACE_GIB
from earlytom.errors import UserError
from runtime import trt as seam
from runtime.engine.manifest import PluginRecord
from runtime.errors import EngineError
from runtime.files.partial import partial

DTYPES = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class CompileProgress:
    """Progress of a build: the library's name of the phase, `done` of `steps` (0 of 0: unknown), seconds so far."""

    phase: str
    done: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class CompileReport:
    """The result of a compilation.

    Attributes:
        version: of the TensorRT flavour.
        target: compute capability, such as "8.0".
        engine_bytes: size of the engine file.
        peak_rss_bytes: peak resident memory of the build process, its interpreter included.
        seconds: "parse", "build" (serialising included) and "total" with the start of the process.
        warnings: TensorRT's warnings.
        layers: figures of layers.json, above all `layers.half_share` and `layers.attention_fused`.
        compression: "native" or "plugin".
        plugins: the plugins' kernels and their cost; none where the compression stage is native.
    """

    flavour: str
    version: str
    target: str
    dtype: str
    hardware_compatible: bool
    engine_bytes: int
    peak_rss_bytes: int
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    layers: LayerSummary
    compression: str = "native"
    plugins: tuple[PluginRecord, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": self.layers.to_dict(), "plugins": msgspec.to_builtins(self.plugins)}


def compile_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    flavour: str,
    dtype: str,
    target: seam.Capability = (8, 0),
    hardware_compatible: bool = False,
    workspace_gib: float = WORKSPACE_GIB,
    compression: str = "auto",
    expected_share: float = 1.0,
    int8_share: float = 0.0,
    folded: tuple[int, int] = (1, 1),
    profile: tuple[int, int, int] | None = None,
    layers_path: str | Path | None = None,
    progress: Callable[[CompileProgress], None] | None = None,
) -> CompileReport:
    """Compile `onnx_path` (its external data beside it) into `engine_path`.

    Args:
        flavour: "tensorrt" (needs the GPU) or "tensorrt-rtx" (needs none).
        dtype: "fp16", "bf16" or "fp32", the dtype of the exported graph.
        target: compute capability of the GPU it will run on; (8, 0) is the A100.
        hardware_compatible: tensorrt only: kernels that run on Ampere and everything newer, at some cost in speed.
        workspace_gib: most scratch memory a layer may use on the GPU.
        compression: "plugin", "native" or "auto", see `builder.plugins.choose`.
        expected_share: share of the matrix-product flops that the graph has in `dtype`; the rest are its islands.
        int8_share: share of them in int8.
        folded: tokens of a frame and attention heads, see `builder.compile.layers.of_one_frame`.
        profile: least, usual and largest first dimension of dynamic inputs.
        layers_path: the layer list; default: `layers.json` beside the engine.
        progress: called at every phase and at least once a second, in this thread.

    Raises:
        EngineError: the flavour is missing, the target cannot be built for here, or TensorRT ended abnormally.
        UserError: no such file or not ONNX, an operator that cannot be compiled (with the names of the nodes), dynamic
            shapes without a profile, a graph TensorRT refuses, an engine whose precision is not `dtype`, or plugins
            that this flavour, target or machine does not have.
        OSError: the engine could not be written (disk full, read-only).
        KeyboardInterrupt: passed on after the build process was ended. Nothing is left behind by any of these.
    """
    onnx_path, engine_path = Path(onnx_path), Path(engine_path)
    layers_path = engine_path.with_name("layers.json") if layers_path is None else Path(layers_path)
    if dtype not in DTYPES:
        raise UserError(f"unknown precision {dtype!r}: expected --fp16, --bf16 or --fp32")
    if not workspace_gib > 0:
        raise UserError(f"workspace must be more than 0 GiB, got {workspace_gib}")
    check_target(flavour, target, hardware_compatible)
    kernel = kernel_target(target, hardware_compatible)
    chosen = choose(compression, flavour, kernel, "budget" if profile is None else "adaptive").compression
    started = time.monotonic()
    with partial(layers_path) as layers, partial(engine_path) as engine:
        request = CompileRequest(
            onnx=str(onnx_path.resolve()),
            engine=str(engine.resolve()),
            layers=str(layers.resolve()),
            flavour=flavour,
            target=target,
            dtype=dtype,
            hardware_compatible=hardware_compatible,
            workspace_bytes=int(workspace_gib * 2**30),
            compression=chosen,
            expected_share=expected_share,
            int8_share=int8_share,
            folded=folded,
            profile=profile,
        )
        answer = _run(request, progress, started)
    answer["seconds"]["total"] = time.monotonic() - started
    summary = LayerSummary.from_dict(answer.pop("layers"))
    warnings = tuple(answer.pop("warnings"))
    plugins = tuple(PluginRecord(**record) for record in answer.pop("plugins"))
    return CompileReport(
        flavour=flavour,
        target=".".join(map(str, target)),
        dtype=dtype,
        hardware_compatible=hardware_compatible,
        warnings=warnings,
        layers=summary,
        compression=chosen,
        plugins=plugins,
        **answer,
    )


def check_target(flavour: str, target: seam.Capability, hardware_compatible: bool = False) -> None:
    """Refuse a target that `flavour` cannot build for on this machine; loads the library but builds nothing."""
    trt = seam.load(flavour)
    wanted = ".".join(map(str, target))
    if flavour == "tensorrt-rtx":
        if hardware_compatible:
            raise EngineError(
                "--hardware-compatible is for --backend tensorrt: a tensorrt-rtx engine runs on newer GPUs as it is"
            )
        known = [n[2:-1] + "." + n[-1] for n in trt.ComputeCapability.__members__ if n[2:].isdigit()]
        if wanted not in known:
            raise EngineError(
                f"tensorrt-rtx {trt.__version__} does not compile for compute capability {wanted}, only for "
                f"{', '.join(known)}: choose one with --target"
            )
        return
    here = seam.gpu_capability()
    if here is None:
        raise EngineError("tensorrt builds only on a machine with an NVIDIA GPU: use --backend tensorrt-rtx")
    if here == target and not hardware_compatible:
        return
    found = ".".join(map(str, here))
    if not hardware_compatible:
        raise EngineError(
            f"the target is compute capability {wanted} and this GPU is {found}, and tensorrt builds for the GPU it "
            f"runs on: build on the target, or add --hardware-compatible (runs on 8.0 and newer), or use "
            f"--backend tensorrt-rtx"
        )
    if min(here, target) < (8, 0):
        raise EngineError(
            f"--hardware-compatible needs compute capability 8.0 or newer both here and as the target, got {found} "
            f"here and --target {wanted}: build on the target without it"
        )


def _run(request: CompileRequest, progress: Callable[[CompileProgress], None] | None, started: float) -> dict[str, Any]:
    """Start the build process, pass its progress on, return its answer or raise its error."""
    # This variable would select Triton's interpreter, which compiles nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", "import sys; from builder.compile.process import serve; sys.exit(serve())"]
    last = CompileProgress("Starting", 0, 0, 0.0)
    answer: dict[str, Any] | None = None
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, env=environment, text=True) as process,
    ):
        try:
            for message in _messages(process, json.dumps(asdict(request))):
                if "phase" in message:
                    last = CompileProgress(message["phase"], message["done"], message["steps"], 0.0)
                elif message:
                    answer = message
                if progress is not None:
                    progress(replace(last, seconds=time.monotonic() - started))
        except BaseException:
            process.kill()
            raise
        process.wait()
        stderr.seek(0)
        printed = stderr.read().decode(errors="replace")
    return _answer(answer, process.returncode, last, request, printed)


def _messages(process: subprocess.Popen[str], request: str) -> Iterator[dict[str, Any]]:
    """The build process's messages until it ends, and an empty one for every second without a message."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdin is not None
    assert process.stdout is not None
    stdout = process.stdout

    def read() -> None:
        with suppress(ValueError):  # killing the process closes its output, perhaps during this read
            for line in stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()  # not closed, so that the child ends with this process (`builder.compile.child`)
    except BrokenPipeError:  # it died before reading: its exit status says more than this error
        with suppress(BrokenPipeError):
            process.stdin.close()
    while True:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            yield {}
            continue
        if line is None:
            return
        yield json.loads(line)


def _answer(
    answer: dict[str, Any] | None, status: int, last: CompileProgress, request: CompileRequest, stderr: str
) -> dict[str, Any]:
    if answer is not None and "result" in answer:
        result: dict[str, Any] = answer["result"]
        return result
    if answer is not None and "oserror" in answer:
        raise OSError(*answer["oserror"])
    if answer is not None and "error" in answer:
        kinds: dict[str, type[UserError]] = {"EngineError": EngineError}
        raise kinds.get(answer["kind"], UserError)(answer["error"])
    if answer is not None or status > 0:
        raise RuntimeError(f"the build process failed (status {status}):\n{(answer or {}).get('defect', stderr)}")
    name = signal.Signals(-status).name if status else "no answer"
    hint = "most likely out of memory: close other programs or use fewer --frames"
    if name != "SIGKILL":
        hint = (stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise EngineError(f"{request.flavour} ended abnormally ({name}) in phase {last.phase!r}: {hint}")
