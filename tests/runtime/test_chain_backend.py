"""The adaptive schedule's chain at run time: in ONNX Runtime on a real engine folder; on stand-ins of TensorRT the
order of the calls, the shapes and the addresses, not that a GPU agrees."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from earlytom import EarlyTomConfig, encode_video
from earlytom.families import geometry
from runtime import trt as seam
from runtime.checkpoint import describe, load_vision
from runtime.engine import layout
from runtime.errors import EngineError
from runtime.manifest import FileRecord, Manifest, describe_files
from runtime.pipeline import Pipeline
from runtime.video import load_clip
from runtime.vision import choose_backend, open_backend, tensorrt, tensorrt_chain, tensorrt_stages
from runtime.vision.chain import Room
from runtime.vision.onnxruntime_chain import OnnxRuntimeChain
from runtime.vision.tensorrt_chain import TensorRTChain

from ..processes import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 16


@pytest.fixture(scope="module")
def folder(build_engine: Callable[..., Path]) -> Path:
    words = f"--frames {FRAMES} --ratio 0.3 --fp32 --schedule adaptive --merge-layers 2,5".split()
    return build_engine(*words)


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.read(folder)


@pytest.fixture(scope="module")
def vision(folder: Path, manifest: Manifest, one_thread: None) -> Iterator[OnnxRuntimeChain]:
    backend = open_backend("auto", folder, manifest)
    assert isinstance(backend, OnnxRuntimeChain)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def clips(drawn_clip: Path) -> dict[str, Tensor]:
    drawn = load_clip(drawn_clip, FRAMES, (72, 72)).frames
    noise = torch.randint(0, 256, drawn.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {
        "drawn": drawn,
        "noise": noise,
        "still": drawn[:1].repeat(FRAMES, 1, 1, 1),
        "scenes": torch.cat([drawn[:1].repeat(7, 1, 1, 1), drawn[-1:].repeat(FRAMES - 7, 1, 1, 1)]),
    }


def copy_of(folder: Path, place: Path, change: Callable[[Path], None]) -> tuple[Path, Manifest]:
    """A copy with something changed, whose manifest is in good order again."""
    shutil.copytree(folder, place)
    manifest = Manifest.read(place)
    change(place)
    changed = dataclasses.replace(manifest, files=describe_files(place))
    changed.write(place)
    return place, changed


# ONNX Runtime


def test_it_says_what_pytorch_says(vision: OnnxRuntimeChain, manifest: Manifest, clips: dict[str, Tensor]) -> None:
    checkpoint = describe(manifest.model.source)
    part, config = load_vision(checkpoint, torch.float32), EarlyTomConfig.from_dict(manifest.earlytom)
    counts = set()
    depth = geometry(checkpoint.config).depth
    for frames in clips.values():
        pixels = frames.float() / 127.5 - 1
        wanted = encode_video(part.vision_tower, part.projector, pixels, config, depth=depth)
        tokens, positions = vision.encode(frames)
        assert vision.frames_per_stage == wanted.frames_per_stage
        assert torch.equal(positions, wanted.positions)
        torch.testing.assert_close(tokens, wanted.tokens, rtol=0, atol=1e-4)
        assert len(tokens) <= manifest.tokens
        counts.add((*vision.frames_per_stage, len(tokens)))
    assert len(counts) >= 3  # another video, other counts
    assert any(count[2] < FRAMES for count in counts)


def test_no_buffer_moves_and_nothing_is_left_of_the_last_clip(
    vision: OnnxRuntimeChain, clips: dict[str, Tensor]
) -> None:
    addresses: set[tuple[int, int]] = set()
    first: dict[str, Tensor] = {}
    for _ in range(2):
        for name, frames in clips.items():
            tokens, positions = vision.encode(frames)
            addresses.add((tokens.data_ptr(), positions.data_ptr()))
            assert torch.equal(first.setdefault(name, tokens.clone()), tokens)
    assert len(addresses) == 1
    buffers = {name: (buffer.data_ptr(), buffer.shape) for name, buffer in vision._buffers.items()}
    vision.encode(clips["noise"])
    assert {name: (buffer.data_ptr(), buffer.shape) for name, buffer in vision._buffers.items()} == buffers


def test_calls_that_cannot_be(folder: Path, manifest: Manifest, clips: dict[str, Tensor]) -> None:
    backend = OnnxRuntimeChain(folder, Room.of(manifest), threads=1)
    tokens, _ = backend.encode(clips["drawn"])
    with pytest.raises(EngineError, match=r"takes frames of shape \[16, 3, 72, 72\]"):
        backend.encode(clips["drawn"][:4])
    with backend._lock, pytest.raises(RuntimeError, match="busy"):
        backend.encode(clips["drawn"])
    backend.close()
    backend.close()
    with pytest.raises(RuntimeError, match="closed"):
        backend.encode(clips["drawn"])
    assert tokens.isfinite().all()
    with pytest.raises(EngineError, match="threads must be at least 1"):
        OnnxRuntimeChain(folder, Room.of(manifest), threads=0)


def test_two_chains_run_side_by_side(folder: Path, manifest: Manifest, clips: dict[str, Tensor]) -> None:
    """Each has its own buffers; one clip's counts are not the other's."""
    chains = [OnnxRuntimeChain(folder, Room.of(manifest), threads=1) for _ in range(2)]
    wanted = [len(chains[0].encode(clips[name])[0]) for name in ("still", "noise")]
    found: list[int] = [0, 0]

    def run(which: int, name: str) -> None:
        found[which] = len(chains[which].encode(clips[name])[0])

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(("still", "noise"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert found == wanted


def truncate(place: Path) -> None:
    path = place / "vision.1.onnx"
    path.write_bytes(path.read_bytes()[:2000])


def swap(place: Path) -> None:
    first, last = (place / layout.stage_file(layout.ONNX_FILE, stage) for stage in (1, 2))
    first.rename(place / "kept")
    last.rename(first)
    (place / "kept").rename(last)


def other_width(place: Path) -> None:
    model = onnx.load(place / "vision.2.onnx")
    for value in model.graph.input:
        if value.name == layout.HIDDEN:
            value.type.tensor_type.shape.dim[2].dim_value = 64
    del model.graph.value_info[:]
    onnx.save(model, place / "vision.2.onnx")


def no_frames(place: Path) -> None:
    """The first stage says that it kept nothing."""
    model = onnx.load(place / "vision.0.onnx")
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == layout.COUNT:
                node.output[index] = "counted"
    zero = onnx.helper.make_node("Sub", ["counted", "counted"], [layout.COUNT])
    model.graph.node.append(zero)
    onnx.save(model, place / "vision.0.onnx")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (truncate, r"onnxruntime cannot load .*vision\.1\.onnx"),
        (swap, r"vision\.1\.onnx has the tensors .* stage 1 of 3 has"),
        (other_width, r"vision\.2\.onnx"),
        (no_frames, r"stage 0 of the onnxruntime engine kept 0 of 16 frames"),
    ],
)
def test_a_bad_stage_is_one_line(
    folder: Path, clips: dict[str, Tensor], tmp_path: Path, change: Callable[[Path], None], line: str
) -> None:
    place, manifest = copy_of(folder, tmp_path / "engine", change)
    with pytest.raises(EngineError, match=line) as caught:
        open_backend("onnxruntime", place, manifest).encode(clips["drawn"])
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_stage_changed_or_missing_is_no_engine(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "engine"
    shutil.copytree(folder, place)
    path = place / "vision.1.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(EngineError, match=r"vision\.1\.onnx changed since it was built"):
        Manifest.read(place)
    path.unlink()
    with pytest.raises(EngineError, match=r"vision\.1\.onnx is missing"):
        Manifest.read(place)


def test_the_pipeline_takes_any_number_of_tokens(
    folder: Path, manifest: Manifest, clips: dict[str, Tensor], vision: OnnxRuntimeChain
) -> None:
    wanted = {name: len(vision.encode(frames)[0]) for name, frames in clips.items()}
    with Pipeline.load(folder, device="cpu") as pipeline:
        found = {name: pipeline.ask(frames, "What?", max_new_tokens=2) for name, frames in clips.items()}
    assert {name: answer.visual_tokens for name, answer in found.items()} == wanted
    assert len(set(wanted.values())) > 1
    assert all(answer.tokens for answer in found.values())


# The manifest


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tokens": 7}, "tokens is 7, its settings give"),
        ({"frames_per_stage": (16, 12, 8)}, r"frames_per_stage is \(16, 12, 8\)"),
        ({"frames_kept": None}, "frames_kept is None"),
        ({"frames_kept": ((16, 16, 16), (9, 10, 11))}, "3 stages"),
        ({"frames_kept": ((16, 16, 16), (9, 10, 17), (5, 5, 5))}, "at most 16 frames"),
        ({"frames_kept": ((16, 16, 16), (9, 8, 11), (5, 5, 5))}, "least, median and most"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(manifest: Manifest, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(EngineError, match=line):
        dataclasses.replace(manifest, **changes)


def test_a_manifest_of_a_chain_names_every_stage(manifest: Manifest, folder: Path) -> None:
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    files = {name: record for name, record in manifest.files.items() if name != "vision.2.onnx"}
    with pytest.raises(EngineError, match=r"lists no vision\.2\.onnx"):
        dataclasses.replace(manifest, files=files)
    record = FileRecord(1, "0" * 64)
    engines = {layout.stage_file(layout.ENGINE_FILE, stage): record for stage in range(3)}
    compiled = dataclasses.replace(manifest, backend="tensorrt-rtx", files=engines)
    assert choose_backend("auto", compiled) == "tensorrt-rtx"
    with pytest.raises(EngineError, match=r"no vision\.onnx for onnxruntime"):
        choose_backend("onnxruntime", compiled)
    settings = EarlyTomConfig.from_dict(manifest.earlytom).replace(schedule="budget").to_dict()
    with pytest.raises(EngineError, match="contradicts itself"):  # of a single engine
        dataclasses.replace(manifest, earlytom=settings)


# TensorRT, on stand-ins


class Engine:
    """A stage as TensorRT deserialises it; its context keeps what it is told and writes a count when it runs."""

    def __init__(self, stage: int, log: list[str], kept: int) -> None:
        self.stage, self.log, self.kept = stage, log, kept
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        inputs, outputs = layout.stage_tensors(stage, 2)
        self.names = [*inputs, *outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        n = -1 if self.stage else 4
        sizes = {"frames": (4, 3, 8, 8), "hidden": (n, 5, 6), "received": (n, 5), "tokens": (-1, 7), "count": (1,)}
        return (sizes | {"positions": (-1,)})[name.removeprefix("merged_")]

    def get_tensor_dtype(self, name: str) -> str:
        kinds = {"frames": "UINT8", "count": "INT64", "positions": "INT64", "received": "FLOAT"}
        return f"DataType.{kinds.get(name.removeprefix('merged_'), 'HALF')}"

    def create_execution_context(self) -> Engine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: str) -> bool:
        told = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())
        self.log.append(f"stage {self.stage} on {stream}: {told}")
        ctypes.c_int64.from_address(self.addresses["count"]).value = self.kept
        return self.kept >= 0


class Opened:
    """A `TensorRTChain` of two stages on stand-ins: its engines, and what was asked since it was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.log: list[str] = []
        self.engines = [Engine(0, self.log, 3), Engine(1, self.log, 2)]
        waiting = iter(self.engines)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: next(waiting))
        library = SimpleNamespace(__version__="1.7.1", ILogger=object, Runtime=lambda logger: runtime)
        log = self.log

        class Stream:
            cuda_stream = "engine"

            def wait_stream(self, other: str) -> None:
                log.append(f"engine waits for {other}")

            def synchronize(self) -> None:
                log.append("host waits for engine")

        cuda = SimpleNamespace(
            is_available=lambda: True,
            device=lambda device: contextlib.nullcontext(),
            stream=lambda stream: contextlib.nullcontext(),
            Stream=lambda device: Stream(),
            current_stream=lambda device: "caller",
        )
        stand_in = SimpleNamespace(
            cuda=cuda, int64=torch.int64, zeros=lambda *shape, pin_memory=False, **kind: torch.zeros(*shape, **kind)
        )
        for module in (tensorrt, tensorrt_chain, tensorrt_stages):
            monkeypatch.setattr(module, "torch", stand_in)
        self.recorded: list[tuple[int, object]] = []
        monkeypatch.setattr(
            torch.Tensor,
            "record_stream",
            lambda tensor, stream: self.recorded.append((tensor.data_ptr(), stream)),
        )
        monkeypatch.setattr(seam, "load", lambda flavour: library)
        monkeypatch.setattr(seam, "errors_of", lambda logger: ["out of memory"])
        for stage in range(2):
            (folder / layout.stage_file(layout.ENGINE_FILE, stage)).write_bytes(b"plan")
        self.vision = TensorRTChain(folder, Room(4, 3, 0.5, 1), "tensorrt-rtx", device="cpu")
        self.log.clear()
        self.recorded.clear()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opened:
    return Opened(monkeypatch, tmp_path)


CLIP = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)


def test_tensorrt_runs_stage_by_stage_and_reads_each_count(opened: Opened) -> None:
    tokens, positions = opened.vision.encode(CLIP)
    assert opened.log == [
        "engine waits for caller",
        "stage 0 on engine: frames [4, 3, 8, 8]",
        "host waits for engine",
        "stage 1 on engine: hidden [3, 5, 6], received [3, 5]",
        "host waits for engine",
    ]
    assert opened.vision.frames_per_stage == (4, 3)
    assert opened.recorded == [
        (output.data_ptr(), "caller") for output in (tokens, positions)
    ]  # who may still read them
    assert tokens.shape == (2, 7)
    assert tokens.dtype == torch.float16
    assert positions.shape == (2,)


def test_tensorrt_is_told_the_same_memory_every_time(opened: Opened) -> None:
    first, second = opened.engines
    opened.vision.encode(CLIP)
    told = [dict(engine.addresses) for engine in opened.engines]
    assert second.addresses["hidden"] == first.addresses["merged_hidden"]
    assert second.addresses["received"] == first.addresses["merged_received"]
    first.kept, second.kept = 1, 3
    tokens, _ = opened.vision.encode(CLIP + 1)
    assert [engine.addresses for engine in opened.engines] == told
    assert second.shapes["hidden"] == (1, 5, 6)
    assert tokens.shape == (3, 7)
    assert tokens.data_ptr() == second.addresses["tokens"]


@pytest.mark.parametrize(
    ("stage", "kept", "line"),
    [
        (0, 0, "stage 0 of the tensorrt-rtx engine kept 0 of 4 frames"),
        (0, 5, "kept 5 of 4 frames"),
        (1, 9, "kept 9 of 6 tokens"),
        (1, -1, "refused to run stage 1: out of memory"),
    ],
)
def test_tensorrt_stages_that_fail(opened: Opened, stage: int, kept: int, line: str) -> None:
    good = opened.engines[stage].kept
    opened.engines[stage].kept = kept
    with pytest.raises(EngineError, match=line):
        opened.vision.encode(CLIP)
    opened.engines[stage].kept = good
    opened.vision.encode(CLIP)  # and it is not stuck


def test_tensorrt_without_what_it_needs(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened.vision.close()
    opened.vision.close()
    with pytest.raises(RuntimeError, match="closed"):
        opened.vision.encode(CLIP)
    (tmp_path / "vision.1.engine").unlink()
    with pytest.raises(EngineError, match=r"vision\.1\.engine is missing"):
        TensorRTChain(tmp_path, Room(4, 3, 0.5, 1))
    monkeypatch.setattr(tensorrt.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(seam, "has_gpu", lambda: False)
    (tmp_path / "vision.1.engine").write_bytes(b"plan")
    with pytest.raises(EngineError, match="NVIDIA GPU and none was found"):
        TensorRTChain(tmp_path, Room(4, 3, 0.5, 1))
