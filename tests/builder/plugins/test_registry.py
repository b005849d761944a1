"""The compression stage as TensorRT plugins: from the graph to what would be launched, on a machine without TensorRT.

Kernels are compiled in processes of their own by the builder's own build process, with NVIDIA's bindings in it and
`tensorrt_stub.stand_in` in TensorRT's place. What it would launch (kernel, grid, arguments) is then run here, by
Triton's interpreter, and compared with the PyTorch reference and with the function bodies in ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from builder import build
from builder.compile import engine as compiler
from builder.compile import process
from builder.compile.engine import CompileReport, compile_engine
from builder.export import cells, functions
from builder.plugins import graph, ptx
from builder.plugins.registry import PLUGINS, plain
from earlytom import merge, select
from earlytom.cells import select as diverse
from earlytom.errors import UserError
from runtime import cli
from runtime import trt as seam
from runtime.engine import layout
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from tests.builder.plugins.tensorrt_stub import stand_in

ROOT = Path(build.__file__).resolve().parents[1]
STUB = Path(stand_in.__file__).parent
OPSET = 23
needs_bindings = pytest.mark.skipif(stand_in.missing() is not None, reason=str(stand_in.missing()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = ((8, 0), (9, 0))
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.bool: TensorProto.BOOL,
    torch.int64: TensorProto.INT64,
}
TORCH_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "INT64": torch.int64,
}
METHOD = {"tau": 0.8, "ema": 0.9, "max_window": 6, "trailing": "released"}


@dataclass(frozen=True)
class Call:
    """A call of one of the functions: tensors as (type, shape), inputs and outputs."""

    operator: str
    attributes: dict[str, Any]
    inputs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    def body(self) -> onnx.FunctionProto:
        if self.operator == functions.FRAME_PLAN:
            frames = self.inputs["similarity"][1][0]
            unrolled = {name: self.attributes[name] for name in ("max_window", "trailing")}
            return ir.to_proto(functions.frame_plan(max_frames=frames, **unrolled, opset=OPSET))
        if self.operator in cells.BODIES:
            return ir.to_proto(cells.BODIES[self.operator](**self.attributes, opset=OPSET))
        per_frame = self.inputs["received"][1][1]
        return ir.to_proto(functions.select_tokens(per_frame=per_frame, **self.attributes, opset=OPSET))


def plan(frames: int, left: int, **method: Any) -> Call:
    return Call(
        functions.FRAME_PLAN,
        {"frames_out": left, **METHOD, **method},
        {"similarity": (torch.float32, (frames, frames))},
        {"weights": (torch.float32, (left, frames)), "static": (torch.bool, (frames,))},
    )


def greedy(tokens: int, count: int) -> Call:
    return Call(
        cells.SELECT_GREEDY,
        {"count": count},
        {"salient": (torch.float32, (tokens,)), "alike": (torch.float32, (tokens, tokens))},
        {"taken": (torch.int64, (count,))},
    )


def selection(dtype: torch.dtype, frames: int, cells: int, width: int, places: int) -> Call:
    return Call(
        functions.SELECT_TOKENS,
        {"places": places},
        {
            "features": (dtype, (frames, cells, width)),
            "received": (torch.float32, (frames, cells)),
            "static": (torch.bool, (frames,)),
        },
        {"tokens": (dtype, (frames * places, width)), "positions": (torch.int64, (frames * places,))},
    )


# LLaVA-OneVision-7B with 32 frames at a ratio of 0.1: its first plan and its selection.
FULL = {
    "full plan": plan(32, 24),
    "full selection": selection(torch.float16, 14, 196, 3584, 45),
    "full greedy": greedy(14 * 196, 630),
}
SMALL = {
    "budget": plan(12, 9),
    "keep": plan(13, 5, tau=0.5, ema=0.7, max_window=4, trailing="keep"),
    "identity": plan(7, 7),
    "one frame": plan(1, 1),
    "half": selection(torch.float16, 3, 25, 40, 6),
    "bfloat": selection(torch.bfloat16, 2, 16, 24, 1),
    "single": selection(torch.float32, 2, 9, 7, 9),
    "greedy": greedy(75, 21),
}
CALLS = {**FULL, **SMALL}


def model(calls: dict[str, Call]) -> onnx.ModelProto:
    """A graph of these calls, each with inputs and outputs of its own; the bodies are those of the first of a kind."""
    nodes: list[onnx.NodeProto] = []
    inputs: list[onnx.ValueInfoProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    bodies: dict[str, onnx.FunctionProto] = {}
    for name, call in calls.items():
        sides = (call.inputs, call.outputs)
        named = [[f"{name}: {tensor}" for tensor in tensors] for tensors in sides]
        node = helper.make_node(call.operator, named[0], named[1], name, domain=functions.DOMAIN)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in call.attributes.items())
        nodes.append(node)
        for infos, names, tensors in zip((inputs, outputs), named, sides, strict=True):
            for tensor, (dtype, shape) in zip(names, tensors.values(), strict=True):
                infos.append(helper.make_tensor_value_info(tensor, ONNX_TYPES[dtype], shape))
        bodies.setdefault(call.operator, call.body())
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(functions.DOMAIN, functions.VERSION)]
    made = helper.make_graph(nodes, "calls", inputs, outputs)
    return helper.make_model(made, opset_imports=opsets, ir_version=10, functions=list(bodies.values()))


class Machine:
    """This machine as one with a GPU and TensorRT on it, for as long as the patches of a MonkeyPatch last."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.interpreter = folder / "python"
        path = os.pathsep.join([str(STUB), "$PYTHONPATH"])
        script = f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "{STUB / "serve.py"}"\n'
        self.interpreter.write_text(script)
        self.interpreter.chmod(self.interpreter.stat().st_mode | stat.S_IEXEC)
        self.module = SimpleNamespace(__version__=stand_in.VERSION, Builder=object)
        patch.setattr(compiler, "sys", SimpleNamespace(executable=str(self.interpreter), path=sys.path))
        original = seam.load
        patch.setattr(seam, "load", lambda flavour: self.module if flavour == "tensorrt" else original(flavour))
        self.patch = patch
        self.be((8, 0))

    def be(self, capability: tuple[int, int]) -> None:
        self.patch.setattr(seam, "_devices", lambda: (capability,))


@dataclass(frozen=True)
class Built:
    """What a build reports, and what its engine would launch, by node name."""

    report: CompileReport
    launches: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, int], Built]]:
    """The calls compiled for both targets: everything for 8.0, one plan and one selection besides FULL for 9.0."""
    few = {**FULL, "budget": SMALL["budget"], "single": SMALL["single"]}

    def make(target: tuple[int, int], folder: Path) -> Built:
        onnx.save(model(CALLS if target == (8, 0) else few), folder / layout.ONNX_FILE)
        report = compile_engine(
            folder / layout.ONNX_FILE,
            folder / layout.ENGINE_FILE,
            flavour="tensorrt",
            dtype="fp16",
            target=target,
            compression="plugin",
        )
        launches = json.loads((folder / layout.ENGINE_FILE).read_text())
        return Built(report, {launch["node"]: launch for launch in launches})

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("machine")
        Machine(patch, folder)
        patch.setattr(compiler, "check_target", lambda *arguments: None)  # two GPUs at a time is no machine
        with ThreadPoolExecutor(len(TARGETS)) as pool:
            folders = [tmp_path_factory.mktemp("calls") for _ in TARGETS]
            yield dict(zip(TARGETS, pool.map(make, TARGETS, folders), strict=True))


def every(built: dict[tuple[int, int], Built]) -> Iterator[tuple[tuple[int, int], str, dict[str, Any]]]:
    for target, one in built.items():
        for name, launch in one.launches.items():
            yield target, name, launch


# ------------------------------------------------------------------------------------ what TensorRT would be given


@needs_bindings
def test_every_call_becomes_a_kernel_compiled_ahead_of_time(built: dict[tuple[int, int], Built]) -> None:
    assert set(built[8, 0].launches) == set(CALLS)
    for _, name, launch in every(built):
        call = CALLS[name]
        assert launch["kind"] == "_TemplateAOTPlugin"
        assert launch["operator"] == call.operator
        tensors = [*call.inputs.values(), *call.outputs.values()]
        assert [TORCH_TYPES[word] for word in launch["types"]] == [dtype for dtype, _ in tensors]
        assert [tuple(shape) for shape in launch["inputs"] + launch["outputs"]] == [shape for _, shape in tensors]
        assert launch["types"] in launch["offered"]
        assert launch["scalars"] == 0  # shapes are constants of the kernel


@needs_bindings
def test_features_may_have_three_types_and_everything_else_one(built: dict[tuple[int, int], Built]) -> None:
    launches = built[8, 0].launches
    assert launches["half"]["offered"] == [[f, "FLOAT", "BOOL", f, "INT64"] for f in ("FLOAT", "HALF", "BF16")]
    assert launches["budget"]["offered"] == [["FLOAT", "FLOAT", "BOOL"]]


@needs_bindings
def test_the_launch_is_that_of_the_kernel_module(built: dict[tuple[int, int], Built]) -> None:
    for _, _, launch in every(built):
        start = start_of(launch)
        x, y, z = start.grid
        given = launch["parameters"]
        assert (given["grid_x"], given["grid_y"], given["grid_z"]) == (x, y, z)
        assert (given["block_x"], given["block_y"], given["block_z"]) == (32 * start.num_warps, 1, 1)
        assert f".reqntid {given['block_x']}\n" in launch["ptx"]


@needs_bindings
def test_parameters_are_the_tensors_and_nothing_hidden(built: dict[tuple[int, int], Built]) -> None:
    for _, _, launch in every(built):
        entry = re.search(r"\.entry (\w+)\(([^)]*)\)", launch["ptx"])
        assert entry is not None
        assert entry[1] == launch["kernel"]
        assert entry[2].count(".param .u64 .ptr .global") == len(launch["types"]) == entry[2].count(".param")


@needs_bindings
def test_resources(built: dict[tuple[int, int], Built]) -> None:
    for target, one in built.items():
        assert len(one.report.plugins) == len(one.launches)
        for record, launch in zip(one.report.plugins, one.launches.values(), strict=True):
            assert record.spill_bytes == 0
            assert record.shared_bytes <= 48 * 1024
            assert record.registers * record.threads <= 65536
            assert record.shared_bytes == launch["parameters"]["shared_mem"]
            assert f"\n.target {'sm_80' if target == (8, 0) else 'sm_90a'}\n" in launch["ptx"]
            assert launch["ptx"].startswith(".version 8.0\n")


@needs_bindings
def test_ptx_says_nothing_of_the_machine_and_rounds_as_pytorch_does(built: dict[tuple[int, int], Built]) -> None:
    for _, _, launch in every(built):
        text = launch["ptx"]
        assert not re.search(r"//|\.loc|\.file|\.section|\.py", text)
        assert "fma" not in text
    assert "mul.rn.f32" in built[8, 0].launches["budget"]["ptx"]


@needs_bindings
def test_the_report_records_what_is_embedded(built: dict[tuple[int, int], Built]) -> None:
    for _, one in built.items():
        assert one.report.compression == "plugin"
        for record, (name, launch) in zip(one.report.plugins, one.launches.items(), strict=True):
            assert record.name == f"earlytom::{CALLS[name].operator}"
            assert record.version == "1"
            assert record.ptx_sha256 == hashlib.sha256(launch["ptx"].encode()).hexdigest()
            registers, static_shared, spills = ptx.assemble(launch["ptx"], 80 if one.report.target == "8.0" else 90)
            assert (registers, static_shared, spills) == (record.registers, 0, record.spill_bytes)
        assert json.loads(json.dumps(one.report.to_dict()))["plugins"][0]["kernel"] == one.report.plugins[0].kernel
    selected = next(r for r in built[8, 0].report.plugins if "[14, 196, 3584]" in r.tensors)
    assert selected.tensors == ("fp16 [14, 196, 3584], fp32 [14, 196], bool [14] -> fp16 [630, 3584], int64 [630]")


@needs_bindings
def test_attributes_arrive_changed_and_are_put_right(built: dict[tuple[int, int], Built]) -> None:
    given = built[8, 0].launches["keep"]["attributes"]
    assert given["tau"] == 0.5
    assert given["ema"] != 0.7  # through fp32
    assert given["trailing"] == "keep\0"
    assert plain(given) == SMALL["keep"].attributes


# ------------------------------------------------------------------- what is launched, against the two references


def start_of(launch: dict[str, Any]) -> Any:
    """The kernel's start as the plugin makes it, from the shapes and attributes that came through the bindings."""
    plugin = PLUGINS[launch["operator"]]
    return plugin.launch([tuple(shape) for shape in launch["inputs"]], plain(launch["attributes"]))


def execute(launch: dict[str, Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a kernel on the grid and with the arguments that TensorRT would use: inputs, then outputs."""
    given = launch["parameters"]
    start = dataclasses.replace(start_of(launch), grid=(given["grid_x"], given["grid_y"], given["grid_z"]))
    types = [TORCH_TYPES[word] for word in launch["types"][len(inputs) :]]
    outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(launch["outputs"], types, strict=True)]
    for output in outputs:  # nothing may be left as it was
        output.view(torch.uint8).fill_(0xA5)
    on_device = [tensor.to(DEVICE) for tensor in (*inputs, *outputs)]
    start(*on_device)
    return [tensor.cpu() for tensor in on_device[len(inputs) :]]


def onnx_runtime(call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same call with its function body in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    proto = model({"call": call})
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(array)) for array in session.run(None, feed)]


def similarity_of(frames: int, seed: int) -> Tensor:
    """Of a clip with repeated frames, so that there are segments, pairs and ties."""
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randn(frames, 3, 8, generator=generator)
    scene = torch.randint(0, max(1, frames // 4), (frames,), generator=generator).sort().values
    noise = torch.rand(frames, 1, 1, generator=generator).round()  # half of the frames are exact copies
    return merge.frame_similarity(scenes[scene] + 0.3 * noise * torch.randn(frames, 3, 8, generator=generator))


def selection_inputs(call: Call, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    (dtype, features), (_, received), (_, static) = call.inputs.values()
    return [
        torch.randn(features, generator=generator).to(dtype),
        torch.randint(0, 7, received, generator=generator) / 8,  # few values: many ties
        torch.rand(static, generator=generator) < 0.5,
    ]


@needs_bindings
@pytest.mark.parametrize("name", [*(n for n, c in SMALL.items() if c.operator == functions.FRAME_PLAN), "full plan"])
def test_the_launched_plan_is_the_reference_s(built: dict[tuple[int, int], Built], name: str) -> None:
    call, launch = CALLS[name], built[8, 0].launches[name]
    frames, left = call.inputs["similarity"][1][0], call.attributes["frames_out"]
    kinds = set()
    for seed in range(3):
        similarity = similarity_of(frames, seed)
        weights, static = execute(launch, [similarity])
        method = {key: value for key, value in call.attributes.items() if key != "frames_out"}
        wanted, start, end = merge.plan_similarity(similarity, left, **method)
        assert torch.equal(static, merge.static_frames(start, end))
        assert torch.equal(weights != 0, wanted != 0)
        assert torch.allclose(weights, wanted, rtol=0, atol=1e-6)
        body_weights, body_static = onnx_runtime(call, [similarity])
        assert torch.equal(static, body_static)
        assert torch.equal(weights != 0, body_weights != 0)
        assert torch.allclose(weights, body_weights, rtol=0, atol=1e-6)
        kinds |= set(static.tolist())
    if name in ("budget", "full plan"):
        assert kinds == {True, False}  # the clips do try the rules


@needs_bindings
@pytest.mark.parametrize("name", [n for n, c in SMALL.items() if c.operator == functions.SELECT_TOKENS])
def test_the_launched_selection_is_the_reference_s(built: dict[tuple[int, int], Built], name: str) -> None:
    call, launch = CALLS[name], built[8, 0].launches[name]
    for seed in range(3):
        inputs = selection_inputs(call, seed)
        tokens, positions = execute(launch, inputs)
        features, received, static = inputs
        wanted_tokens, wanted = select.select_fixed(features, received, static, call.attributes["places"])
        assert torch.equal(positions, wanted)
        assert torch.equal(tokens, wanted_tokens)
        if tokens.dtype == torch.bfloat16:  # NumPy has none
            continue
        body_tokens, body_positions = onnx_runtime(call, inputs)
        assert torch.equal(positions, body_positions)
        assert torch.equal(tokens, body_tokens)


@needs_bindings
def test_the_launched_greedy_selection_is_the_reference_s(built: dict[tuple[int, int], Built]) -> None:
    call, launch = CALLS["greedy"], built[8, 0].launches["greedy"]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        salient, alike = (torch.randint(0, 9, shape, generator=generator) / 8 for _, shape in call.inputs.values())
        (taken,) = execute(launch, [salient, alike])  # few values: many ties
        assert torch.equal(taken, diverse.select_greedy(salient, alike, 21))
        assert torch.equal(taken, onnx_runtime(call, [salient, alike])[0])
        (other,) = execute(launch, [salient, 1 - alike])
        assert not torch.equal(taken, other)  # negative control


@needs_bindings
def test_another_input_or_another_grid_gives_another_result(built: dict[tuple[int, int], Built]) -> None:
    """Negative control."""
    call, launch = CALLS["half"], built[8, 0].launches["half"]
    inputs = selection_inputs(call, 0)
    _, positions = execute(launch, inputs)
    _, other = execute(launch, [inputs[0], 1 - inputs[1], inputs[2]])
    assert not torch.equal(positions, other)
    short = {**launch, "parameters": {**launch["parameters"], "grid_x": 2}}
    _, untouched = execute(short, inputs)
    assert not torch.equal(positions, untouched)
    similarity = similarity_of(12, 0)
    weights, _ = execute(built[8, 0].launches["budget"], [similarity])
    moved, _ = execute(built[8, 0].launches["budget"], [similarity.flip(0, 1)])
    assert not torch.equal(weights != 0, moved != 0)


# --------------------------------------------------------------------------------------- a build from end to end


@needs_bindings
def test_the_build_command_with_plugins(
    build_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in's engine is no engine, but everything around it is the real command on a real graph."""
    Machine(monkeypatch, tmp_path)
    words = [*build_arguments, "--backend", "tensorrt", "--no-verify", "--out", str(tmp_path / "out")]
    assert cli.run(build.main, words) == 0
    printed = capsys.readouterr().out
    record = json.loads(printed.splitlines()[-1])
    manifest = Manifest.read(record["folder"])
    assert (record["compression"], manifest.compression, manifest.backend) == ("plugin", "plugin", "tensorrt")
    assert "compression: plugin (tensorrt takes the kernels)" in printed
    kinds = [plugin.name for plugin in manifest.plugins]
    assert kinds == [*["earlytom::FramePlan"] * 3, "earlytom::SelectTokens"]  # two merge layers and the final segments
    for plugin in manifest.plugins:
        assert plugin.ptx_sha256[:12] in printed
        assert plugin.tensors in printed
    launches = json.loads((Path(record["folder"]) / layout.ENGINE_FILE).read_text())
    stages = manifest.frames_per_stage
    assert [launch["inputs"][0][0] for launch in launches] == [*stages, stages[-1]]
    assert launches[-1]["outputs"][1] == [manifest.tokens]
    report = json.loads((Path(record["folder"]) / layout.REPORT_FILE).read_text())
    assert [kernel["ptx_sha256"] for kernel in report["compile"]["plugins"]] == [p.ptx_sha256 for p in manifest.plugins]


@needs_bindings
def test_native_with_tensorrt_runs_the_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, tmp_path)
    onnx.save(model({"budget": SMALL["budget"]}), tmp_path / "vision.onnx")
    options: dict[str, Any] = {"flavour": "tensorrt", "dtype": "fp16", "compression": "native"}
    report = compile_engine(tmp_path / "vision.onnx", tmp_path / "vision.engine", **options)
    assert (report.compression, report.plugins) == ("native", ())
    assert json.loads((tmp_path / "vision.engine").read_text()) == []


@needs_bindings
def test_what_goes_wrong_inside_a_callback_is_what_the_user_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, tmp_path)
    proto = model({"call": SMALL["budget"]})
    hidden = "behind the input"
    proto.graph.node.insert(0, helper.make_node("Identity", [proto.graph.input[0].name], [hidden], name="identity"))
    proto.graph.node[1].input[0] = hidden
    proto.graph.value_info.append(helper.make_tensor_value_info(hidden, TensorProto.FLOAT, ("F", "F")))
    onnx.save(proto, tmp_path / "vision.onnx")
    with pytest.raises(EngineError, match=r"FramePlan takes static shapes, similarity has \[-1, -1\].*--frames"):
        compile_engine(tmp_path / "vision.onnx", tmp_path / "vision.engine", flavour="tensorrt", dtype="fp16")
    assert sorted(os.listdir(tmp_path)) == ["python", "vision.onnx"]


# ----------------------------------------------------------------------------------------------- from calls to nodes


def test_calls_become_plugin_nodes_and_bodies_go() -> None:
    """Without the attribute TensorRT's parser looks in the empty namespace, and silently runs the body."""
    proto = model({"plan": SMALL["budget"], "selection": SMALL["half"]})
    before = [list(node.input) + list(node.output) for node in proto.graph.node]
    assert graph.as_plugin_calls(proto, "vision.onnx", set(PLUGINS), "1") == 2
    assert not proto.functions
    assert [list(node.input) + list(node.output) for node in proto.graph.node] == before
    for node in proto.graph.node:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert (given["plugin_namespace"], given["plugin_version"]) == (b"earlytom", b"1")


def test_other_functions_and_nodes_stay() -> None:
    proto = model({"plan": SMALL["budget"]})
    proto.functions.append(helper.make_function("other", "Twice", ["x"], ["y"], [], [helper.make_opsetid("", OPSET)]))
    proto.graph.node.append(helper.make_node("Twice", ["x"], ["y"], domain="other", name="twice"))
    assert graph.as_plugin_calls(proto, "vision.onnx", set(PLUGINS), "1") == 1
    assert [function.name for function in proto.functions] == ["Twice"]
    assert not proto.graph.node[1].attribute


def test_what_no_plugin_is_meant_for_keeps_its_body() -> None:
    shapes = {"salient": (75,), "alike": (75, 75)}
    rounds = Call(
        cells.SELECT_ROUNDS,
        {"count": 21, "rounds": 3},
        {name: (torch.float32, shape) for name, shape in shapes.items()},
        {"taken": (torch.int64, (21,))},
    )
    both = model({"greedy": SMALL["greedy"], "rounds": rounds})
    assert graph.as_plugin_calls(both, "vision.onnx", set(PLUGINS), "1") == 1
    assert [function.name for function in both.functions] == [cells.SELECT_ROUNDS]
    named = [any(a.name == "plugin_namespace" for a in node.attribute) for node in both.graph.node]
    assert named == [True, False]


@pytest.mark.parametrize("known", [{functions.SELECT_TOKENS}, set()])
def test_a_call_without_a_plugin_is_refused_before_parsing(known: set[str]) -> None:
    with pytest.raises(UserError, match=r"'plan' \(earlytom::FramePlan\).*--compression native") as error:
        graph.as_plugin_calls(model({"plan": SMALL["budget"]}), "vision.onnx", known, "1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", [["PLUGIN_V3"], ["PLUGIN_V3", "TOPK", "PLUGIN_V3", "PLUGIN_V3"], []])
def test_a_network_with_other_layers_than_calls_is_refused(layers: list[str]) -> None:
    trt = SimpleNamespace(LayerType=SimpleNamespace(PLUGIN_V3="PLUGIN_V3"))
    network = SimpleNamespace(num_layers=len(layers), get_layer=lambda i: SimpleNamespace(type=layers[i]))
    with pytest.raises(EngineError, match=rf"{layers.count('PLUGIN_V3')} plugin layers of 2 calls"):
        process._check_network(trt, network, 2)
    process._check_network(trt, network, layers.count("PLUGIN_V3"))


@pytest.mark.parametrize("flavour", ["tensorrt-rtx", "onnx"])
def test_the_compiler_refuses_plugins_before_it_starts_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    monkeypatch.setattr(compiler, "check_target", lambda *arguments: None)
    monkeypatch.setattr(compiler.subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    onnx.save(model({"budget": SMALL["budget"]}), tmp_path / "vision.onnx")
    with pytest.raises(UserError, match="--compression plugin cannot be built"):
        compile_engine(
            tmp_path / "vision.onnx", tmp_path / "engine", flavour=flavour, dtype="fp16", compression="plugin"
        )
