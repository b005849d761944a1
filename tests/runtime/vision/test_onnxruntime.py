"""The ONNX Runtime backend on small hand-made graphs, and the choice of a backend for an engine folder."""

import threading
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from earlytom.config import EarlyTomConfig
from runtime import choices, trt
from runtime.engine.manifest import FileRecord, Manifest, ModelRecord
from runtime.engine.records import PreprocessingRecord
from runtime.errors import EngineError
from runtime.vision import VisionBackend, choose_backend
from runtime.vision.onnxruntime import OnnxRunner
from runtime.vision.whole import Whole
from tests.processes import HANG_SECONDS
from tests.runtime.vision.opened import open_whole

SHAPE = (2, 3, 4, 4)
TOKENS, WIDTH = 6, 5
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
WEIGHT = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))


def save(
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    frames: tuple[Any, ...] = SHAPE,
    frames_type: int = TensorProto.UINT8,
    tokens: tuple[Any, ...] = (TOKENS, WIDTH),
    positions_type: int = TensorProto.INT64,
    names: tuple[str, str, str] = ("frames", "tokens", "positions"),
    external: bool = False,
) -> Path:
    """A graph with an engine's inputs and outputs: each 4x4 plane times a matrix is a token."""
    kind = TYPES[dtype]
    weight = numpy_helper.from_array(WEIGHT.numpy(), "weight")
    nodes = [
        helper.make_node("Cast", [names[0]], ["cast"], to=kind),
        helper.make_node("Reshape", ["cast", "flat"], ["rows"]),
        helper.make_node("Cast", ["weight"], ["matrix"], to=kind),
        helper.make_node("MatMul", ["rows", "matrix"], [names[1]]),
        helper.make_node("Cast", ["where"], [names[2]], to=positions_type),
        helper.make_node("Identity", ["made"], ["sources"]),
        helper.make_node("Identity", ["where"], ["place"]),
        helper.make_node("Cast", ["where"], ["bias"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "engine",
        [helper.make_tensor_value_info(names[0], frames_type, frames)],
        [
            helper.make_tensor_value_info(names[1], kind, tokens),
            helper.make_tensor_value_info(names[2], positions_type, (TOKENS,)),
            helper.make_tensor_value_info("sources", TensorProto.FLOAT, (2, 2)),
            helper.make_tensor_value_info("place", TensorProto.INT64, (TOKENS,)),
            helper.make_tensor_value_info("bias", TensorProto.FLOAT, (TOKENS,)),
        ],
        [
            weight,
            helper.make_tensor("made", TensorProto.FLOAT, [2, 2], [1, 0, 0, 1]),
            helper.make_tensor("flat", TensorProto.INT64, [2], [TOKENS, 16]),
            helper.make_tensor("where", TensorProto.INT64, [TOKENS], range(TOKENS)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=external, location=path.name + ".data", size_threshold=0)
    return path


def clip(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def expected(frames: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (frames.reshape(TOKENS, 16).to(dtype).float() @ WEIGHT.to(dtype).float()).to(dtype)


@pytest.fixture
def vision(tmp_path: Path) -> Whole:
    return open_whole(save(tmp_path / "vision.onnx"))


# Running


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encode_runs_the_graph(tmp_path: Path, dtype: torch.dtype) -> None:
    vision: VisionBackend = open_whole(save(tmp_path / "vision.onnx", dtype), threads=1)
    tokens, positions, *_ = vision.encode(clip())
    assert (tokens.dtype, positions.dtype) == (dtype, torch.int64)
    torch.testing.assert_close(tokens, expected(clip(), dtype), rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1)
    assert not torch.allclose(tokens, expected(clip(1), dtype), atol=1)  # negative control
    assert positions.tolist() == list(range(TOKENS))
    assert vision.name == "onnxruntime"


def test_external_data_is_found_beside_the_graph(tmp_path: Path) -> None:
    path = save(tmp_path / "vision.onnx", external=True)
    tokens, *_ = open_whole(path).encode(clip())
    torch.testing.assert_close(tokens, expected(clip()), rtol=1e-4, atol=1e-2)


def test_frames_are_read_from_the_caller_s_memory_each_time(vision: Whole) -> None:
    frames = clip(0)
    vision.encode(frames)
    frames.copy_(clip(1))
    torch.testing.assert_close(vision.encode(frames)[0], expected(clip(1)), rtol=1e-4, atol=1e-2)
    strided = clip(2).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(vision.encode(strided)[0], expected(clip(2)), rtol=1e-4, atol=1e-2)


def test_a_second_call_at_the_same_time_is_refused(vision: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    running, done = threading.Event(), threading.Event()

    class Slow:
        def run_with_iobinding(self, binding: object) -> None:
            running.set()
            assert done.wait(HANG_SECONDS)

    monkeypatch.setattr(vision.runner, "session", Slow())
    thread = threading.Thread(target=vision.encode, args=(clip(),))
    thread.start()
    assert running.wait(HANG_SECONDS)
    with pytest.raises(RuntimeError, match="busy"):
        vision.encode(clip())
    done.set()
    thread.join(HANG_SECONDS)
    vision.encode(clip())  # free again


def test_threads_default_to_those_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "vision.onnx")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert open_whole(path).runner.session.get_session_options().intra_op_num_threads == 3
    assert open_whole(path, threads=1).runner.session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(EngineError, match="at least 1"):
        open_whole(path, threads=0)


# What it refuses


def refused(path: Path, match: str) -> None:
    with pytest.raises(EngineError, match=match) as caught:
        open_whole(path)
    assert "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "vision.onnx"
    refused(path, "is missing")
    save(path)
    content = path.read_bytes()
    open_whole(path)  # negative control
    for broken in (b"", b"no graph", content[: len(content) // 2]):
        path.write_bytes(broken)
        refused(path, "cannot load .*--force")


def test_missing_external_data(tmp_path: Path) -> None:
    path = save(tmp_path / "vision.onnx", external=True)
    (tmp_path / "vision.onnx.data").unlink()
    refused(path, "cannot load")


def test_bf16_has_no_kernels_on_a_cpu(tmp_path: Path) -> None:
    refused(save(tmp_path / "vision.onnx", torch.bfloat16), "--fp16")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"names": ("pixels", "tokens", "positions")}, r"takes \['pixels'\]"),
        ({"names": ("frames", "tokens", "where_from")}, "where_from"),
        ({"frames": ("batch", 3, 4, 4)}, "frames has shape"),
        ({"frames_type": TensorProto.INT32}, r"frames is tensor\(int32\), expected tensor\(uint8\)"),
        ({"positions_type": TensorProto.INT32}, r"positions is tensor\(int32\)"),
    ],
)
def test_graphs_that_are_no_engine_of_ours(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refused(save(tmp_path / "vision.onnx", **changes), match)


def test_a_failing_run_is_one_line(vision: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run_with_iobinding(self, binding: object) -> None:
            raise Exception("node_3 failed\nlong story")

    monkeypatch.setattr(vision.runner, "session", Broken())
    with pytest.raises(EngineError, match=r"node_3 failed$"):
        vision.encode(clip())


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    refused(save(tmp_path / "vision.onnx"), "pip install onnxruntime")


# Which backend


def manifest(backend: str = "tensorrt-rtx", dtype: str = "fp16", **changes: Any) -> Manifest:
    record = FileRecord(1, "ab" * 32)
    config = EarlyTomConfig(retention_ratio=1.0, merge_layers=(), schedule="budget")
    preprocessing = PreprocessingRecord((4, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    made = Manifest(
        name="m",
        key="ab",
        project_version="0",
        created="2026-01-01",
        model=ModelRecord("micro", "llava_onevision", "ab", False, 4, 2, preprocessing),
        earlytom=config.to_dict(),
        frames=2,
        frames_per_stage=(2,),
        tokens=2,
        tokens_per_frame=1,
        tokens_full=2,
        dim=WIDTH,
        dtype=dtype,
        target="8.0",
        backend=backend,
        backend_version="1.7.1.116",
        files={"vision.onnx": record, "vision.engine": record},
        compression="native",
        plugins=(),
        figures={},
        verification=None,
        polygraphy="",
    )
    return made.replace(**changes)


@pytest.mark.parametrize(
    ("backend", "dtype", "gpu", "chosen"),
    [
        ("tensorrt-rtx", "fp16", True, "tensorrt-rtx"),
        ("tensorrt", "fp16", True, "tensorrt"),
        ("tensorrt-rtx", "fp16", False, "onnxruntime"),
        ("onnx", "fp16", True, "onnxruntime"),
        ("tensorrt", "bf16", True, "tensorrt"),
        ("tensorrt", "bf16", False, "torch"),
    ],
)
def test_auto(monkeypatch: pytest.MonkeyPatch, backend: str, dtype: str, gpu: bool, chosen: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert choose_backend("auto", manifest(backend, dtype)) == chosen


def test_a_backend_by_name_is_not_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("onnxruntime", "torch", "tensorrt-rtx"):
        assert choose_backend(name, manifest("tensorrt-rtx")) == name
    for asked, made, match in (
        ("tensorrt", manifest("tensorrt-rtx"), "built for tensorrt-rtx, not for tensorrt.*--backend tensorrt-rtx"),
        ("tensorrt", manifest("onnx"), "built for onnx, not for tensorrt.*--backend onnxruntime"),
        ("openvino", manifest(), "unknown --backend 'openvino'"),
        ("onnxruntime", manifest(dtype="bf16"), "no bf16 kernels"),
        ("onnxruntime", manifest(files={"vision.engine": FileRecord(1, "ab" * 32)}), "has no vision.onnx"),
    ):
        with pytest.raises(EngineError, match=match):
            choose_backend(asked, made)


def test_every_backend_has_a_name_to_ask_for() -> None:
    assert {"auto", "torch", OnnxRunner.name, *trt.FLAVOURS} == set(choices.BACKENDS)
