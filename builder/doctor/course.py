"""The parts that `--run` tries, in order: all ways from a checkpoint to an answer.

A part that is not possible here stays in the list with the reason. On a machine with a GPU the list covers what this
project's README files call unverified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.doctor.machine import Machine
from builder.plugins import PTX_VERSIONS
from earlytom.errors import UserError
from earlytom.families.published import PUBLISHED
from runtime import trt

MODES = {
    "plain": "",
    "fp32": "--fp32",
    "bf16": "--bf16",
    "several frame counts": "--frames 8,16",
    "two videos at once": "--batch 2",
    "chunks": "--chunk 4",
    "chain": "--schedule adaptive",
    "cells": "--method cells",
    "cells, chain": "--method cells --schedule adaptive",
}
# Only tensorrt takes plugins; its "plain" engine has the graph's native operators, for comparison.
PLUGINS = {
    "plugin": "--compression plugin",
    "plugin, two videos at once": "--compression plugin --batch 2",
    "plugin, cells one by one": "--compression plugin --method cells --rounds greedy",
    "plugin, hardware compatible": "--compression plugin --hardware-compatible",
}
_FIRST = ("verified", "plain", "plugin")
_FULL = f"random:{list(PUBLISHED)[-1]}"
_FEW = ("--warmup", "1", "--repeats", "3", "--max-new-tokens", "4")
_ALONE = ("--concurrency", "none", "--scale-frames", "none", "--scale-ratios", "none")
_FULL_GPU, _FULL_HOST = 30e9, 25e9  # bytes that the benchmark at full size needs


@dataclass(frozen=True)
class Part:
    """One part to try.

    Attributes:
        name: shown, and for --only.
        target: "module:function", see `builder.doctor.isolated`.
        arguments: of the function.
        seconds: time limit.
        lacking: why it is not possible here; empty if it is.
        engine: name of the part that builds its engine, whose folder it gets as "folder"; empty if it needs none.
        timed: whether it measures times, so that nothing else may run beside it.
        environment: additional variables of its process.
    """

    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 90.0
    lacking: str = ""
    engine: str = ""
    timed: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


def course(machine: Machine, work: Path) -> list[Part]:
    """The parts, each after the one that builds its engine, and the most important first, as time may run out.

    `work`: a folder for engines and clips.
    """
    builds, device = _builds(machine, work), "cuda" if machine.gpu else "cpu"
    first = [build for build in builds if build.name.rpartition(", ")[2] in _FIRST]
    others = [build for build in builds if build not in first]
    runs = _runs(machine, builds)
    of_first = [run for run in runs if run.engine in {build.name for build in first}]
    kernels, full, bundled = _benches(machine, device)
    return [
        *first,
        *_device(machine, device, work),
        *of_first,
        *_asks(machine, builds),
        kernels,
        bundled,
        *others,
        *(replace(run, timed=False) for run in runs if run not in of_first),
        full,
        *_late(machine, builds, device),
    ]


def _asked(name: str) -> str:
    return f"build: {name}"


def _builds(machine: Machine, work: Path) -> list[Part]:
    found = [_build("onnx, verified", "--backend onnx", "", work, verify=True)]
    for flavour in trt.FLAVOURS:
        lacking, where = _lacking_build(machine, flavour)
        for mode, words in MODES.items():
            native = "--compression native" if flavour == "tensorrt" else ""
            found.append(_build(f"{flavour}, {mode}", f"--backend {flavour} {where} {native} {words}", lacking, work))
        if flavour == "tensorrt":
            plugin = lacking or _lacking_plugin(machine)
            for mode, words in PLUGINS.items():
                found.append(_build(f"{flavour}, {mode}", f"--backend {flavour} {where} {words}", plugin, work))
    if not any(machine.usable(flavour) and not _lacking_build(machine, flavour)[0] for flavour in trt.FLAVOURS):
        of_onnx = {mode: words for mode, words in MODES.items() if mode != "bf16"}
        found += [_build(f"onnx, {mode}", f"--backend onnx {words}", "", work) for mode, words in of_onnx.items()]
    return found


def _build(name: str, words: str, lacking: str, work: Path, *, verify: bool = False) -> Part:
    precision = "" if "--fp32" in words or "--bf16" in words else "--fp16"
    arguments = {"words": f"--ratio 0.3 {precision} {words}".split(), "out": str(work / "engines"), "verify": verify}
    target = "builder.doctor.engines:build"
    return Part(_asked(name), target, arguments, seconds=150.0, lacking=lacking, timed=False)


def _lacking_build(machine: Machine, flavour: str) -> tuple[str, str]:
    """Why a flavour cannot build here ("" if it can), and the option for its target."""
    outcome = machine.loaded[flavour]
    if not machine.usable(flavour):
        return f"{flavour}: {outcome.why}", ""
    if flavour == "tensorrt":
        if machine.capability is None:
            return "tensorrt builds only on a machine with an NVIDIA GPU", ""
        return "", f"--target {machine.capability[0]}.{machine.capability[1]}"
    return "", ""  # the default target runs on newer GPUs as well


def _lacking_plugin(machine: Machine) -> str:
    if not machine.usable("triton"):
        return f"Triton: {machine.loaded['triton'].why}"
    if not machine.about("tensorrt").get("plugins"):
        return str(machine.about("tensorrt").get("why"))
    return "" if machine.capability in PTX_VERSIONS else "there are no plugin kernels for this GPU"


def _lacking_gpu(machine: Machine) -> str:
    if machine.capability is None:
        return "no NVIDIA GPU"
    return "" if machine.torch_gpu is not None else "torch cannot use the GPU"


def _device(machine: Machine, device: str, work: Path) -> list[Part]:
    gpu, triton = _lacking_gpu(machine), "" if machine.usable("triton") else f"Triton: {machine.loaded['triton'].why}"
    half = "fp16" if device == "cuda" else "fp32"
    ours = "builder.doctor.operators:"
    on_gpu = {"device": "cuda", "size": "so400m"}
    return [
        Part(f"peak bandwidth and matrix products ({device})", f"{ours}limits", {"device": device, "dtype": half}),
        Part(
            "kernels in Triton's interpreter",
            f"{ours}kernels",
            {"device": "cpu", "size": "tiny", "dtype": "fp32"},
            lacking=triton,
            environment={"TRITON_INTERPRET": "1"},
        ),
        Part("kernels on the GPU, fp16", f"{ours}kernels", {**on_gpu, "dtype": "fp16"}, lacking=gpu or triton),
        Part("kernels on the GPU, bf16", f"{ours}kernels", {**on_gpu, "dtype": "bf16"}, lacking=gpu or triton),
        Part("encoder as a CUDA graph", f"{ours}encoder_graph", lacking=gpu or triton),
        Part("uploads on a stream of their own", f"{ours}uploads", lacking=gpu),
        Part("resizing on the GPU", f"{ours}resizing", {"work": str(work)}, lacking=gpu),
    ]


def _runs(machine: Machine, builds: list[Part]) -> list[Part]:
    """Runs of every engine in its backends: compiled engines on a GPU, graphs in ONNX Runtime once for each mode."""
    found, graphs = [], set()
    target = "builder.doctor.engines:run"
    for build in builds:
        name = build.name.removeprefix("build: ")
        kind, _, mode = name.partition(", ")
        if kind in trt.FLAVOURS:
            lacking = build.lacking or _lacking_gpu(machine)
            found.append(Part(f"run: {name}", target, {"backend": kind}, lacking=lacking, engine=build.name))
        if mode not in graphs and mode not in PLUGINS and not build.lacking:
            graphs.add(mode)
            lacking = "ONNX Runtime has no bf16 kernels on a CPU" if mode == "bf16" else ""
            arguments = {"backend": "onnxruntime"}
            found.append(Part(f"run: onnxruntime, {mode}", target, arguments, lacking=lacking, engine=build.name))
    verified = builds[0].name
    found.append(Part("compare by Polygraphy", "builder.doctor.engines:polygraphy", engine=verified))
    return found


def _asks(machine: Machine, builds: list[Part]) -> list[Part]:
    target, verified, gpu = "builder.doctor.answers:ask", builds[0].name, _lacking_gpu(machine)
    found = [Part("ask: onnxruntime, cpu", target, {"backend": "onnxruntime", "device": "cpu"}, engine=verified)]
    for flavour in trt.FLAVOURS:
        lacking = _lacking_build(machine, flavour)[0] or gpu
        how = {"backend": flavour, "device": "cuda", "half": True}
        engine = _asked(f"{flavour}, plain")
        found.append(Part(f"ask: {flavour}, decode steps as CUDA graphs", target, how, lacking=lacking, engine=engine))
    return found


def _late(machine: Machine, builds: list[Part], device: str) -> list[Part]:
    """Long parts: the compiled decoder, and the benchmark of a service."""
    verified = builds[0].name
    lacking = _lacking_gpu(machine) or ("" if machine.torch_tensorrt else "torch-tensorrt is not installed")
    compiled = {"backend": "onnxruntime", "device": "cuda", "decoder": "torch-tensorrt", "half": True}
    chunked = next((b.name for b in builds if b.name.endswith(", chunks") and not b.lacking), verified)
    ours = "builder.doctor.answers:"
    return [
        Part("ask: torch-tensorrt decoder", f"{ours}ask", compiled, 150.0, lacking=lacking, engine=verified),
        Part(f"service ({device})", f"{ours}service", {"device": device}, engine=chunked),
    ]


def _benches(machine: Machine, device: str) -> list[Part]:
    """The kernels' times, the benchmark at full size, and that of the bundled model."""
    ours = "builder.doctor.answers:"
    size = "so400m" if device == "cuda" else "tiny"
    times = ["builder.kernels", "--json", "--device", device, "--size", size, "--dtype", "fp16", "--repeats", "10"]
    lacking = _lacking_gpu(machine)
    if not lacking and (machine.about("torch").get("gpu_bytes") or 0) < _FULL_GPU:
        lacking = f"the GPU has less than {_FULL_GPU / 1e9:.0f} GB"
    if not lacking and machine.memory < _FULL_HOST:
        lacking = f"less than {_FULL_HOST / 1e9:.0f} GB of memory are free"
    full = ["--model", _FULL, "--frames", "32", "--device", "cuda", *_FEW, *_ALONE]
    return [
        Part(f"times of the kernels ({device})", f"{ours}command", {"words": times}),
        Part("benchmark at 7B", f"{ours}bench", {"words": full}, 240.0, lacking=lacking),
        Part(f"benchmark, bundled model ({device})", f"{ours}bench", {"words": ["--device", device, *_FEW, *_ALONE]}),
    ]


def only(parts: list[Part], text: str | None) -> list[Part]:
    """The parts with `text` in their names, and those that build their engines; all parts for None."""
    if text is None:
        return parts
    named = {part.name for part in parts if text in part.name}
    if not named:
        raise UserError(f"--only {text!r}: no part is called that; they are {', '.join(part.name for part in parts)}")
    needed = {part.engine for part in parts if part.name in named}
    return [part for part in parts if part.name in named | needed]
