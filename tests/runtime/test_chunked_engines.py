"""Engines whose clips come in chunks: in ONNX Runtime on real engine folders; on stand-ins of TensorRT the order of the
calls and the addresses, not that a GPU agrees."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from earlytom.config import EarlyTomConfig
from runtime import trt as seam
from runtime.checkpoint import describe
from runtime.engine import layout
from runtime.errors import EngineError
from runtime.live import LiveClip
from runtime.manifest import FileRecord, Manifest, describe_files
from runtime.pipeline import Pipeline
from runtime.video import clip_from_frames, load_clip
from runtime.vision import choose_backend, open_backend, tensorrt, tensorrt_chunked, tensorrt_stages
from runtime.vision.onnxruntime_chunked import OnnxRuntimeChunked
from runtime.vision.tensorrt_chunked import TensorRTChunked
from runtime.vision.torch import TorchChunked, open_torch

from .gpu_flavour import FLAVOUR, WHY_NOT

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES, CHUNK = 8, 2


@pytest.fixture(scope="module")
def folder(build_engine: Callable[..., Path]) -> Path:
    words = f"--frames {FRAMES} --ratio 0.3 --fp32 --merge-layers 2,5 --chunk {CHUNK}".split()
    return build_engine(*words)


@pytest.fixture(scope="module")
def received_folder(build_engine: Callable[..., Path]) -> Path:
    """The first merge is the last, so that received attention goes from one graph to the other; in half precision."""
    return build_engine(*f"--frames {FRAMES} --ratio 0.3 --fp16 --merge-layers 4 --chunk 4".split())


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.read(folder)


@pytest.fixture(scope="module")
def vision(folder: Path, manifest: Manifest, one_thread: None) -> Iterator[OnnxRuntimeChunked]:
    backend = open_backend("auto", folder, manifest)
    assert isinstance(backend, OnnxRuntimeChunked)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def frames(drawn_clip: Path) -> Tensor:
    """uint8 [40, 3, 120, 160]: more than a clip needs."""
    return load_clip(drawn_clip, 40, (120, 160)).frames


def sampled(frames: Tensor) -> Tensor:
    return clip_from_frames(frames, FRAMES, (72, 72)).frames


# ONNX Runtime


def test_it_says_what_pytorch_says(vision: OnnxRuntimeChunked, manifest: Manifest, frames: Tensor) -> None:
    assert (vision.shape, vision.chunk, vision.name) == ((FRAMES, 3, 72, 72), CHUNK, "onnxruntime")
    checkpoint, cpu = describe(manifest.model.source), torch.device("cpu")
    reference = open_torch(checkpoint, manifest, device=cpu, dtype=torch.float32)
    assert isinstance(reference, TorchChunked)
    assert reference.chunk == CHUNK
    for clip in (sampled(frames), sampled(frames[:11]).flip(3)):
        wanted, where = reference.encode(clip)
        tokens, positions = vision.encode(clip)
        assert torch.equal(positions, where)
        torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-4)
        assert len(tokens) == manifest.tokens


@pytest.mark.parametrize("which", ["folder", "received_folder"])
@pytest.mark.parametrize("count", [5, 8, 13, 30])
def test_frames_as_they_come_give_what_the_whole_clip_gives(
    request: pytest.FixtureRequest, which: str, count: int, frames: Tensor
) -> None:
    place = request.getfixturevalue(which)
    vision = open_backend("onnxruntime", place, Manifest.read(place))
    assert isinstance(vision, OnnxRuntimeChunked)
    assert vision.rows_alike
    wanted, where = (value.clone() for value in vision.encode(sampled(frames[:count])))
    for total in (count, None):
        with LiveClip(vision, total=total) as clip:
            for some in frames[:count].split(3):
                clip.push(some)
            tokens, positions, _ = clip.finish()
        assert torch.equal(tokens, wanted)
        assert torch.equal(positions, where)
    assert not torch.equal(vision.encode(sampled(frames[:count]).flip(0))[0], wanted)
    vision.close()


def test_no_buffer_moves(vision: OnnxRuntimeChunked, frames: Tensor) -> None:
    clips = [sampled(frames), sampled(frames).flip(0)]
    places, first = set(), []
    for _ in range(2):
        for clip in clips:
            tokens, positions = vision.encode(clip)
            places.add((tokens.data_ptr(), positions.data_ptr(), vision._out[layout.HIDDEN].data_ptr()))
            first.append(tokens.clone())
    assert len(places) == 1
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[3])
    assert not torch.equal(first[0], first[1])


def test_a_clip_under_way_survives_whole_ones(vision: OnnxRuntimeChunked, frames: Tensor) -> None:
    clip = sampled(frames)
    wanted, _ = (value.clone() for value in vision.encode(clip))
    with vision.begin() as opened:
        for some in clip.split(CHUNK):
            opened.push(some)
            vision.encode(clip.flip(0))
        assert torch.equal(opened.finish()[0], wanted)


def test_calls_that_cannot_be(folder: Path) -> None:
    backend = OnnxRuntimeChunked(folder, FRAMES, threads=1)
    backend.close()
    backend.close()
    with pytest.raises(RuntimeError, match="closed"):
        backend.begin()
    with pytest.raises(EngineError, match="threads must be at least 1"):
        OnnxRuntimeChunked(folder, FRAMES, threads=0)
    with pytest.raises(EngineError, match="for clips of 16 frames in chunks of 2: they are of two builds"):
        OnnxRuntimeChunked(folder, 16)


def truncate(place: Path) -> None:
    path = place / "vision.1.onnx"
    path.write_bytes(path.read_bytes()[:2000])


def swap(place: Path) -> None:
    first, last = (place / layout.stage_file(layout.ONNX_FILE, stage) for stage in range(2))
    first.rename(place / "kept")
    last.rename(first)
    (place / "kept").rename(last)


def resize_input(name: str, axis: int, size: int) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        model = onnx.load(place / "vision.1.onnx")
        for value in model.graph.input:
            if value.name == name:
                value.type.tensor_type.shape.dim[axis].dim_value = size
        del model.graph.value_info[:]
        onnx.save(model, place / "vision.1.onnx")

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (truncate, r"onnxruntime cannot load .*vision\.1\.onnx"),
        (swap, r"vision\.0\.onnx has the tensors .* stage 0 of an engine in chunks has"),
        (resize_input(layout.HIDDEN, 2, 64), r"vision\.1\.onnx"),
        (resize_input(layout.HIDDEN, 0, 7), r"vision\.1\.onnx"),
    ],
)
def test_a_bad_stage_is_one_line(folder: Path, tmp_path: Path, change: Callable[[Path], None], line: str) -> None:
    place = tmp_path / "engine"
    shutil.copytree(folder, place)
    manifest = Manifest.read(place)
    change(place)
    changed = dataclasses.replace(manifest, files=describe_files(place))
    with pytest.raises(EngineError, match=line) as caught:
        open_backend("onnxruntime", place, changed)
    assert "\n" not in str(caught.value)


def test_the_pipeline_asks_such_an_engine(folder: Path, frames: Tensor) -> None:
    with Pipeline.load(folder, device="cpu") as pipeline:
        answer = pipeline.ask(frames, "What?", max_new_tokens=2)
        assert isinstance(pipeline.vision, OnnxRuntimeChunked)
    with Pipeline.load(folder, device="cpu", backend="torch") as pipeline:
        assert pipeline.ask(frames, "What?", max_new_tokens=2).tokens == answer.tokens


# The manifest


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"chunk": 3}, "chunk is 3, which is for one video of one frame count .* divides its 8 frames"),
        ({"chunk": 0}, "chunk must be null or a positive whole number, got 0"),
        ({"chunk": True}, "chunk must be null"),
        ({"chunk": 2, "batch": 2}, "chunk is 2, which is for one video"),
        ({"chunk": None}, r"lists no vision\.onnx"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(manifest: Manifest, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(EngineError, match=line):
        dataclasses.replace(manifest, **changes)


def test_a_manifest_in_chunks_names_both_stages(manifest: Manifest, engine: Path) -> None:
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    assert manifest.to_dict()["chunk"] == CHUNK
    assert "chunk" not in Manifest.read(engine).to_dict()
    files = {name: record for name, record in manifest.files.items() if name != "vision.1.onnx"}
    with pytest.raises(EngineError, match=r"lists no vision\.1\.onnx"):
        dataclasses.replace(manifest, files=files)
    engines = {layout.stage_file(layout.ENGINE_FILE, stage): FileRecord(1, "0" * 64) for stage in range(2)}
    compiled = dataclasses.replace(manifest, backend="tensorrt-rtx", files=engines)
    assert choose_backend("auto", compiled) == "tensorrt-rtx"
    settings = EarlyTomConfig.from_dict(manifest.earlytom).replace(schedule="adaptive").to_dict()
    with pytest.raises(EngineError, match="contradicts itself"):
        dataclasses.replace(manifest, earlytom=settings)


# TensorRT, on stand-ins


class Engine:
    """A stage as TensorRT deserialises it; its context keeps what it is told, and notes when it runs."""

    def __init__(self, stage: int, log: list[str]) -> None:
        self.stage, self.log = stage, log
        self.addresses: dict[str, int] = {}
        self.refuses = False
        inputs, outputs = layout.chunk_tensors(stage, received=True)
        self.names = [*inputs, *outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows = 4 if self.stage else 2
        sizes = {"frames": (2, 3, 8, 8), "hidden": (rows, 5, 6), "received": (rows, 5)}
        return (sizes | {"tokens": (7, 9), "positions": (7,)})[name]

    def get_tensor_dtype(self, name: str) -> str:
        kinds = {"frames": "UINT8", "positions": "INT64", "received": "FLOAT"}
        return f"DataType.{kinds.get(name, 'HALF')}"

    def create_execution_context(self) -> Engine:
        return self

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: str) -> bool:
        self.log.append(f"stage {self.stage} on {stream}")
        return not self.refuses


class Opened:
    """A `TensorRTChunked` on stand-ins: its engines, and what was asked since it was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.log: list[str] = []
        self.engines = [Engine(stage, self.log) for stage in range(2)]
        waiting = iter(self.engines)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: next(waiting))
        library = SimpleNamespace(__version__="1.7.1", ILogger=object, Runtime=lambda logger: runtime)
        log = self.log

        class Stream:
            cuda_stream = "engine"

            def wait_stream(self, other: Any) -> None:
                log.append(f"engine waits for {other.name}")

            def synchronize(self) -> None:
                log.append("host waits for engine")

        class Event:
            names = iter(("copy", "end"))

            def __init__(self) -> None:
                self.name = next(self.names)

            def record(self, stream: Stream) -> None:
                log.append(f"engine notes {self.name}")

            def synchronize(self) -> None:
                log.append(f"host waits for {self.name}")

        caller = SimpleNamespace(name="caller", wait_event=lambda event: log.append(f"caller waits for {event.name}"))
        cuda = SimpleNamespace(
            is_available=lambda: True,
            device=lambda device: contextlib.nullcontext(),
            stream=lambda stream: contextlib.nullcontext(),
            Stream=lambda device: Stream(),
            Event=Event,
            current_stream=lambda device: caller,
        )
        stand_in = SimpleNamespace(
            cuda=cuda, zeros=lambda *shape, pin_memory=False, **kind: torch.zeros(*shape, **kind)
        )
        for module in (tensorrt, tensorrt_chunked, tensorrt_stages):
            monkeypatch.setattr(module, "torch", stand_in)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        monkeypatch.setattr(seam, "load", lambda flavour: library)
        monkeypatch.setattr(seam, "errors_of", lambda logger: ["out of memory"])
        for stage in range(2):
            (folder / layout.stage_file(layout.ENGINE_FILE, stage)).write_bytes(b"plan")
        self.vision = TensorRTChunked(folder, 4, "tensorrt-rtx", device="cpu")
        self.log.clear()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opened:
    return Opened(monkeypatch, tmp_path)


CLIP = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
PUSHED = [
    "engine waits for caller",
    "host waits for copy",
    "engine notes copy",
    "stage 0 on engine",
    "engine notes end",
    "caller waits for end",
]


def test_tensorrt_orders_every_call_between_the_callers_work(opened: Opened) -> None:
    with opened.vision.begin() as clip:
        assert opened.log == ["engine waits for caller"]  # on whose stream the clip's memory is being cleared
        opened.log.clear()
        clip.push(CLIP[:2])
        assert opened.log == PUSHED
        clip.push(CLIP[2:])
        tokens, positions = clip.finish()
    assert opened.log == [
        *PUSHED,
        *PUSHED,
        "engine waits for caller",
        "stage 1 on engine",
        "engine notes end",
        "caller waits for end",
    ]
    assert (tokens.shape, tokens.dtype) == ((7, 9), torch.float16)
    assert (positions.shape, positions.dtype) == ((7,), torch.int64)


def test_tensorrt_is_told_the_same_memory_every_time(opened: Opened) -> None:
    first, second = opened.engines
    tokens, positions = opened.vision.encode(CLIP)
    told = [dict(engine.addresses) for engine in opened.engines]
    assert second.addresses["tokens"] == tokens.data_ptr()
    assert second.addresses["positions"] == positions.data_ptr()
    assert first.addresses["frames"] == opened.vision._entering.data_ptr()
    own = opened.vision._own
    assert own is not None
    assert own._room is not None
    assert second.addresses["hidden"] == own._room.hidden.data_ptr()
    opened.vision.encode(CLIP)
    assert [engine.addresses for engine in opened.engines] == told
    with opened.vision.begin() as clip:  # another clip, other memory
        for some in CLIP.split(2):
            clip.push(some)
        clip.finish()
        assert first.addresses == told[0]
        assert not set(second.addresses.values()) & set(told[1].values())


def test_tensorrt_gets_the_frames_padded_with_the_last(opened: Opened) -> None:
    with opened.vision.begin() as clip:
        clip.push(CLIP[3:])
        assert torch.equal(opened.vision._entering, CLIP[[3, 3]])
        assert clip.encoded == 1
        clip.push(CLIP[1:3])
        assert torch.equal(opened.vision._entering, CLIP[1:3])


def test_what_the_head_writes_goes_to_the_rows_of_its_frames(opened: Opened) -> None:
    with opened.vision.begin() as clip:
        assert clip._room is not None
        assert clip._room.received is not None
        for value, some in enumerate(CLIP.split(2), start=1):
            for buffer in opened.vision._out.values():
                buffer.fill_(value)
            clip.push(some)
        assert clip._room.hidden[:, 0, 0].tolist() == [1, 1, 2, 2]
        assert clip._room.received[:, 0].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("stage", [0, 1])
def test_tensorrt_stages_that_fail(opened: Opened, stage: int) -> None:
    opened.engines[stage].refuses = True
    with pytest.raises(EngineError, match=f"refused to run stage {stage}: out of memory"):
        opened.vision.encode(CLIP)
    opened.engines[stage].refuses = False
    opened.vision.encode(CLIP)  # and it is not stuck
    with pytest.raises(EngineError, match="frames are on meta and the engine is on cpu"):
        opened.vision.encode(CLIP.to("meta"))


def test_tensorrt_without_what_it_needs(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened.vision.close()
    assert opened.log == ["host waits for engine"]
    opened.vision.close()
    with pytest.raises(RuntimeError, match="closed"):
        opened.vision.encode(CLIP)
    (tmp_path / "vision.1.engine").unlink()
    with pytest.raises(EngineError, match=r"vision\.1\.engine is missing"):
        TensorRTChunked(tmp_path, 4)
    monkeypatch.setattr(tensorrt.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(seam, "has_gpu", lambda: False)
    (tmp_path / "vision.1.engine").write_bytes(b"plan")
    with pytest.raises(EngineError, match="NVIDIA GPU and none was found"):
        TensorRTChunked(tmp_path, 4)


@pytest.mark.gpu
@pytest.mark.skipif(FLAVOUR is None, reason=WHY_NOT)
@pytest.mark.parametrize("merges", ["2,5", "4"])
def test_tensorrt_on_a_gpu(tmp_path: Path, frames: Tensor, merges: str) -> None:
    """Tokens are PyTorch's within half precision; streamed, and with frames on the GPU, they are exactly the same."""
    from builder import build

    target = ".".join(map(str, torch.cuda.get_device_capability()))
    words = f"--frames {FRAMES} --ratio 0.3 --fp16 --merge-layers {merges} --chunk 4 --backend {FLAVOUR}".split()
    build.main([*words, "--target", target, "--no-verify", "--out", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    manifest = Manifest.read(folder)
    vision = open_backend(str(FLAVOUR), folder, manifest)
    assert isinstance(vision, TensorRTChunked)
    clip = sampled(frames)
    wanted, where = (value.clone() for value in vision.encode(clip))
    reference = open_torch(describe(None), manifest, device=torch.device("cpu"), dtype=torch.float32)
    tokens, positions = reference.encode(clip)
    kept = torch.isin(where.cpu(), positions)
    assert kept.float().mean() > 0.85
    ours, theirs = wanted.cpu().float()[kept], tokens[torch.isin(positions, where.cpu())]
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99
    assert torch.equal(vision.encode(clip.cuda())[0], wanted)
    with torch.cuda.stream(torch.cuda.Stream()):
        for total in (len(frames), None):
            with LiveClip(vision, total=total, limit=len(frames)) as live:
                for some in frames.split(7):
                    live.push(some)
                tokens, positions, _ = live.finish()
            assert torch.equal(tokens, wanted)
            assert torch.equal(positions, where)
    vision.close()
