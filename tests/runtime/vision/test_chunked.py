"""Vision in chunks: what is shared, and the reference backend."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom.config import EarlyTomConfig
from runtime.checkpoint import describe
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from runtime.video import clip_from_frames, load_clip
from runtime.vision.chunked import CHUNK
from runtime.vision.torch import TorchChunked, TorchVision
from tests.processes import HANG_SECONDS
from tests.runtime.vision.chunked_vision import SIDE, TinyVision, Toy, tiny_chunked

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("family", ["siglip", "siglip2", "clip", "dinov2"])
@pytest.mark.parametrize(
    ("layers", "settings"), [((1, 2), {}), ((2,), {}), ((3,), {}), ((), {}), ((0, 3), {"schedule": "adaptive"})]
)
def test_torch_in_chunks_says_what_torch_says(family: str, layers: tuple[int, ...], settings: Any) -> None:
    for frames, chunk in ((6, 3), (6, 6), (7, 4), (5, 1)):
        plain = TinyVision(frames, family=family, layers=layers, **settings)
        chunked = TorchChunked(plain, chunk)
        for seed in range(2):
            clip = noise(frames, seed=seed)
            (tokens, positions, *_), (wanted, where, *_) = chunked.encode(clip), plain.encode(clip)
            assert torch.equal(positions, where)
            torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-4)


def test_the_bundled_model_in_chunks(engine: Path, drawn_clip: Path) -> None:
    manifest = Manifest.read(engine)
    shape = (manifest.frames, 3, *manifest.model.preprocessing.size)
    checkpoint, config = describe(manifest.model.source), EarlyTomConfig.from_dict(manifest.earlytom)
    plain = TorchVision(checkpoint, config, shape, device=torch.device("cpu"), dtype=torch.float32)
    frames = load_clip(drawn_clip, manifest.frames, shape[2:]).frames
    chunked = TorchChunked(plain)
    assert chunked.chunk == CHUNK == 4
    wanted, where, *_ = plain.encode(frames)
    tokens, positions, *_ = chunked.encode(frames)
    assert torch.equal(positions, where)
    torch.testing.assert_close(tokens, wanted, rtol=1e-4, atol=1e-4)
    assert chunked.rows_alike
    chunked.close()
    with pytest.raises(RuntimeError, match="closed"):
        plain.encode(frames)


def test_parts_of_a_clip_are_any_size_up_to_a_chunk() -> None:
    vision, clip = tiny_chunked(8, 4), noise(8)
    wanted, *_ = vision.encode(clip)
    for sizes in ((1,) * 8, (3, 3, 2), (4, 1, 3), (2, 4, 2)):
        with vision.begin() as opened:
            for some in clip.split(sizes):
                opened.push(some)
            assert opened.encoded == 8
            tokens, *_ = opened.finish()
            assert torch.equal(tokens, wanted)  # the tower is even, so that what is beside a frame does not count


def test_rows_are_arranged_in_place() -> None:
    vision, clip = tiny_chunked(6, 3), noise(6)
    for rows in ([0, 0, 1, 1, 2, 2], [1, 2, 2, 2, 2, 2], [1, 3, 4, 5], [5], [], [0, 1, 2, 3, 4, 5]):
        with vision.begin() as opened:
            opened.push(clip[:3])
            if max(rows, default=0) > 2:
                opened.push(clip[3:])
            assert opened._room is not None
            place = opened._room.hidden.data_ptr()
            if rows == [1, 2, 2, 2, 2, 2]:  # 1 would go up, and 2 both ways
                with pytest.raises(EngineError, match=r"3 encoded frames cannot be arranged as \[1, 2, 2"):
                    opened.arrange(rows)
                continue
            opened.arrange(rows)
            assert opened.encoded == len(rows)
            assert opened._room.hidden.data_ptr() == place
            if rows:
                wanted = vision.run_head(clip[rows[:3]])[0][: len(rows[:3])]
                assert torch.equal(opened._room.hidden[: len(rows[:3])], wanted)
            for index in range(len(rows), 6):
                opened.push(clip[index, None])
            assert torch.equal(
                opened.finish()[0], vision.encode(torch.cat([clip[rows], clip[len(rows) :]]).contiguous())[0]
            )


@pytest.mark.parametrize("rows", [[1, 0], [3], [-1], [0, 0, 0, 0, 0, 1, 1]])
def test_rows_that_cannot_be_arranged(rows: list[int]) -> None:
    with tiny_chunked(6, 3).begin() as opened:
        opened.push(noise(3))
        with pytest.raises(EngineError, match="3 encoded frames cannot be arranged"):
            opened.arrange(rows)
        assert opened.encoded == 3


def test_calls_that_cannot_be() -> None:
    vision = tiny_chunked(6, 4)
    with vision.begin() as opened:
        for frames, line in (
            (noise(5), r"a chunk is 1 to 4 frames here, 0 of 6 being there, got frames \[5, 3, 20, 20\]"),
            (noise(0), "a chunk is 1 to 4"),
            (noise(1)[0], r"got frames \[3, 20, 20\]"),
            (noise(2, side=24), r"of shape \[2, 3, 20, 20\]"),
            (noise(2).float(), "uint8"),
        ):
            with pytest.raises(EngineError, match=line):
                opened.push(frames)
        opened.push(noise(4))
        with pytest.raises(EngineError, match="a chunk is 1 to 2 frames here, 4 of 6"):
            opened.push(noise(3))
        with pytest.raises(EngineError, match="clips of 6 frames, 4 were pushed"):
            opened.finish()
        opened.push(noise(2))
        opened.finish()
    for late in (lambda: opened.push(noise(1)), opened.finish, lambda: opened.arrange([])):
        with pytest.raises(RuntimeError, match="this clip is closed"):
            late()
    with pytest.raises(EngineError, match=r"takes frames of shape \[6, 3, 20, 20\]"):
        vision.encode(noise(5))
    with vision._whole(), pytest.raises(RuntimeError, match="busy"):
        vision.encode(noise(6))
    for chunk in (0, 7):
        with pytest.raises(EngineError, match=f"between 1 and 6 frames .* got {chunk}"):
            Toy(6, chunk)


def test_closing() -> None:
    vision = Toy(6, 3, uneven=True)
    opened = vision.begin()
    vision.close()
    vision.close()
    for late in (lambda: opened.push(noise(1, side=2)), vision.begin, lambda: vision.encode(noise(6, side=2))):
        with pytest.raises(RuntimeError, match="vision backend is closed"):
            late()
    opened.close()
    assert vision._rooms == []


def test_memory_is_used_again() -> None:
    vision, clip = Toy(6, 3), noise(6, side=2)
    vision.encode(clip)
    own = vision._own
    places = set()
    for _ in range(5):
        with vision.begin() as first, vision.begin() as second:
            for opened in (first, second):
                assert opened._room is not None
                places.add(opened._room.hidden.data_ptr())
        vision.encode(clip)
    assert len(places) == 2
    assert vision._own is own
    assert len(vision._rooms) == 2


def test_clips_of_several_threads_take_turns() -> None:
    vision = tiny_chunked(6, 2)
    clips = [noise(6, seed=seed) for seed in range(4)]
    wanted = [vision.encode(clip)[0].clone() for clip in clips]
    found: list[list[Tensor]] = [[] for _ in clips]

    def run(which: int) -> None:
        for _ in range(5):
            with vision.begin() as opened:
                for some in clips[which].split(2):
                    opened.push(some)
                found[which].append(opened.finish()[0].clone())

    threads = [threading.Thread(target=run, args=(which,)) for which in range(len(clips))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert all(len(mine) == 5 for mine in found)
    assert all(torch.equal(one, want) for mine, want in zip(found, wanted, strict=True) for one in mine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_torch_in_chunks_on_a_gpu(drawn_clip: Path) -> None:
    from runtime.vision.live import LiveClip

    checkpoint = describe(None)
    size = checkpoint.preprocessing.size
    config = EarlyTomConfig(merge_layers=(2, 5), retention_ratio=0.3, schedule="budget")
    plain = TorchVision(checkpoint, config, (8, 3, *size), device=torch.device("cuda"), dtype=torch.float16)
    vision, frames = TorchChunked(plain, 4), load_clip(drawn_clip, 8, size).frames
    wanted, where, *_ = (value.clone() for value in vision.encode(frames))
    for total in (8, None):
        with LiveClip(vision, total=total) as clip:
            for frame in frames:
                clip.push(frame)
            (tokens, positions, *_), _ = clip.finish()
        assert torch.equal(tokens, wanted)
        assert torch.equal(positions, where)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("total", [8, None])
def test_frames_as_they_come_wait_for_nothing_else_on_a_gpu(drawn_clip: Path, total: int | None) -> None:
    """Pushed from a stream of the caller's, resized there, and encoded while the stream of all threads is busy."""
    from runtime.vision.live import LiveClip

    checkpoint, cuda = describe(None), torch.device("cuda")
    size = checkpoint.preprocessing.size
    config = EarlyTomConfig(merge_layers=(2, 5), retention_ratio=0.3, schedule="budget")
    vision = TorchChunked(TorchVision(checkpoint, config, (8, 3, *size), device=cuda, dtype=torch.float16), 4)
    drawn = load_clip(drawn_clip, 8, (120, 160)).frames
    wanted, where, *_ = (value.clone() for value in vision.encode(clip_from_frames(drawn, 8, size, device=cuda).frames))
    for _ in range(2):  # the first round asks the driver for memory, which may wait
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()), LiveClip(vision, total=total, device=cuda) as clip:
            torch.cuda._sleep(20_000_000)  # the frames are still being made when they are pushed
            frames = drawn.cuda(non_blocking=True)
            with torch.cuda.stream(torch.cuda.default_stream()):
                torch.cuda._sleep(2_000_000_000)  # an answer
            for some in frames.split(3):
                clip.push(some)
            (tokens, positions, *_), _ = clip.finish()
            busy = not torch.cuda.default_stream().query()
        assert torch.equal(tokens, wanted)
        assert torch.equal(positions, where)
    assert busy
