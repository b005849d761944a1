"""What a kernel takes when it is compiled, for the tests: registers, shared memory, spills. Needs no GPU.

Tests run kernels in Triton's interpreter, and a process that does cannot compile them: this is done in another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from earlytom.kernels.launch import Launch
from tests.processes import HANG_SECONDS


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        capability: 80 or 90. aligned: whether tensors were taken to start at multiples of 16 bytes.
        registers: of a thread. shared, spilled: bytes.
        stores: widths of its stores to memory, in bytes. loose: fp32 products and sums in its PTX that are fused
            or that the driver may fuse.
    """

    capability: int
    aligned: bool
    registers: int
    shared: int
    spilled: int
    stores: list[int]
    loose: list[str]


COMPILE = r"""
import importlib, json, pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

def resources(module, name, constants, pointers, options, capability, aligned):
    kernel = getattr(importlib.import_module(module), name)
    tensors = [n for n in kernel.arg_names if n not in constants]
    types = dict(zip(tensors, pointers, strict=True))
    alignment = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in tensors and aligned}
    source = ASTSource(kernel, {n: types.get(n, "constexpr") for n in kernel.arg_names}, constants, alignment)
    options |= {"enable_fp_fusion": False, "ptx_version": 80}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        text = pathlib.Path(folder, "kernel.ptx")
        text.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx)[1]
        words = [get_ptxas(80).path, "-v", "-arch", target, str(text), "-o", f"{folder}/cubin"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill", said)
    stores = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return {
        "capability": capability,
        "aligned": aligned,
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "shared": compiled.metadata.shared,
        "spilled": sum(map(int, spilled)),
        "stores": [int(count or 1) * int(bits) // 8 for count, bits in stores],
        "loose": re.findall(r"\b(?:(?:add|sub|mul)(?:\.ftz)?\.f32|(?:fma|mad)\.[\w.]*f32)\b", ptx),
    }

print(json.dumps([resources(*job) for job in json.load(sys.stdin)]))
"""


def resources(starts: Sequence[tuple[Launch, list[str]]], aligned: Sequence[bool] = (False, True)) -> list[Resources]:
    """Compile each start of a kernel, with the types of its tensors, for the A100 and for the H100."""
    jobs = [
        (one.kernel.fn.__module__, one.kernel.fn.__name__, one.constants, pointers, options, capability, whole)
        for one, pointers in starts
        for options in [{"num_warps": one.num_warps, "num_stages": one.num_stages}]
        for capability in (80, 90)
        for whole in aligned
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[3],
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return [Resources(**found) for found in json.loads(done.stdout)]
