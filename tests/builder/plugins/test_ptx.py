"""From Triton's kernels to PTX that an engine can embed, and the records of them."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.plugins import ptx, registry
from builder.plugins.registry import Plugins, shortest_decimal
from earlytom.errors import UserError
from runtime.errors import EngineError
from tests.builder.needed import needs_triton

PTX = """//
.version 8.0
.target sm_80
.address_size 64

	// .globl	toy                     // -- Begin function toy
.visible .entry toy(
	.param .u64 .ptr .global .align 1 toy_param_0,
	.param .u64 .ptr .global .align 1 toy_param_1,
	.param .u64 .ptr .global .align 1 toy_param_2,
	.param .u64 .ptr .global .align 1 toy_param_3
)
.reqntid 128
{
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<3>;
	.loc	1 3 0                           // toy.py:3:0
$L__func_begin0:
	ld.param.b64 	%rd1, [toy_param_0];
	ld.param.b64 	%rd2, [toy_param_1];
$L__tmp0:
	ld.global.b32 	%r1, [%rd1];
	mul.rn.f32 	%r2, %r1, 0f3F000000;
	add.rn.f32 	%r3, %r2, 0f3F800000;
	st.global.b32 	[%rd2], %r3;
	ret;
$L__tmp1:
$L__func_end0:
                                        // -- End function
}
	.file	1 "/somewhere/toy.py"
	.section	.debug_abbrev
	{
.b8 1                                   // Abbreviation Code }
	}
	.section	.debug_macinfo	{	}
"""


def test_hidden_parameters_and_traces_go() -> None:
    text = ptx.embeddable(PTX, "toy", 2)
    assert text.count(".param .u64") == 2
    assert "toy_param_1\n)" in text
    assert not re.search(r"param_[23]|toy\.py|\$L__|debug|//", text)
    assert "add.rn.f32 	%r3, %r2, 0f3F800000;" in text
    if importlib.util.find_spec("triton"):
        registers, shared, spills = ptx.assemble(text, 80)
        assert (registers > 0, shared, spills) == (True, 0, 0)


def test_nothing_hidden_is_nothing_removed() -> None:
    assert ptx.embeddable(PTX, "toy", 4).count(".param .u64") == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[toy_param_1]", "[toy_param_2]", r"uses Triton's hidden parameter toy_param_2"),
        ("[toy_param_1]", "[toy_param_3+4]", r"uses Triton's hidden parameter toy_param_3"),
        ("mul.rn.f32", "mul.f32", r"has mul\.f32, which need not round as PyTorch does"),
        ("add.rn.f32", "add.ftz.f32", r"has add\.ftz\.f32, which"),
        ("mul.rn.f32", "div.full.f32", r"has div\.full, which"),
        (".visible .entry toy(", ".visible .entry other(", "not one kernel named toy"),
        (".visible .entry toy(", ".visible .func toy(", "not one kernel named toy"),
        (",\n\t.param .u64 .ptr .global .align 1 toy_param_1", "", "1 parameters in PTX, expected 2"),
    ],
)
def test_ptx_that_must_not_be_embedded(old: str, new: str, message: str) -> None:
    """Negative control: the same text with one thing wrong."""
    assert old in PTX
    text = PTX.replace(old, new)
    if "expected 2" in message:
        text = re.sub(r",\n\t\.param [^\n]*toy_param_[23]", "", text)
    with pytest.raises(EngineError, match=message) as error:
        ptx.embeddable(text, "toy", 2)
    assert "--compression native" in str(error.value)
    assert "\n" not in str(error.value)


@needs_triton
def test_the_assembler_has_the_last_word() -> None:
    text = ptx.embeddable(PTX, "toy", 2)
    with pytest.raises(EngineError, match=r"assembler refused .* for sm_80 \(.*error.*\)") as error:
        ptx.assemble(text.replace("st.global.b32", "st.nowhere.b32"), 80)
    assert "\n" not in str(error.value)
    with pytest.raises(EngineError, match=r"assembler refused .* for sm_80 \(.+\)") as error:
        ptx.assemble(".version 8.0\n.target sm_80\n.address_size 64\n", 80)  # valid, and no kernel
    assert "\n" not in str(error.value)


@needs_triton
def test_spills_are_seen() -> None:
    """Negative control: many values alive at once in a kernel that may use few registers."""
    count = 120
    loads = "".join(f"\tld.volatile.global.b32 %r{i}, [%rd1+{4 * i}];\n" for i in range(count))
    stores = "".join(f"\tst.volatile.global.b32 [%rd2+{4 * i}], %r{i};\n" for i in range(count))
    text = ptx.embeddable(PTX, "toy", 2)
    head, _ = text.split("\tld.global.b32", 1)
    head = head.replace("%r<4>", f"%r<{count}>").replace(".reqntid 128", ".reqntid 128\n.maxnreg 32")
    _, _, spills = ptx.assemble(f"{head}{loads}{stores}\tret;\n}}\n", 80)
    assert spills > 0


class Compiled:
    """Triton's answer to `triton.compile`, with some of its metadata changed."""

    def __init__(self, **changes: Any) -> None:
        plain_launch = {
            "name": "toy",
            "shared": 64,
            "num_ctas": 1,
            "global_scratch_size": 0,
            "profile_scratch_size": 0,
            "launch_cooperative_grid": False,
            "launch_pdl": False,
            "tmem_size": 0,
        }
        self.metadata = SimpleNamespace(**(plain_launch | changes))
        self.asm = {"ptx": PTX}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ptx.CompiledKernel]:
    """`toy(shared=...)`: compile_launch of a kernel for which Triton answers `Compiled(shared=...)`."""
    asked: dict[str, Any] = {}

    def compile_toy(
        target: tuple[int, int] = (8, 0), pointers: Sequence[str] = ("*fp32", "*fp32"), **changes: Any
    ) -> Any:
        def triton_compile(source: Any, target: Any, options: dict[str, Any]) -> Compiled:
            asked.update(options, arch=target.arch)
            return Compiled(**changes)

        source = SimpleNamespace(ASTSource=lambda **source: source)
        monkeypatch.setattr(ptx, "load_triton", lambda: SimpleNamespace(compile=triton_compile, compiler=source))
        kernel = SimpleNamespace(arg_names=["x", "y", "SIZE"])
        launch = SimpleNamespace(kernel=kernel, grid=(3, 2, 1), constants={"SIZE": 4}, num_warps=4, num_stages=1)
        made = ptx.compile_launch(launch, pointers, target)  # type: ignore[arg-type]
        assert asked == {
            "num_warps": 4, "num_stages": 1, "enable_fp_fusion": False, "ptx_version": 80, "arch": 80,
        }  # fmt: skip
        return made

    return compile_toy


@needs_triton
def test_a_kernel_as_tensorrt_gets_it(toy: Callable[..., ptx.CompiledKernel]) -> None:
    made = toy()
    assert (made.name, made.grid, made.threads, made.shared_bytes, made.spill_bytes) == ("toy", (3, 2, 1), 128, 64, 0)
    assert made.ptx == ptx.embeddable(PTX, "toy", 2)
    assert len(made.sha256) == 64


@needs_triton
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": 48 * 1024 + 1}, "49153 bytes of shared memory, a TensorRT plugin can have 49152"),
        ({"global_scratch_size": 8}, "needs scratch memory"),
        ({"profile_scratch_size": 8}, "needs scratch memory"),
        ({"num_ctas": 2, "launch_pdl": True}, "needs a cluster of blocks, a dependent launch"),
        ({"launch_cooperative_grid": True}, "a cooperative launch"),
        ({"target": (7, 5)}, r"compute capability 8\.0, .* only, not for 7\.5"),
    ],
)
def test_kernels_that_a_plugin_cannot_have(
    toy: Callable[..., ptx.CompiledKernel], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message) as error:
        toy(**changes)
    assert "--compression native" in str(error.value)


@needs_triton
def test_as_many_types_as_tensors(toy: Callable[..., ptx.CompiledKernel]) -> None:
    with pytest.raises(ValueError, match=r"takes 2 tensors \(x, y\), got 3 types"):
        toy(pointers=["*fp32"] * 3)


def test_triton_must_be_there_and_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET is set, so Triton compiles nothing: unset it"):
        ptx.load_triton()
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def without(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(ptx.importlib, "import_module", without)
    with pytest.raises(UserError, match=r"needs Triton: pip install .*\[plugin\].*--compression native"):
        ptx.load_triton()

    def broken(name: str) -> Any:
        raise ImportError("libtriton.so: cannot open\nshared object file")

    monkeypatch.setattr(ptx.importlib, "import_module", broken)
    with pytest.raises(UserError, match=r"cannot be loaded \(libtriton.so: cannot open shared object file\)"):
        ptx.load_triton()


@given(st.integers(-(10**6), 10**6), st.integers(0, 6))
@settings(deadline=None, max_examples=200)
def test_decimals_survive_fp32(digits: int, places: int) -> None:
    number = digits / 10**places
    assert shortest_decimal(float(np.float32(number))) == number


@pytest.mark.parametrize("number", [0.1, 0.8, 1 / 3, 1e-45, 3.4e38, float("inf")])
def test_the_shortest_decimal_is_the_same_fp32_number(number: float) -> None:
    once = float(np.float32(number))
    assert np.float32(shortest_decimal(once)) == np.float32(once)
    assert shortest_decimal(shortest_decimal(once)) == shortest_decimal(once)


def test_one_kernel_for_equal_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_one(launch: Any, pointers: Sequence[str], target: tuple[int, int]) -> ptx.CompiledKernel:
        asked.append((launch, tuple(pointers), target))
        return ptx.CompiledKernel("toy", PTX + str(len(asked)), tuple(pointers), (1, 1, 1), 128, 0, 8, 0)

    monkeypatch.setattr(registry, "compile_launch", compile_one)
    both = Plugins((8, 9))

    def launch(shapes: Sequence[tuple[int, ...]], attributes: Any) -> Any:
        return tuple(shapes), attributes["tau"]

    plugin = dataclasses.replace(registry.FRAME_PLAN, launch=launch)
    types = ("FP32", "FP32", "BOOL")
    attributes = {"frames_out": 9, "tau": 0.8, "ema": 0.9, "max_window": 6, "trailing": "released"}
    first = both.kernel(plugin, types, [(12, 12)], attributes)
    assert both.kernel(plugin, types, [(12, 12)], dict(attributes)) is first
    other = both.kernel(plugin, types, [(12, 12)], attributes | {"tau": 0.5})
    assert other is not first
    assert asked[0] == ((((12, 12),), 0.8), ("*fp32", "*fp32", "*i1"), (8, 9))
    assert [record.tensors for record in both.records] == ["fp32 [12, 12] -> fp32 [9, 12], bool [12]"] * 2
    assert both.records[0].ptx_sha256 != both.records[1].ptx_sha256
    with pytest.raises(EngineError, match=r"static shapes, similarity has \[12, -1\]"):
        both.kernel(plugin, types, [(12, -1)], attributes)
