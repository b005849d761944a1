"""Looking into an engine folder: what is shown is what is there, and what is no engine is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from builder import build, inspect
from builder.inspection.comparison import compare
from builder.inspection.layers import BIGGEST, graph_layers
from runtime.engine import layout
from runtime.engine.manifest import Manifest, PluginRecord
from tests.builder.conftest import FRAMES, Exported
from tests.builder.inspection.engine_folders import (
    Command,
    drop,
    edit_json,
    look_compiled,
    seal,
)
from tests.builder.needed import needs_rtx
from tests.processes import HANG_SECONDS

ROOT = Path(inspect.__file__).resolve().parents[1]
OPTIONAL = ("tensorrt", "tensorrt_rtx", "torch_tensorrt", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "polygraphy")


# What is shown


def test_a_record_says_what_the_manifest_says(engine: Path) -> None:
    manifest, record = Manifest.read(engine), inspect.describe(engine)
    assert record["manifest"] == manifest.to_dict()
    assert record["tensors"] == [
        {"name": "frames", "direction": "in", "dtype": "uint8", "shape": [FRAMES, 3, 72, 72]},
        {"name": "tokens", "direction": "out", "dtype": "fp16", "shape": [manifest.tokens, 256]},
        {"name": "positions", "direction": "out", "dtype": "int64", "shape": [manifest.tokens]},
        {"name": "sources", "direction": "out", "dtype": "fp32", "shape": [manifest.frames_per_stage[-1], FRAMES]},
        {"name": "place", "direction": "out", "dtype": "int64", "shape": [manifest.tokens]},
        {"name": "bias", "direction": "out", "dtype": "fp32", "shape": [manifest.tokens]},
    ]
    assert manifest.verification is not None
    steps = manifest.verification["steps"]
    assert [(check["step"], check["what"]) for check in record["verification"]["checks"]] == [
        (step, check["what"]) for step, checks in steps.items() for check in checks
    ]
    assert record["compile"] is None


def test_the_tensors_are_those_of_the_graph(engine: Path) -> None:
    graph = onnx.load(str(engine / layout.ONNX_FILE), load_external_data=False).graph
    found = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert {t["name"]: t["shape"] for t in inspect.describe(engine)["tensors"]} == found


def test_the_layers_of_a_graph(engine: Path) -> None:
    record = inspect.describe(engine)
    layers, figures = record["layers"], record["manifest"]["figures"]
    graph = onnx.load(str(engine / layout.ONNX_FILE)).graph
    weights = [numpy_helper.to_array(t) for t in graph.initializer]
    assert layers["weight_bytes"] == sum(w.nbytes for w in weights if np.issubdtype(w.dtype, np.floating))
    assert layers["count"] == len(graph.node) == sum(kind["layers"] for kind in layers["kinds"])
    assert layers["attention_fused"] == 3  # of 4 layers; the last merge layer forms its attention itself
    assert layers["attention_unfused"] == []
    assert 0.95 < layers["half_share"] < 1  # the decisions are fp32
    assert layers["matrix_flops"] == pytest.approx(figures["flops_vision"], rel=0.02)
    assert sum(kind["flops"] for kind in layers["kinds"]) == layers["matrix_flops"]
    # A constant that nodes of two kinds read is in both rows.
    assert 0 <= sum(kind["weight_bytes"] for kind in layers["kinds"]) - layers["weight_bytes"] < 1000  # constants
    assert {"earlytom::FramePlan", "earlytom::SelectTokens"} < {kind["kind"] for kind in layers["kinds"]}
    assert len(layers["biggest"]) == BIGGEST
    assert layers["biggest"][0]["kind"] == "MatMul"


def test_a_graph_in_fp32_has_nothing_in_half(exported: Callable[..., Exported]) -> None:
    """Negative control of the half share."""
    layers = graph_layers(exported("--ratio", "0.3", "--fp32").path)
    assert layers["half_share"] == 0
    assert layers["flop_shares"] == layers["weight_shares"] == {"fp32": 1.0}
    assert {kind["precision"] for kind in layers["kinds"]} <= {"fp32", ""}


def test_weights_beside_a_graph_are_not_read(engine: Path, tmp_path: Path) -> None:
    path = tmp_path / layout.ONNX_FILE
    model = onnx.load(str(engine / layout.ONNX_FILE))
    onnx.save(model, str(path), save_as_external_data=True, location="data", size_threshold=0)
    (tmp_path / "data").unlink()
    assert graph_layers(path) == inspect.describe(engine)["layers"]


def value(name: str, *shape: int, kind: int = TensorProto.FLOAT16) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.mark.parametrize(
    ("operator", "shapes", "out", "flops", "attributes"),
    [
        ("MatMul", [(5, 6, 7), (7, 8)], (5, 6, 8), 2 * 5 * 6 * 7 * 8, {}),
        ("Gemm", [(7, 6), (7, 8)], (6, 8), 2 * 6 * 7 * 8, {"transA": 1}),
        ("Conv", [(2, 3, 9, 9), (4, 3, 3, 3)], (2, 4, 7, 7), 2 * (2 * 4 * 7 * 7) * (3 * 3 * 3), {}),
        ("Attention", [(2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3)], (2, 4, 5, 3), 2 * (2 * 4) * 5 * 7 * (6 + 3), {}),
        ("Add", [(5, 6), (5, 6)], (5, 6), 0, {}),
    ],
)
def test_flops_of_one_operator(
    tmp_path: Path, operator: str, shapes: list[tuple[int, ...]], out: tuple[int, ...], flops: int, attributes: Any
) -> None:
    names = [f"in{i}" for i in range(len(shapes))]
    node = helper.make_node(operator, names, ["out"], **attributes)
    inputs = [value(name, *shape) for name, shape in zip(names, shapes, strict=True)]
    model = helper.make_model(helper.make_graph([node], "one", inputs, [value("out", *out)]))
    onnx.save(model, str(tmp_path / "one.onnx"))
    layers = graph_layers(tmp_path / "one.onnx")
    assert layers["matrix_flops"] == flops
    assert layers["half_share"] == bool(flops)
    assert layers["attention_fused"] == (operator == "Attention")


def test_the_layers_of_a_compiled_engine(compiled: Path) -> None:
    record = inspect.describe(compiled)
    layers = record["layers"]
    assert (layers["source"], layers["count"], layers["matrix_flops"]) == ("build log", 5, 1000)
    assert layers["half_share"] == pytest.approx(0.95)
    assert (layers["attention_fused"], layers["attention_unfused"]) == (1, ["lost"])
    assert layers["weight_bytes"] == 200 + 200 + 20  # w counts once, integers do not
    assert [(kind["kind"], kind["work"], kind["precision"], kind["layers"]) for kind in layers["kinds"]] == [
        ("gemm", "product", "fp16", 2),
        ("kgen", "attention", "fp16", 1),
        ("gemm", "product", "fp32", 1),
        ("kgen", "other", "fp32", 1),
    ]
    assert [one["name"] for one in layers["biggest"]] == ["large", "attention_0", "small", "island", "norm"]
    assert record["compile"] == {"flavour": "tensorrt-rtx", "warnings": ["the sun is shining"], "seconds": {"total": 1}}


def test_an_engine_without_a_list_of_layers(compiled: Path, command: Command) -> None:
    (compiled / layout.LAYERS_FILE).unlink()
    seal(compiled)
    assert inspect.describe(compiled)["layers"] is None
    status, stdout, _ = command(compiled)
    assert status == 0
    assert "layers: the build left no list of them" in stdout


@needs_rtx
def test_an_engine_that_was_really_compiled(build_arguments: list[str], tmp_path: Path) -> None:
    words = [*build_arguments, "--backend", "tensorrt-rtx", "--no-verify", "--json", "--out", str(tmp_path)]
    assert build.main(words) == 0
    (folder,) = tmp_path.iterdir()
    record = inspect.describe(folder)
    layers = record["layers"]
    assert (layers["attention_fused"], layers["attention_unfused"]) == (3, [])
    assert layers["half_share"] > 0.95
    graph = graph_layers(folder / layout.ONNX_FILE)
    assert layers["matrix_flops"] == pytest.approx(graph["matrix_flops"], rel=0.1)
    assert layers["weight_bytes"] == pytest.approx(graph["weight_bytes"], rel=0.25)
    assert layers["weight_bytes"] < (folder / layout.ENGINE_FILE).stat().st_size
    assert record["compile"]["engine_bytes"] == (folder / layout.ENGINE_FILE).stat().st_size


def test_people_see_what_matters(engine: Path, command: Command) -> None:
    status, stdout, stderr = command(engine)
    assert (status, stderr) == (0, "")
    manifest = Manifest.read(engine)
    for shown in (
        f"engine: {engine}",
        f"frames: {' -> '.join(map(str, manifest.frames_per_stage))}; tokens: {manifest.tokens} of {FRAMES * 25}",
        "fused attention: 3 of 3 that can be",
        "in half precision",
        "earlytom.tau              0.5\n",
        "passed, on drawn clip",
        "share of next tokens that agree",
        "export_seconds",
        "vision.onnx",
        f"{FRAMES} x 3 x 72 x 72",
        manifest.model.digest[:12],
    ):
        assert shown in stdout, shown
    assert manifest.model.digest not in stdout
    assert "FAILED" not in stdout


def test_kernels_of_plugins_are_shown(compiled: Path, command: Command) -> None:
    assert "spill bytes" not in command(compiled)[1]
    kernel = PluginRecord(
        "earlytom::FramePlan", "1", "plan", "fp32 [9] -> bool [9]", "ab" * 32, (1, 2, 3), 128, 40, 8, 0
    )
    seal(compiled, compression="plugin", backend="tensorrt", plugins=(kernel,))
    assert inspect.describe(compiled)["manifest"]["plugins"][0]["grid"] == [1, 2, 3]
    stdout = command(compiled)[1]
    for shown in ("spill bytes", "earlytom::FramePlan", "fp32 [9] -> bool [9]", "abababababab\n"):
        assert shown in stdout, shown


def test_people_see_what_is_wrong(compiled: Path, command: Command) -> None:
    manifest = Manifest.read(compiled)
    gate = json.loads(json.dumps(manifest.verification))
    gate["steps"]["tokens"][0]["passed"] = gate["passed"] = False
    seal(compiled, verification=gate | {"notes": ["mind the gap"]})
    status, stdout, _ = command(compiled)
    assert status == 0
    for shown in ("1 of 2 that can be, not lost", "the sun is shining", "mind the gap", "verified: the graph in ONNX"):
        assert shown in stdout, shown
    assert stdout.count("FAILED") == 2
    seal(compiled, verification=None, polygraphy="")
    assert "verified: no (built with --no-verify)" in command(compiled)[1]


@pytest.mark.parametrize("words", [[], ["--compare", "same"]])
def test_json_is_one_document(engine: Path, command: Command, words: list[str]) -> None:
    status, stdout, stderr = command(engine, "--json", *(str(engine) if word == "same" else word for word in words))
    assert (status, stderr, stdout.count("\n")) == (0, "", 1)
    record = inspect.describe(engine)
    assert json.loads(stdout) == (compare(record, record) if words else record)


def test_a_file_of_the_engine_stands_for_it(compiled: Path, tmp_path: Path) -> None:
    record = inspect.describe(compiled)
    for name in (layout.MANIFEST_FILE, layout.ENGINE_FILE, layout.ONNX_FILE):
        assert inspect.describe(compiled / name) == record


BLOCKED = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Block())
from builder import inspect
from runtime import cli
sys.exit(cli.run(inspect.main, sys.argv[1:]))
"""


def run_without(names: tuple[str, ...], *words: object) -> subprocess.CompletedProcess[str]:
    code = [sys.executable, "-c", BLOCKED.format(names=names)]
    return subprocess.run(
        [*code, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )


def test_it_needs_no_library_that_runs_engines(compiled: Path, engine: Path) -> None:
    """A compiled engine needs not even onnx, and the engine is never opened as one: its bytes are none."""
    done = run_without(OPTIONAL, compiled, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == inspect.describe(compiled)
    done = run_without(tuple(name for name in OPTIONAL if name != "onnx"), engine, "--compare", engine)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_without(("builder",), engine)
    assert done.returncode == 1  # negative control: what is blocked cannot be imported


# What is refused


def refused(answer: tuple[int, str, str]) -> str:
    status, stdout, stderr = answer
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert "python -m builder.build" in stderr or "name the folder" in stderr
    return stderr


def test_what_is_no_engine_folder(tmp_path: Path, command: Command, copy: Path) -> None:
    (tmp_path / "file").write_text("x")
    (copy / "notes.txt").write_text("mine")
    assert "does not exist" in refused(command(tmp_path / "nothing"))
    assert "no engine folder" in refused(command(tmp_path))
    assert "no file of an engine folder" in refused(command(tmp_path / "file"))
    assert "notes.txt is no file of the engine" in refused(command(copy / "notes.txt"))
    (tmp_path / "README.md").touch()
    assert "README.md is no file of an engine folder" in refused(command(tmp_path / "README.md"))
    assert "does not exist" in refused(command(copy, "--compare", tmp_path / "nothing"))
    assert "does not exist" in refused(command(copy, "--json", "--compare", tmp_path / "nothing"))
    status, _, stderr = command()
    assert status == 2
    assert "ENGINE" in stderr


@pytest.mark.parametrize("name", [layout.MANIFEST_FILE, layout.ENGINE_FILE, layout.LAYERS_FILE, "report.json"])
def test_a_file_that_changed(compiled: Path, command: Command, name: str) -> None:
    path = compiled / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert name in refused(command(compiled))
    path.unlink()
    assert name in refused(command(compiled))


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (layout.LAYERS_FILE, drop("layers")),
        (layout.LAYERS_FILE, drop("summary")),
        (layout.LAYERS_FILE, drop("summary", "matrix_flops")),
        (layout.LAYERS_FILE, lambda values: values.update(layers=[{"name": "x"}])),
        (layout.LAYERS_FILE, lambda values: values["layers"][0].update(flops="many")),
        (layout.LAYERS_FILE, lambda values: values["summary"].update(flop_shares=[1])),
        (layout.REPORT_FILE, lambda values: values.update(compile="yes")),
        (layout.REPORT_FILE, lambda values: values.update(compile={})),
        (layout.REPORT_FILE, lambda values: values["key_parts"].update(frames=float("nan"))),
    ],
)
def test_files_that_another_version_wrote(
    compiled: Path, command: Command, name: str, edit: Callable[[dict[str, Any]], object]
) -> None:
    edit_json(compiled / name, edit)
    seal(compiled)
    assert "not written by this version" in refused(command(compiled))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"null", b"\xff", pytest.param(b"[" * 9000, id="deep")], ids=repr
)
@pytest.mark.parametrize("name", [layout.LAYERS_FILE, layout.REPORT_FILE])
def test_files_that_hold_something_else(compiled: Path, command: Command, name: str, content: bytes) -> None:
    (compiled / name).write_bytes(content)
    seal(compiled)
    assert "not written by this version" in refused(command(compiled))


@pytest.mark.parametrize("steps", [[], {"tokens": 3}, {"tokens": [{"what": "x"}]}, {"tokens": [{"value": "?"}]}])
def test_a_gate_that_another_version_ran(copy: Path, command: Command, steps: Any) -> None:
    seal(copy, verification={"passed": True, "clips": [], "notes": [], "steps": steps})
    assert "not written by this version" in refused(command(copy))


def test_a_graph_that_is_none(copy: Path, command: Command) -> None:
    (copy / layout.ONNX_FILE).write_bytes(b"this is no graph at all")
    seal(copy)
    assert "no ONNX graph" in refused(command(copy))


HOSTILE: list[bytes] = [
    b"",
    b"[]",
    b"3",
    b'"x"',
    b"[" * 5000,
    b'{"compile": ' * 60 + b"1" + b"}" * 60,
    b'{"compile": 1e999}',
    b'{"compile": {"warnings": 3, "layers": 1}}',
    b'{"compile": [1, 2]}',
    b'{"compile": 1, "layers": [{}], "source": "x", "summary": {}}',
    b'{"compile": 1, "layers": {"a": 1}}',
    b'{"compile": 1, "compile": 2}',
    b'{"key_parts": "\\ud800"}',
    b"[" + b"[]," * 1_100_000 + b"[]]",
    b'{"compile": "' + b"x" * 100_000 + b'"}',
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("name", [layout.REPORT_FILE, layout.LAYERS_FILE])
def test_a_hostile_report_or_layer_list_is_one_line(copy: Path, command: Command, name: str, content: bytes) -> None:
    if name == layout.LAYERS_FILE:
        look_compiled(copy)
    (copy / name).write_bytes(content)
    seal(copy)
    status, stdout, stderr = command(copy)
    assert (status, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith("error: ")
    assert len(stderr) < 800
