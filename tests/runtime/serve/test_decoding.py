"""Decoding in a process of its own, and what happens to that process."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.drawing.clips import draw_clip
from runtime.serve import decoding as module
from runtime.serve.decoding import Decoding
from runtime.serve.errors import ServeError
from runtime.serve.fetch import FetchRules
from runtime.serve.media import Media, TakenVideo, VideoPart
from runtime.video import Clip, Limits, clip_from_frames, load_clip
from tests.processes import HANG_SECONDS

SIZE = (24, 32)


class Loop:
    """One event loop, in which the decoders live, and calls into it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def start(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Any) -> Any:
        return self.start(work).result(HANG_SECONDS)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(HANG_SECONDS)
        self.loop.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    one = Loop()
    yield one
    one.close()


@pytest.fixture(scope="module")
def decoding(loop: Loop) -> Iterator[Decoding]:
    """Read only: what breaks a decoder has one of its own."""
    one = Decoding(Limits(max_pixels=400 * 300, max_frames=500))
    loop.run(one.start())
    yield one
    loop.run(one.close())


Make = Callable[..., Decoding]


@pytest.fixture
def make(loop: Loop) -> Iterator[Make]:
    made: list[Decoding] = []

    def one(**settings: Any) -> Decoding:
        made.append(Decoding(**settings))
        loop.run(made[-1].start())
        return made[-1]

    yield one
    for decoders in made:
        loop.run(decoders.close())
    assert not [pid for decoders in made for pid in decoders.processes]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_clip(tmp_path_factory.mktemp("film") / "film.mp4")


def taken(content: bytes | list[bytes]) -> TakenVideo:
    """A video as requests bring it."""
    parts = content if isinstance(content, list) else [content]
    url = f"data:video/{'jpeg' if isinstance(content, list) else 'mp4'};base64,"
    url += ",".join(base64.b64encode(part).decode() for part in parts)
    return asyncio.run(Media(FetchRules()).take(VideoPart(url=url)))


def clip_of(
    loop: Loop, decoding: Decoding, content: bytes | list[bytes], counts: Any = 8, size: tuple[int, int] = SIZE
) -> Clip:
    with taken(content) as video:
        return loop.run(decoding.clip(video, counts, size))


def refused(loop: Loop, decoding: Decoding, content: bytes | list[bytes], counts: Any = 8) -> str:
    with pytest.raises(ServeError) as caught:
        clip_of(loop, decoding, content, counts)
    assert (caught.value.status, caught.value.code) == (400, "invalid_video")
    message = caught.value.message
    assert not [word for word in ("/proc", "/tmp", "fd/", "Traceback") if word in message]
    return message


def picture(size: tuple[int, int] = (40, 30), seed: int = 0, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def same(one: Clip, other: Clip) -> bool:
    return torch.equal(one.frames, other.frames) and (one.timestamps, one.source_frames, one.duration) == (
        other.timestamps,
        other.source_frames,
        other.duration,
    )


# What comes back


@pytest.mark.parametrize("counts", [8, [8], [4, 8, 16], (500,)])
def test_a_file_becomes_the_clip_that_it_becomes_here(loop: Loop, decoding: Decoding, film: Path, counts: Any) -> None:
    got, wanted = clip_of(loop, decoding, film.read_bytes(), counts), load_clip(film, counts, SIZE)
    assert same(got, wanted)
    assert got.decode_seconds > 0
    assert got.frames.is_contiguous()


@pytest.mark.parametrize("count", [2, 5, 8, 40])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_become_the_clip_that_they_become_here(loop: Loop, decoding: Decoding, count: int, kind: str) -> None:
    content = [picture(seed=seed, kind=kind) for seed in range(count)]
    here = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in content]
    assert same(clip_of(loop, decoding, content, [4, 8]), clip_from_frames(here, [4, 8], SIZE))


def test_videos_do_not_get_mixed_up(loop: Loop, decoding: Decoding) -> None:
    videos = [[picture(seed=seed), picture(seed=seed + 100)] for seed in range(12)]
    given = [taken(video) for video in videos]

    async def all_at_once() -> list[Clip]:
        return await asyncio.gather(*(decoding.clip(one, 2, SIZE) for one in given))

    for video, clip in zip(videos, loop.run(all_at_once()), strict=True):
        here = [np.asarray(Image.open(io.BytesIO(one))) for one in video]
        assert same(clip, clip_from_frames(here, 2, SIZE))


def test_a_pool_decodes_side_by_side(loop: Loop, make: Make, film: Path) -> None:
    decoders = make(workers=2)
    assert len(set(decoders.processes)) == 2
    clips = [clip_of(loop, decoders, film.read_bytes()) for _ in range(4)]
    assert all(same(clips[0], other) for other in clips[1:])


# What is refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello world, I am no video" * 100, "it is a text file"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "a playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "a script"),
        (bytes(5000), "cannot be read"),
        ([b"\0\0\0", b"\0\0\0"], "frame 0"),
        ([picture(), b"\0\0\0"], "frame 1"),
        ([picture(), picture()[:500]], "frame 1"),
        ([picture(), picture((30, 40))], "frame 0 is 40x30 and frame 1 is 30x40"),
        ([picture(), picture(kind="GIF")], "frame 1"),
        ([picture((500, 300)), picture((500, 300))], "max_pixels"),
        ([picture((4, 4))] * 501, "max_frames"),
    ],
)
def test_the_one_line_of_what_is_wrong(loop: Loop, decoding: Decoding, content: bytes | list[bytes], said: str) -> None:
    before = decoding.processes
    assert said in refused(loop, decoding, content)
    assert decoding.processes == before  # an error does not cost a process


def test_a_video_cut_off(loop: Loop, decoding: Decoding, film: Path) -> None:
    content = film.read_bytes()
    refused(loop, decoding, content[: len(content) // 2])
    assert len(clip_of(loop, decoding, content).frames) == 8


def test_limits_hold_for_files(loop: Loop, make: Make, film: Path) -> None:
    assert "max_pixels" in refused(loop, make(limits=Limits(max_pixels=1000)), film.read_bytes())
    assert "max_bytes" in refused(loop, make(limits=Limits(max_bytes=1000)), film.read_bytes())


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it has that many pixels a side."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def test_a_picture_that_unfolds_is_refused_by_its_header(loop: Loop, decoding: Decoding) -> None:
    content = bomb(12_000)
    assert len(content) < 50_000
    assert "12000x12000" in refused(loop, decoding, [content, content])


def test_a_bound_on_memory(loop: Loop, make: Make) -> None:
    """No limit on pixels, but one on memory: 12,000 x 12,000 pixels in RGB are 432 MB."""
    decoders = make(limits=Limits(max_pixels=None), memory=200 << 20)
    refused(loop, decoders, [bomb(12_000)] * 2)
    good = [picture(), picture(seed=1)]
    assert len(clip_of(loop, decoders, good, 2).frames) == 2
    enough = make(limits=Limits(max_pixels=None), memory=4 << 30)  # negative control
    assert len(clip_of(loop, enough, [bomb(12_000)] * 2, 2).frames) == 2


# What ends a decoder


class Held:
    """A video that decoding never ends with: a pipe in which nothing comes."""

    def __init__(self) -> None:
        self.frames = None
        self.end, self.write = os.pipe()
        self.file = self

    def fileno(self) -> int:
        return self.end

    def close(self) -> None:
        os.close(self.end)
        os.close(self.write)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loop, Decoding], Any]:
    """Begin a video with which a decoder is busy for good, and come back when it is."""

    def begin(loop: Loop, decoders: Decoding) -> Any:
        sent = threading.Event()
        real = module._Decoder._send

        async def send(self: Any, message: dict[str, Any], files: list[int]) -> None:
            if "counts" in message:  # a frame that is as long as it takes to wait for the end of time
                message = {**message, "frames": [10] * 30_000_000}
            await real(self, message, files)
            sent.set()

        with monkeypatch.context() as patch:
            patch.setattr(module._Decoder, "_send", send)
            call = loop.start(decoders.clip(taken([picture(), picture()]), 8, SIZE))
            assert sent.wait(HANG_SECONDS)
        return call

    return begin
