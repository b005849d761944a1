"""What every vision backend keeps to, on real engine folders of every mode in ONNX Runtime, and against PyTorch."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from earlytom import EarlyTomConfig, encode_video
from earlytom.families import geometry
from runtime.checkpoint import describe, load_vision
from runtime.engine import layout
from runtime.engine.manifest import FileRecord, Manifest, describe_files
from runtime.errors import EngineError
from runtime.pipeline import Pipeline
from runtime.video import clip_from_frames, load_clip
from runtime.vision import choose_backend, open_backend
from runtime.vision.adaptive import Adaptive
from runtime.vision.chunked import Chunked
from runtime.vision.live import LiveClip
from runtime.vision.open import open_onnxruntime
from runtime.vision.torch import TorchChunked, TorchVision, open_torch
from runtime.vision.whole import Whole
from tests.processes import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = {
    "whole": "--frames 8 --ratio 0.3 --fp32 --merge-layers 1,2",
    "adaptive": "--frames 16 --ratio 0.3 --fp32 --schedule adaptive --merge-layers 1,2",
    "chunked": "--frames 8 --ratio 0.3 --fp32 --merge-layers 1,2 --chunk 2",
    # The first merge is the last, so that received attention goes from one graph to the other; in half precision.
    "one merge": "--frames 8 --ratio 0.3 --fp16 --merge-layers 2 --chunk 4",
}
MODES = ("whole", "adaptive", "chunked")
KINDS = {"whole": Whole, "adaptive": Adaptive, "chunked": Chunked, "one merge": Chunked}
FolderOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(build_engine: Callable[..., Path], small_checkpoint: Path) -> FolderOf:
    """`folder_of("chunked")`: the engine folder of a mode; built once."""
    return lambda mode: build_engine("--model", str(small_checkpoint), *WORDS[mode].split())


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(folder_of: FolderOf, mode: str) -> Path:
    return folder_of(mode)


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.read(folder)


@pytest.fixture(scope="module")
def vision(folder: Path, manifest: Manifest, one_thread: None) -> Iterator[Any]:
    backend = open_backend("auto", folder, manifest)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def drawn(drawn_clip: Path) -> Tensor:
    """uint8 [40, 3, 120, 160]: more than a clip needs."""
    return load_clip(drawn_clip, 40, (120, 160)).frames


def sampled(drawn: Tensor, frames: int = 8) -> Tensor:
    return clip_from_frames(drawn, frames, (72, 72)).frames


@pytest.fixture(scope="module")
def clips(drawn: Tensor, manifest: Manifest) -> dict[str, Tensor]:
    """Clips of which the adaptive schedule keeps different numbers of frames."""
    count = manifest.frames
    first = sampled(drawn, count)
    noise = torch.randint(0, 256, first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {
        "drawn": first,
        "mirrored": sampled(drawn[:11], count).flip(3),
        "noise": noise,
        "still": first[:1].repeat(count, 1, 1, 1),
        "scenes": torch.cat([first[:1].repeat(count // 2, 1, 1, 1), first[-1:].repeat(count - count // 2, 1, 1, 1)]),
    }


def turn_of(vision: Any) -> Any:
    """What a call of `encode` has while it runs."""
    return vision._whole if isinstance(vision, Chunked) else vision._turn


def buffers_of(vision: Any) -> dict[str, tuple[int, torch.Size]]:
    buffers = vision._buffers if isinstance(vision, Adaptive) else vision._out
    return {name: (buffer.data_ptr(), buffer.shape) for name, buffer in buffers.items()}


# What it says


def test_it_is_what_its_manifest_says(vision: Any, manifest: Manifest, mode: str) -> None:
    assert isinstance(vision, KINDS[mode])
    assert (vision.name, vision.batch, vision.device.type) == ("onnxruntime", 1, "cpu")
    assert vision.shape == (manifest.frames, 3, 72, 72)
    assert getattr(vision, "chunk", None) == manifest.chunk


def test_it_says_what_pytorch_says(vision: Any, manifest: Manifest, clips: dict[str, Tensor]) -> None:
    checkpoint, cpu = describe(manifest.model.source), torch.device("cpu")
    reference = open_torch(checkpoint, manifest, device=cpu, dtype=torch.float32)
    assert isinstance(reference, TorchVision if manifest.chunk is None else TorchChunked)
    part, config = load_vision(checkpoint, torch.float32), EarlyTomConfig.from_dict(manifest.earlytom)
    counts = set()
    for frames in clips.values():
        pixels = frames.float() / 127.5 - 1
        wanted = encode_video(
            part.vision_tower, part.projector, pixels, config, depth=geometry(checkpoint.config).depth
        )
        for tokens, positions, *_ in (vision.encode(frames), reference.encode(frames)):
            assert torch.equal(positions, wanted.positions)
            assert positions.dtype == torch.int64
            assert (positions.diff() > 0).all()
            torch.testing.assert_close(tokens, wanted.tokens, rtol=0, atol=1e-4)
            assert tokens.shape[1] == manifest.dim
        assert len(tokens) <= manifest.tokens
        stages = vision.frames_per_stage if manifest.adaptive else manifest.frames_per_stage
        assert stages == wanted.frames_per_stage
        counts.add((*stages, len(tokens)))
    if manifest.adaptive:
        assert len(counts) >= 3  # another video, other counts
        assert any(count[2] < manifest.frames for count in counts)
    else:
        assert counts == {(*manifest.frames_per_stage, manifest.tokens)}


def test_no_buffer_moves_and_nothing_is_left_of_the_last_clip(vision: Any, clips: dict[str, Tensor]) -> None:
    addresses: set[tuple[int, int]] = set()
    first: dict[str, Tensor] = {}
    before = buffers_of(vision)
    for _ in range(2):
        for name, frames in clips.items():
            tokens, positions, *_ = vision.encode(frames)
            addresses.add((tokens.data_ptr(), positions.data_ptr()))
            assert torch.equal(first.setdefault(name, tokens.clone()), tokens)
    assert len(addresses) == 1
    assert buffers_of(vision) == before
    assert not torch.equal(first["drawn"], first["mirrored"])  # negative control


def test_two_run_side_by_side(folder: Path, manifest: Manifest, clips: dict[str, Tensor]) -> None:
    """Each has its own buffers; one clip's counts are not the other's."""
    both: list[Any] = [open_onnxruntime(folder, manifest.layout, threads=1) for _ in range(2)]
    wanted = [both[0].encode(clips[name])[0].clone() for name in ("still", "noise")]
    found: list[Tensor] = [torch.empty(0)] * 2

    def run(which: int, name: str) -> None:
        found[which] = both[which].encode(clips[name])[0]

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(("still", "noise"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert all(torch.equal(one, want) for one, want in zip(found, wanted, strict=True))


def test_the_pipeline_asks_it(folder: Path, manifest: Manifest, vision: Any, clips: dict[str, Tensor]) -> None:
    wanted = {name: len(vision.encode(frames)[0]) for name, frames in clips.items()}
    with Pipeline.load(folder, device="cpu") as pipeline:
        found = {name: pipeline.ask(frames, "What?", max_new_tokens=2) for name, frames in clips.items()}
        assert type(pipeline.vision) is type(vision)
    assert {name: answer.visual_tokens for name, answer in found.items()} == wanted
    assert (len(set(wanted.values())) > 1) == manifest.adaptive
    assert all(answer.tokens for answer in found.values())
    with Pipeline.load(folder, device="cpu", backend="torch") as pipeline:
        assert pipeline.ask(clips["drawn"], "What?", max_new_tokens=2).tokens == found["drawn"].tokens


# Clips in chunks


@pytest.mark.parametrize("which", ["chunked", "one merge"])
@pytest.mark.parametrize("count", [5, 8, 13, 30])
def test_frames_as_they_come_give_what_the_whole_clip_gives(
    folder_of: FolderOf, which: str, count: int, drawn: Tensor
) -> None:
    place = folder_of(which)
    vision = open_backend("onnxruntime", place, Manifest.read(place))
    assert isinstance(vision, Chunked)
    assert vision.rows_alike
    wanted, where, *_ = (value.clone() for value in vision.encode(sampled(drawn[:count])))
    for total in (count, None):
        with LiveClip(vision, total=total) as clip:
            for some in drawn[:count].split(3):
                clip.push(some)
            (tokens, positions, *_), _ = clip.finish()
        assert torch.equal(tokens, wanted)
        assert torch.equal(positions, where)
    assert not torch.equal(vision.encode(sampled(drawn[:count]).flip(0))[0], wanted)
    vision.close()


def test_a_clip_under_way_survives_whole_ones(folder_of: FolderOf, drawn: Tensor) -> None:
    place, clip = folder_of("chunked"), sampled(drawn)
    vision: Any = open_backend("onnxruntime", place, Manifest.read(place))
    wanted, *_ = (value.clone() for value in vision.encode(clip))
    with vision.begin() as opened:
        for some in clip.split(vision.chunk):
            opened.push(some)
            vision.encode(clip.flip(0))
        assert torch.equal(opened.finish()[0], wanted)


# What it refuses


def test_frames_that_do_not_fit(vision: Any, clips: dict[str, Tensor], manifest: Manifest) -> None:
    frames = clips["drawn"]
    vision.encode(frames)  # negative control
    reference = open_torch(describe(manifest.model.source), manifest, device=torch.device("cpu"), dtype=torch.float32)
    for backend in (vision, reference):
        for wrong in (frames[:-1], frames[..., :-1], frames.permute(0, 2, 3, 1), frames[0]):
            with pytest.raises(EngineError, match=rf"shape \[{manifest.frames}, 3, 72, 72\].*got \[") as caught:
                backend.encode(wrong)
            assert str(list(wrong.shape)) in str(caught.value)
        for wrong in (frames.float(), frames.to(torch.int8)):
            with pytest.raises(EngineError, match=f"dtype uint8.*got {wrong.dtype}"):
                backend.encode(wrong)
        backend.encode(frames)  # and it works afterwards


def test_calls_that_cannot_be(folder: Path, manifest: Manifest, clips: dict[str, Tensor]) -> None:
    backend: Any = open_onnxruntime(folder, manifest.layout, threads=1)
    tokens, *_ = backend.encode(clips["drawn"])
    with turn_of(backend)(), pytest.raises(RuntimeError, match="busy with another clip"):
        backend.encode(clips["drawn"])
    kept = tokens.clone()
    backend.close()
    backend.close()
    with pytest.raises(RuntimeError, match="vision backend is closed"):
        backend.encode(clips["drawn"])
    assert torch.equal(tokens, kept)  # what it returned before stays
    if isinstance(backend, Chunked):
        with pytest.raises(RuntimeError, match="closed"):
            backend.begin()
    with pytest.raises(EngineError, match="threads must be at least 1, got 0"):
        open_onnxruntime(folder, manifest.layout, threads=0)


def truncate(place: Path) -> None:
    path = sorted(place.glob("vision*.onnx"))[-1]
    path.write_bytes(path.read_bytes()[:2000])


def swap(place: Path) -> None:
    *_, first, last = sorted(place.glob("vision.?.onnx"))
    first.rename(place / "kept")
    last.rename(first)
    (place / "kept").rename(last)


def resize_input(name: str, axis: int, size: int) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = sorted(place.glob("vision.?.onnx"))[-1]
        model = onnx.load(path)
        for value in model.graph.input:
            if value.name == name:
                value.type.tensor_type.shape.dim[axis].dim_value = size
        del model.graph.value_info[:]
        onnx.save(model, path)

    return change


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
    ("which", "change", "line"),
    [
        ("whole", truncate, r"onnxruntime cannot load .*vision\.onnx"),
        ("adaptive", truncate, r"onnxruntime cannot load .*vision\.2\.onnx"),
        ("chunked", truncate, r"onnxruntime cannot load .*vision\.1\.onnx"),
        ("adaptive", swap, r"vision\.1\.onnx has the tensors .* stage 1 of 3 has"),
        ("chunked", swap, r"vision\.0\.onnx has the tensors .* stage 0 of an engine in chunks has"),
        ("adaptive", resize_input(layout.HIDDEN, 2, 64), r"vision\.2\.onnx"),
        ("chunked", resize_input(layout.HIDDEN, 2, 64), r"vision\.1\.onnx"),
        ("chunked", resize_input(layout.HIDDEN, 0, 7), r"vision\.1\.onnx"),
        ("adaptive", no_frames, r"stage 0 of the onnxruntime engine kept 0 of 16 frames"),
    ],
)
def test_a_bad_graph_is_one_line(
    folder_of: FolderOf, drawn: Tensor, tmp_path: Path, which: str, change: Callable[[Path], None], line: str
) -> None:
    place = tmp_path / "engine"
    shutil.copytree(folder_of(which), place)
    manifest = Manifest.read(place)
    change(place)
    changed = manifest.replace(files=describe_files(place))  # in good order again
    with pytest.raises(EngineError, match=line) as caught:
        open_backend("onnxruntime", place, changed).encode(sampled(drawn, manifest.frames))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("which", "changes", "line"),
    [
        ("adaptive", {"frames": 8}, r"vision\.0\.onnx takes 16 frames, the manifest says 8"),
        ("chunked", {"frames": 16}, "for clips of 16 frames in chunks of 2: they are of two builds"),
    ],
)
def test_graphs_of_another_build(folder_of: FolderOf, which: str, changes: dict[str, Any], line: str) -> None:
    place = folder_of(which)
    with pytest.raises(EngineError, match=line):
        open_onnxruntime(place, dataclasses.replace(Manifest.read(place).layout, **changes))


def test_a_folder_with_a_graph_changed_or_missing_is_no_engine(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "engine"
    shutil.copytree(folder, place)
    path = sorted(place.glob("vision*.onnx"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(EngineError, match=f"{path.name} changed since it was built"):
        Manifest.read(place)
    path.unlink()
    with pytest.raises(EngineError, match=f"{path.name} is missing"):
        Manifest.read(place)


# Its manifest


@pytest.mark.parametrize(
    ("which", "changes", "line"),
    [
        ("adaptive", {"tokens": 7}, "tokens is 7, its settings give"),
        ("adaptive", {"frames_per_stage": (16, 12, 8)}, r"frames_per_stage is \(16, 12, 8\)"),
        ("adaptive", {"frames_kept": None}, "frames_kept is None"),
        ("adaptive", {"frames_kept": ((16, 16, 16), (9, 10, 11))}, "3 stages"),
        ("adaptive", {"frames_kept": ((16, 16, 16), (9, 10, 17), (5, 5, 5))}, "at most 16 frames"),
        ("adaptive", {"frames_kept": ((16, 16, 16), (9, 8, 11), (5, 5, 5))}, "least, median and most"),
        ("chunked", {"chunk": 3}, "chunk is 3, which is for one video of one frame count .* divides its 8 frames"),
        ("chunked", {"chunk": 0}, "chunk: expected `int` >= 1, got 0"),
        ("chunked", {"chunk": True}, "chunk: expected `int \\| null`, got `bool`"),
        ("chunked", {"chunk": 2, "batch": 2}, "chunk is 2, which is for one video"),
        ("chunked", {"chunk": None}, r"lists no vision\.onnx"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    folder_of: FolderOf, which: str, changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(EngineError, match=line):
        Manifest.read(folder_of(which)).replace(**changes)


def test_a_manifest_names_every_graph(manifest: Manifest, mode: str) -> None:
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    assert manifest.to_dict().get("chunk") == manifest.chunk
    assert ("chunk" in manifest.to_dict()) == (mode == "chunked")
    graphs = manifest.stage_files(layout.ONNX_FILE)
    assert len(graphs) == {"whole": 1, "adaptive": 3, "chunked": 2}[mode]
    files = {name: record for name, record in manifest.files.items() if name != graphs[-1]}
    with pytest.raises(EngineError, match=f"lists no {graphs[-1]}"):
        manifest.replace(files=files)
    engines = dict.fromkeys(manifest.stage_files(layout.ENGINE_FILE), FileRecord(1, "0" * 64))
    compiled = manifest.replace(backend="tensorrt-rtx", files=engines)
    assert choose_backend("auto", compiled) == "tensorrt-rtx"
    with pytest.raises(EngineError, match=r"no vision\.onnx for onnxruntime"):
        choose_backend("onnxruntime", compiled)
    other = "budget" if manifest.adaptive else "adaptive"
    settings = EarlyTomConfig.from_dict(manifest.earlytom).replace(schedule=other).to_dict()
    with pytest.raises(EngineError, match="contradicts itself"):  # of another mode
        manifest.replace(earlytom=settings)
