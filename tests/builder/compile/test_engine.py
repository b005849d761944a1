"""Compiling: a small vision tower through tensorrt-rtx for compute capability 8.0 on this CPU, and everything refused.

The tower is written with onnx.helper: uint8 frames, a patch convolution, two attention layers, and a local function
that picks positions. Cheap refusals run `engine_process._build` in this process; what is about processes starts one.
"""

import dataclasses
import io
import json
import os
import resource
import stat
import subprocess
import threading
import types

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from builder.compile import engine as compiler
from builder.compile import process
from builder.compile.engine import check_target, compile_engine
from builder.compile.process import CompileRequest, check_nodes
from earlytom.errors import UserError
from runtime import trt as seam
from runtime.errors import EngineError
from tests.builder.needed import needs_rtx

F, SIDE, PATCH, GRID, D, HEADS = 2, 36, 4, 9, 64, 2
S = GRID * GRID
NUMPY = {"fp16": np.float16, "fp32": np.float32}
KIND = {"fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16}


def select_function(operator="TopK"):
    """earlytom::SelectTokens: the first output of TopK, or of an operator that TensorRT-RTX does not have."""
    constant = helper.make_node("Constant", [], ["k"], value=helper.make_tensor("k", TensorProto.INT64, (1,), [5]))
    if operator == "TopK":
        body = [constant, helper.make_node("TopK", ["scores", "k"], ["values", "picked"], name="inner")]
    else:
        body = [helper.make_node(operator, ["scores"], ["picked"], name="inner")]
    return helper.make_function("earlytom", "SelectTokens", ["scores"], ["picked"], body, [helper.make_opsetid("", 23)])


def tower(path, dtype="fp16", *, functions=None, frames=F):
    """Save the small tower; returns the path."""
    rng = np.random.default_rng(0)
    kind, weights, nodes = KIND[dtype], [], []

    def weight(name, *shape):
        values = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        weights.append(helper.make_tensor(name, kind, shape, values.flatten()))
        return name

    def node(operator, inputs, output, **attributes):
        nodes.append(helper.make_node(operator, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def integers(name, *values):
        weights.append(helper.make_tensor(name, TensorProto.INT64, (len(values),), values))
        return name

    heads, merged = integers("heads", -1, S, HEADS, D // HEADS), integers("merged", -1, S, D)
    x = node("Cast", ["frames"], "pixels", to=kind)
    x = node("Conv", [x, weight("patch", D, 3, PATCH, PATCH)], "patches", strides=[PATCH, PATCH])
    x = node("Reshape", [x, integers("flat", -1, D, S)], "flattened")
    x = node("Transpose", [x], "hidden", perm=[0, 2, 1])
    for layer in range(2):
        parts = []
        for part in "qkv":
            y = node("MatMul", [x, weight(f"w_{part}{layer}", D, D)], f"{part}{layer}")
            y = node("Reshape", [y, heads], f"{part}_split{layer}")
            parts.append(node("Transpose", [y], f"{part}_heads{layer}", perm=[0, 2, 1, 3]))
        y = node("Attention", parts, f"attention{layer}", scale=(D // HEADS) ** -0.5)
        y = node("Reshape", [node("Transpose", [y], f"back{layer}", perm=[0, 2, 1, 3]), merged], f"joined{layer}")
        x = node("Add", [x, node("MatMul", [y, weight(f"w_o{layer}", D, D)], f"out{layer}")], f"sum{layer}")
    x = node("Identity", [x], "tokens")
    scores = node("ReduceMean", [x, integers("last", -1)], "scores", keepdims=0)
    nodes.append(helper.make_node("SelectTokens", [scores], ["positions"], domain="earlytom", name="select"))
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("frames", TensorProto.UINT8, (frames, 3, SIDE, SIDE))],
        [
            helper.make_tensor_value_info("tokens", kind, (frames, S, D)),
            helper.make_tensor_value_info("positions", TensorProto.INT64, (frames, 5)),
        ],
        weights,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("earlytom", 1)]
    functions = [select_function()] if functions is None else functions
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions), path)
    return path


def compile_small(folder, onnx_path, **options):
    options = {"flavour": "tensorrt-rtx", "dtype": "fp16", **options}
    return compile_engine(onnx_path, folder / "vision.engine", **options)


def build_here(tmp_path, onnx_path, **changes):
    """What the build process does, in this process."""
    request = CompileRequest(
        onnx=str(onnx_path),
        engine=str(tmp_path / "engine"),
        layers=str(tmp_path / "layers.json"),
        flavour="tensorrt-rtx",
        target=(8, 0),
        dtype="fp16",
        hardware_compatible=False,
        workspace_bytes=2**30,
    )
    return process._build(dataclasses.replace(request, **changes), lambda message: None)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One compiled engine: its folder, its report, the progress that was reported."""
    folder = tmp_path_factory.mktemp("engine")
    seen = []
    report = compile_small(folder, tower(folder / "vision.onnx"), progress=seen.append)
    return folder, report, seen


@needs_rtx
def test_an_engine_for_the_a100_without_a_gpu(built):
    folder, report, _ = built
    assert sorted(os.listdir(folder)) == ["layers.json", "vision.engine", "vision.onnx"]
    assert report.engine_bytes == (folder / "vision.engine").stat().st_size > 100_000
    assert (report.target, report.dtype, report.flavour) == ("8.0", "fp16", "tensorrt-rtx")
    assert report.version == seam.flavours()["tensorrt-rtx"]
    assert 0 < report.seconds["build"] < report.seconds["total"]
    assert 2**26 < report.peak_rss_bytes < 2**33
    assert json.loads(json.dumps(report.to_dict()))["layers"]["half_share"] == report.layers.half_share


@needs_rtx
def test_the_layer_list_says_what_became_of_the_graph(built):
    folder, report, _ = built
    layers = report.layers
    assert len(layers.attention_fused) == 2
    assert layers.attention_unfused == layers.unplaced == layers.unsized == ()
    assert layers.flop_shares == {"fp16": 1.0}
    linear = 2 * F * S * D * (8 * D)
    attention = 2 * (4 * F * S * S * D)
    convolution = 2 * F * S * D * (4 * PATCH * PATCH)  # the three channels are padded to four
    assert layers.matrix_flops == linear + attention + convolution
    document = json.loads((folder / "layers.json").read_text())
    assert document["source"] == "build log"
    assert document["summary"]["attention_fused"] == list(layers.attention_fused)
    tensors = [t for layer in document["layers"] for t in layer["inputs"] + layer["outputs"]]
    io = {t["name"]: (t["shape"], t["dtype"]) for t in tensors if t["name"] in ("frames", "tokens", "positions")}
    assert io == {
        "frames": ([F, 3, SIDE, SIDE], "uint8"),
        "tokens": ([F, S, D], "fp16"),
        "positions": ([F, 5], "int64"),
    }


@needs_rtx
def test_progress_names_phases_and_time_moves_on(built):
    _, _, seen = built
    phases = [state.phase for state in seen]
    assert "Parsing" in phases
    assert "Building engine" in phases
    assert [s.seconds for s in seen] == sorted(s.seconds for s in seen)


@needs_rtx
def test_two_builds_are_byte_identical(built, tmp_path):
    folder, _, _ = built
    compile_small(tmp_path, tower(tmp_path / "other_name.onnx"), layers_path=tmp_path / "list.json")
    assert (tmp_path / "vision.engine").read_bytes() == (folder / "vision.engine").read_bytes()
    assert (tmp_path / "list.json").read_text() == (folder / "layers.json").read_text()


@needs_rtx
def test_an_fp32_graph_is_no_fp16_engine(tmp_path):
    path = tower(tmp_path / "vision.onnx", "fp32")
    with pytest.raises(UserError, match=r"--fp16.*100\.0 % fp32.*expected at least 90 % fp16"):
        compile_small(tmp_path, path)
    assert os.listdir(tmp_path) == ["vision.onnx"]


@needs_rtx
@pytest.mark.parametrize(("dtype", "fused"), [("fp32", 0), ("bf16", 2)])
def test_the_other_precisions(tmp_path, dtype, fused):
    result = build_here(tmp_path, tower(tmp_path / "vision.onnx", dtype), dtype=dtype)
    assert result["layers"]["flop_shares"] == {dtype: 1.0}
    assert len(result["layers"]["attention_fused"]) == fused
    with pytest.raises(UserError, match="--fp16"):
        build_here(tmp_path, tmp_path / "vision.onnx", dtype="fp16")


@needs_rtx
def test_the_settings_and_a_strongly_typed_network(tmp_path, monkeypatch):
    trt = seam.load("tensorrt-rtx")
    builder = trt.Builder(seam.collecting_logger(trt))
    request = CompileRequest("", "", "", "tensorrt-rtx", (8, 6), "fp32", False, 2**30)
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)  # the library's default
    config = process._configure(trt, builder, request)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or the runtime cannot capture a CUDA graph
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM86
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 2**30
    networks = []
    monkeypatch.setattr(process, "_parse", lambda trt, network, *rest: networks.append(network) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_here(tmp_path, tower(tmp_path / "vision.onnx"))
    assert networks[0].get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


@needs_rtx
def test_an_operator_that_cannot_be_parsed_is_named_with_its_caller(tmp_path):
    path = tower(tmp_path / "vision.onnx", functions=[select_function("NonZero")])
    with pytest.raises(UserError, match=r"cannot parse vision.onnx: node 'inner' \(NonZero\) inside select") as error:
        compile_small(tmp_path, path)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["vision.onnx"]


@needs_rtx
def test_softmax_precision_is_refused_by_the_parser(tmp_path):
    # Known to the exporter: this attribute of Attention is standard ONNX, and TensorRT does not take it.
    model = onnx.load(tower(tmp_path / "vision.onnx"))
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute("softmax_precision", TensorProto.FLOAT))
    onnx.save(model, tmp_path / "vision.onnx")
    with pytest.raises(UserError, match=r"node_attention0.*softmax precision"):
        build_here(tmp_path, tmp_path / "vision.onnx")


@needs_rtx
def test_external_data_lies_beside_the_file(tmp_path):
    model = onnx.load(tower(tmp_path / "inline.onnx"))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    path = tmp_path / "vision.onnx"
    onnx.save(model, path, save_as_external_data=True, location="vision.onnx.data", size_threshold=0)
    data = (tmp_path / "vision.onnx.data").read_bytes()
    assert build_here(tmp_path, path)["layers"]["flop_shares"] == {"fp16": 1.0}
    (tmp_path / "vision.onnx.data").write_bytes(data[:100])
    with pytest.raises(UserError, match=r"cannot parse vision.onnx: .*initializer"):
        build_here(tmp_path, path)


@needs_rtx
def test_a_dynamic_input_is_refused(tmp_path):
    path = tower(tmp_path / "vision.onnx", frames="F")
    with pytest.raises(UserError, match=r"'frames' of vision.onnx has dynamic shape \(-1, 3, 36, 36\).*--frames"):
        build_here(tmp_path, path)


@needs_rtx
def test_too_little_workspace_is_said(tmp_path):
    with pytest.raises(UserError, match=r"within 9\.313e-10 GiB \(--workspace\): .*workspace"):
        build_here(tmp_path, tower(tmp_path / "vision.onnx"), workspace_bytes=1)


EMPTY = helper.make_model(helper.make_graph([], "empty", [], [])).SerializeToString()


def foreign_node(place):
    """A model with one node of another domain: in the graph, in a function, or in a branch of an If."""
    foreign = helper.make_node("FrameMerge", ["x"], ["y"], domain="other", name="stranger")
    floats = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (2,)) for n in "xy"]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("other", 1), helper.make_opsetid("earlytom", 1)]
    functions, node = [], foreign
    if place == "function":
        functions = [helper.make_function("earlytom", "Plan", ["x"], ["y"], [foreign], opsets[:2])]
        node = helper.make_node("Plan", ["x"], ["y"], domain="earlytom", name="call")
    elif place == "branch":
        branch = helper.make_graph([foreign], "branch", [], floats[1:])
        other = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", [], floats[1:])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other, name="if")
    elif place == "body missing":
        node = helper.make_node("Plan", ["x"], ["y"], domain="earlytom", name="stranger")
    inputs = [floats[0], helper.make_tensor_value_info("c", TensorProto.BOOL, ())]
    graph = helper.make_graph([node], "g", inputs, floats[1:])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


@pytest.mark.parametrize("place", ["graph", "function", "branch", "body missing"])
def test_a_node_of_another_domain_is_refused_before_tensorrt_sees_it(tmp_path, monkeypatch, place):
    path = tmp_path / "vision.onnx"
    onnx.save(foreign_node(place), path)
    monkeypatch.setattr(seam, "load", lambda flavour: None)  # any use of the library would be an AttributeError
    with pytest.raises(UserError, match=r"'stranger' \((other|earlytom)::(FrameMerge|Plan)\)"):
        build_here(tmp_path, path)


def test_nodes_of_the_tower(tmp_path):
    nodes = check_nodes(tower(tmp_path / "vision.onnx"))
    assert sorted(nodes.attention) == ["node_attention0", "node_attention1"]
    assert len(nodes.matrix) == 2 * 5 + 1


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(100)), EMPTY])
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "vision.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an ONNX model"):
        check_nodes(path)


@needs_rtx
def test_no_such_file_through_the_build_process(tmp_path):
    with pytest.raises(UserError, match=r"no such ONNX file: .*nowhere.onnx"):
        compile_small(tmp_path, tmp_path / "nowhere.onnx")
    assert os.listdir(tmp_path) == []


@needs_rtx
def test_a_disk_that_is_full(tmp_path):
    path = tower(tmp_path / "vision.onnx")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # inherited; Python ignores the signal, so write() fails
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}'"):
            compile_small(tmp_path, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["vision.onnx"]


@needs_rtx
def test_a_folder_that_is_not_there(tmp_path):
    path = tower(tmp_path / "vision.onnx")
    with pytest.raises(FileNotFoundError, match="absent"):
        compile_engine(path, tmp_path / "absent" / "vision.engine", flavour="tensorrt-rtx", dtype="fp16")


@pytest.fixture
def processes(monkeypatch):
    """Every process that is started."""
    started = []
    real = subprocess.Popen

    def popen(*arguments, **options):
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(compiler.subprocess, "Popen", popen)
    return started


@needs_rtx
def test_an_interrupted_build_leaves_nothing(tmp_path, processes):
    path = tower(tmp_path / "vision.onnx")
    (tmp_path / "vision.engine").write_bytes(b"the one from before")

    def interrupt(state):
        if state.phase == "Building engine":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_small(tmp_path, path, progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == ["vision.engine", "vision.onnx"]
    assert (tmp_path / "vision.engine").read_bytes() == b"the one from before"
    assert [process.poll() for process in processes] == [-9]


@needs_rtx
@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("echo 'plugin says no' >&2; kill -ABRT $$", EngineError, r"SIGABRT\) in phase 'Starting': plugin says no"),
        ("kill -KILL $$", EngineError, r"SIGKILL.*out of memory"),
        ("exit 0", EngineError, "no answer"),
        ("echo 'Traceback: of ours' >&2; exit 1", RuntimeError, "Traceback: of ours"),
        ("""echo '{"defect": "Traceback: told"}'; exit 1""", RuntimeError, "Traceback: told"),
    ],
)
def test_a_build_process_that_dies(tmp_path, monkeypatch, script, error, message):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{script}\n")
    interpreter.chmod(interpreter.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(compiler.sys, "executable", str(interpreter))
    with pytest.raises(error, match=message):
        compile_small(tmp_path, tower(tmp_path / "vision.onnx"))
    assert sorted(os.listdir(tmp_path)) == ["python", "vision.onnx"]


@needs_rtx
@pytest.mark.parametrize("chosen", ["1", "0", None])
def test_the_build_process_is_not_one_of_triton_s_interpreter(tmp_path, monkeypatch, chosen):
    if chosen is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", chosen)
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\nprintf \'{"error": "it has <%s>", "kind": ""}\' "$TRITON_INTERPRET"\n')
    interpreter.chmod(interpreter.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(compiler.sys, "executable", str(interpreter))
    with pytest.raises(UserError, match="it has <>"):
        compile_small(tmp_path, tower(tmp_path / "vision.onnx"))


@needs_rtx
@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"workspace_gib": 0}, {"workspace_gib": float("nan")}])
def test_settings_that_make_no_sense(tmp_path, processes, options):
    with pytest.raises(UserError, match=r"--fp16, --bf16 or --fp32|workspace must be"):
        compile_small(tmp_path, tower(tmp_path / "vision.onnx"), **options)
    assert processes == []


class ComputeCapability:
    __members__ = dict.fromkeys(["NONE", "CURRENT", "SM75", "SM80", "SM120"])


@pytest.mark.parametrize(
    ("flavour", "gpu", "target", "hardware_compatible", "message"),
    [
        ("tensorrt-rtx", None, (8, 0), False, None),
        ("tensorrt-rtx", None, (12, 0), False, None),
        (
            "tensorrt-rtx",
            None,
            (9, 0),
            False,
            r"not compile for compute capability 9\.0, only for 7\.5, 8\.0, 12\.0",
        ),
        ("tensorrt-rtx", None, (8, 0), True, "--hardware-compatible is for --backend tensorrt"),
        ("tensorrt", None, (8, 0), False, "only on a machine with an NVIDIA GPU"),
        ("tensorrt", (8, 0), (8, 0), False, None),
        ("tensorrt", (8, 0), (8, 0), True, None),
        ("tensorrt", (9, 0), (8, 0), True, None),
        ("tensorrt", (9, 0), (8, 0), False, r"target is compute capability 8\.0 and this GPU is 9\.0.*--hardware-comp"),
        ("tensorrt", (7, 5), (8, 0), True, r"needs compute capability 8\.0 or newer.*got 7\.5"),
        ("tensorrt", (8, 0), (7, 5), True, r"needs compute capability 8\.0 or newer.*--target 7\.5"),
        ("tensorrt", (7, 5), (7, 5), False, None),
    ],
)
def test_which_targets_can_be_built_here(monkeypatch, flavour, gpu, target, hardware_compatible, message):
    class Module:
        __version__ = "1.7.1"

    Module.ComputeCapability = ComputeCapability
    monkeypatch.setattr(seam, "load", lambda name: Module)
    monkeypatch.setattr(seam, "gpu_capability", lambda: gpu)
    if message is None:
        check_target(flavour, target, hardware_compatible)
    else:
        with pytest.raises(EngineError, match=message):
            check_target(flavour, target, hardware_compatible)


def test_a_missing_library_is_said_before_anything_starts(tmp_path, monkeypatch, processes):
    def missing(flavour):
        raise EngineError("tensorrt-rtx is not installed: pip install")

    monkeypatch.setattr(seam, "load", missing)
    with pytest.raises(EngineError, match="not installed"):
        compile_small(tmp_path, tower(tmp_path / "vision.onnx"))
    assert processes == []


def test_output_that_is_closed_while_it_is_read_ends_the_messages_and_prints_nothing(monkeypatch):
    """As when an interrupted build kills the process: its pipe is closed, and the thread may be in the midst of it."""

    def closing():
        yield '{"phase": "Building", "done": 1, "steps": 2}\n'
        raise ValueError("I/O operation on closed file.")

    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    child = types.SimpleNamespace(stdin=io.StringIO(), stdout=closing())
    assert [message for message in compiler._messages(child, "{}") if message] == [
        {"phase": "Building", "done": 1, "steps": 2}
    ]
    assert failed == []
