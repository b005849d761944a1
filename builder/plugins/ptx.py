"""Compiles a kernel launch ahead of time to PTX that TensorRT can embed; needs no GPU, and the engine no Python.

Triton's PTX must be changed and checked before a plugin may hand it over:
* Triton adds hidden pointer parameters (scratch memory) after the kernel's own. TensorRT passes the tensors alone, so a
  hidden parameter would be undefined. They are removed, after a check that the kernel never reads one.
* TensorRT leaves the PTX to the driver, which may fuse a product and a sum into one instruction with one rounding; then
  "more similar than" could be decided differently from PyTorch. So every sum, difference and product of floats must
  state its rounding, which forbids fusion, and no quotient may be approximate.
* File names and line numbers of the compiling machine are removed: equal kernels have equal digests everywhere.

The result goes through the assembler that ships with Triton, which validates it for the GPU and reports registers,
shared memory and spills. A plugin's tensors are assumed to be aligned to their elements only. The PTX version is pinned
to the oldest that supports the GPU (8.0 is CUDA 12.0), as drivers refuse PTX newer than their own.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.plugins import GPUS, INSTALL, NATIVE, PTX_VERSIONS
from earlytom.errors import UserError
from runtime.errors import EngineError
from runtime.trt import Capability

if TYPE_CHECKING:
    from earlytom.kernels.launch import Launch

# Shared memory in bytes that a kernel gets without an opt-in at the driver, which TensorRT does not make.
SHARED_LIMIT = 48 * 1024

_ENTRY = re.compile(r"\.visible \.entry (?P<name>\w+)\((?P<parameters>[^)]*)\)(?P<body>.*)", re.DOTALL)
_DEBUG = re.compile(r"^[ \t]*\.section[ \t]+\.debug_\w+\s*\{[^}]*\}\n?", re.MULTILINE)
_LINES = re.compile(r"^[ \t]*(?:\.(?:loc|file)\b.*|\$L__(?:tmp\d+|func_(?:begin|end)\d+):)\n", re.MULTILINE)
_COMMENT = re.compile(r"[ \t]*//.*$", re.MULTILINE)
_LOOSE = re.compile(
    r"\b(?:add|sub|mul|mad)(?:\.(?:ftz|sat))*\.(?:f16|f16x2|bf16|bf16x2|f32|f64)\b|\b(?:div|rcp|sqrt)\.(?:full|approx)\b"
)
_USED = re.compile(r"Used (\d+) registers")
_STATIC_SHARED = re.compile(r"(\d+) bytes smem")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as TensorRT gets it, and its cost.

    Attributes:
        name: of the entry function in `ptx`.
        parameters: types of its pointers, in the order of the tensors, such as ("*fp32", "*i1").
        grid: blocks in x, y and z.
        threads: threads per block (x; y and z are 1).
        shared_bytes: dynamic shared memory per block, requested at the launch.
        registers: per thread.
        spill_bytes: register spill stores and loads.
    """

    name: str
    ptx: str
    parameters: tuple[str, ...]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    registers: int
    spill_bytes: int

    @property
    def sha256(self) -> str:
        """Digest of the PTX."""
        return hashlib.sha256(self.ptx.encode()).hexdigest()


def compile_launch(launch: Launch, pointers: Sequence[str], target: Capability) -> CompiledKernel:
    """Compile a kernel launch for a GPU.

    Args:
        launch: from a module of `earlytom.kernels`.
        pointers: types of its tensors in the kernel's order, such as "*fp16", "*i1" or "*i64".
        target: compute capability.
    """
    triton = load_triton()
    if target not in PTX_VERSIONS:
        asked = ".".join(map(str, target))
        raise EngineError(
            f"there are plugin kernels for compute capability {GPUS} only, not for {asked}: choose another "
            f"--target, or {NATIVE}"
        )
    arch = 10 * target[0] + target[1]
    compiled = triton.compile(
        _source(triton, launch, pointers),
        target=importlib.import_module("triton.backends.compiler").GPUTarget("cuda", arch, 32),
        options={
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "enable_fp_fusion": False,
            "ptx_version": PTX_VERSIONS[target],
        },
    )
    metadata = compiled.metadata
    _check_launchable(metadata)
    ptx = embeddable(compiled.asm["ptx"], metadata.name, len(pointers))
    registers, static_shared, spills = assemble(ptx, arch)
    shared = metadata.shared + static_shared
    if shared > SHARED_LIMIT:
        raise EngineError(
            f"{metadata.name} needs {shared} bytes of shared memory, a TensorRT plugin can have {SHARED_LIMIT}: "
            f"{NATIVE} or fewer --frames"
        )
    return CompiledKernel(
        name=metadata.name,
        ptx=ptx,
        parameters=tuple(pointers),
        grid=launch.grid,
        threads=32 * launch.num_warps,
        shared_bytes=metadata.shared,
        registers=registers,
        spill_bytes=spills,
    )


def _source(triton: Any, launch: Launch, pointers: Sequence[str]) -> Any:
    """The kernel with its types and constants, as input of Triton's compiler."""
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    if len(names) != len(pointers):
        raise ValueError(f"the kernel takes {len(names)} tensors ({', '.join(names)}), got {len(pointers)} types")
    types = dict(zip(names, pointers, strict=True))
    return triton.compiler.ASTSource(
        fn=launch.kernel,
        signature={name: types.get(name, "constexpr") for name in launch.kernel.arg_names},
        constexprs=launch.constants,
    )


def load_triton() -> Any:
    """Import Triton; UserError if it is missing or set to interpret kernels."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set, so Triton compiles nothing: unset it")
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            raise UserError(f"the compression plugin needs Triton: {INSTALL}, or {NATIVE}") from error
        raise UserError(
            f"Triton is installed but cannot be loaded ({' '.join(str(error).split())}): {INSTALL} --force-reinstall, "
            f"or {NATIVE}"
        ) from error


def _check_launchable(metadata: Any) -> None:
    """Refuse a kernel that needs more than a plain launch: scratch memory, clusters, cooperative or dependent grids."""
    extras = {
        "scratch memory": metadata.global_scratch_size or metadata.profile_scratch_size,
        "a cluster of blocks": metadata.num_ctas != 1,
        "a cooperative launch": metadata.launch_cooperative_grid,
        "a dependent launch": metadata.launch_pdl,
        "tensor memory": metadata.tmem_size,
    }
    if needed := [what for what, needs in extras.items() if needs]:
        raise EngineError(f"{metadata.name} needs {', '.join(needed)}, which no TensorRT plugin gets: {NATIVE}")


def embeddable(ptx: str, name: str, parameters: int) -> str:
    """Triton's PTX with the kernel's first `parameters` parameters only, without traces of the compiling machine."""
    ptx = _LINES.sub("", _DEBUG.sub("", _COMMENT.sub("", ptx)))
    entry = _ENTRY.search(ptx)
    if entry is None or ptx.count(".entry") != 1 or entry["name"] != name:
        raise EngineError(f"Triton's PTX is not one kernel named {name}: report the Triton version, and {NATIVE}")
    declared = [line.strip() for line in entry["parameters"].split(",")]
    if len(declared) < parameters:
        raise EngineError(f"{name} has {len(declared)} parameters in PTX, expected {parameters} or more: {NATIVE}")
    own, hidden = declared[:parameters], declared[parameters:]
    for declaration in hidden:
        parameter = declaration.split()[-1]
        if re.search(rf"\b{re.escape(parameter)}\b", entry["body"]):
            raise EngineError(
                f"{name} uses Triton's hidden parameter {parameter}, which TensorRT does not set: {NATIVE}"
            )
    if loose := _LOOSE.search(entry["body"]):
        raise EngineError(f"{name} has {loose[0]}, which need not round as PyTorch does: {NATIVE}")
    kept = ",\n".join(f"\t{declaration}" for declaration in own)
    cut = f"{ptx[: entry.start('parameters')]}\n{kept}\n{ptx[entry.end('parameters') :]}"
    return "\n".join(line.rstrip() for line in cut.splitlines() if line.strip()) + "\n"


def assemble(ptx: str, arch: int) -> tuple[int, int, int]:
    """Assemble PTX with the assembler that ships with Triton.

    Returns:
        registers per thread, bytes of static shared memory per block, bytes of spill stores and loads.
    """
    backend = importlib.import_module("triton.backends.nvidia.compiler")
    name = backend.sm_arch_from_capability(arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="ascii")
        done = subprocess.run(
            [
                backend.get_ptxas(arch).path,
                "-v",
                f"--gpu-name={name}",
                str(path),
                "-o",
                str(path.with_suffix(".cubin")),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    said = done.stdout + done.stderr
    registers, spills = _USED.search(said), _SPILLS.search(said)
    if done.returncode or registers is None or spills is None:
        reason = next((line for line in said.splitlines() if "error" in line), said) or "it said nothing"
        reason = " ".join(reason.split())
        raise EngineError(f"the assembler refused the compression kernel for {name} ({reason}): {NATIVE}")
    static = _STATIC_SHARED.search(said)
    return int(registers[1]), int(static[1]) if static else 0, int(spills[1]) + int(spills[2])
