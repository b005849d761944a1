"""Clocks that jump, step back or have one rotten time: what is shown is what decoding everything shows, every time.

The files are written well and their times rewritten in place, container by container, as joined recordings, restarted
encoders and flipped bits leave them.
"""

from __future__ import annotations

import functools
import io
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runtime.errors import VideoError
from runtime.video import decode, load_clip, sample_indices
from runtime.video.packets import Packets, plan
from runtime.video.sample import Sample

COUNT, HEIGHT, WIDTH = 48, 32, 48
TICKS = {"ts": 3600, "mkv": 40, "mp4": 512, "flv": 40}  # of one frame, at 25 a second
OPTIONS = {"x264-params": "scenecut=0:b-adapt=0:bframes=2:b-pyramid=1:threads=1", "preset": "ultrafast"}
Move = Callable[[int, int], int]  # (index of a packet, its time) -> its new time

pytestmark = pytest.mark.skipif("libx264" not in av.codecs_available, reason="this FFmpeg cannot write H.264")


@functools.cache
def clip(kind: str, gop: int, bframes: int) -> bytes:
    """A file of 48 frames, each unlike all others."""
    memory = io.BytesIO()
    name = {"ts": "mpegts", "mkv": "matroska"}.get(kind, kind)
    with av.open(memory, "w", format=name) as container:
        options = OPTIONS | {"x264-params": OPTIONS["x264-params"].replace("bframes=2", f"bframes={bframes}")}
        stream: Any = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = HEIGHT, WIDTH, "yuv420p", gop
        for index in range(COUNT):
            y, x = np.mgrid[:HEIGHT, :WIDTH]
            grey = np.where((index >> (x * 6 // WIDTH)) & 1, 220, 30) - 20 * (y > HEIGHT // 2)
            image = np.stack([grey] * 3, axis=-1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return memory.getvalue()


# ---------------------------------------------------------------------------------------------------- rewriting times


def move_ts(data: bytearray, move: Move) -> None:
    """The times in the headers of the elementary stream's packets."""
    index = -1
    for at in range(0, len(data), 188):
        if not data[at + 1] & 0x40:  # no packet begins here
            continue
        start = at + 4 + (1 + data[at + 4] if data[at + 3] & 0x20 else 0)
        if data[start : start + 3] != b"\0\0\1" or data[start + 3] & 0xF0 != 0xE0:
            continue
        index += 1
        for slot in range(2 if data[start + 7] & 0x40 else 1):
            field = start + 9 + 5 * slot
            a, b, c = data[field], *struct.unpack(">HH", data[field + 1 : field + 5])
            time = move(index, ((a >> 1) & 7) << 30 | (b >> 1) << 15 | c >> 1) % 2**33
            data[field] = (a & 0xF1) | (time >> 30) << 1
            data[field + 1 : field + 5] = struct.pack(">HH", (time >> 15 & 0x7FFF) << 1 | 1, (time & 0x7FFF) << 1 | 1)


def move_flv(data: bytearray, move: Move) -> None:
    """The time of decoding of each tag, to which the picture's own is relative."""
    at, index = 13, -1
    while at + 11 < len(data):
        size = int.from_bytes(data[at + 1 : at + 4])
        if data[at] == 9 and data[at + 12] == 1:  # a picture, neither the header nor the end
            index += 1
            time = max(0, move(index, int.from_bytes(data[at + 4 : at + 7]) | data[at + 7] << 24))
            data[at + 4 : at + 8] = (time & 0xFFFFFF).to_bytes(3) + bytes([time >> 24 & 0x7F])
        at += 15 + size


def move_mkv(data: bytearray, move: Move) -> None:
    """The time of each block, relative to its cluster: 16 bits."""
    index, at = -1, 0
    while (at := data.find(b"\xa3", at + 1)) >= 0:  # a simple block: size, track 1, time, flags
        width = 9 - data[at + 1].bit_length() if data[at + 1] else 9
        block = at + 1 + width
        size = int.from_bytes(data[at + 1 : block]) & ((1 << 7 * width) - 1)
        if width > 4 or data[block] != 0x81 or data[block + 3] & 0x7F or block + size > len(data):
            continue
        index += 1
        time = struct.unpack(">h", data[block + 1 : block + 3])[0]
        data[block + 1 : block + 3] = struct.pack(">h", max(-30000, min(30000, move(index, time))))
        at = block + size - 1


def move_mp4(data: bytearray, move: Move) -> None:
    """The offsets of the times of showing to those of decoding, in runs."""
    at = data.find(b"ctts")
    if at < 0:
        return
    data[at + 4] = 1  # offsets may be negative
    index = 0
    for entry in range(int.from_bytes(data[at + 8 : at + 12])):
        field = at + 12 + 8 * entry
        count, offset = struct.unpack(">Ii", data[field : field + 8])
        data[field + 4 : field + 8] = struct.pack(">i", max(-(2**20), min(2**20, move(index, offset))))
        index += count


REWRITE = {"ts": move_ts, "flv": move_flv, "mkv": move_mkv, "mp4": move_mp4}


@dataclass(frozen=True)
class Joined:
    """How a file is made."""

    kind: str
    gop: int = 12
    bframes: int = 2
    jumps: tuple[tuple[int, int], ...] = ()  # (index of a packet, frames by which all times from there on are moved)
    rotten: tuple[tuple[int, int], ...] = ()  # (index of a packet, frames by which its time is moved)
    again: tuple[float, ...] = ()  # the shares of itself that follow the file, as the segments of a playlist do

    def content(self) -> bytes:
        data, tick = bytearray(clip(self.kind, self.gop, self.bframes)), TICKS[self.kind]

        def move(index: int, time: int) -> int:
            jumped = sum(by for at, by in self.jumps if at <= index)
            return time + tick * (jumped + sum(by for at, by in self.rotten if at == index))

        REWRITE[self.kind](data, move)
        whole = bytes(data)
        return whole + b"".join(whole[: 188 * max(1, int(share * len(whole) / 188))] for share in self.again)


# Less than three frames stays within the places by which an encoder may reorder: the file then says another order.
FRAMES = st.one_of(st.integers(-60, -3), st.integers(3, 60), st.integers(-500, -3), st.integers(3, 2000))
MOVES = st.lists(st.tuples(st.integers(0, COUNT - 1), FRAMES), max_size=3).map(tuple)
FILES = st.builds(
    Joined, st.sampled_from(sorted(TICKS)), st.sampled_from((6, 12, 48)), st.sampled_from((0, 2)), MOVES, MOVES
) | st.builds(
    Joined,
    st.just("ts"),
    st.sampled_from((6, 12, 48)),
    st.sampled_from((0, 2)),
    MOVES,
    again=st.lists(st.floats(0.1, 1), min_size=1, max_size=2).map(tuple),
)


# ------------------------------------------------------------------------------------------------------------ the test


def every_frame(path: Path) -> torch.Tensor:
    """uint8 [n, 3, h, w] in the order in which a decoder on one thread returns them, broken packets left out."""

    def frames() -> Iterator[Any]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            for packet in container.demux(stream):
                try:
                    yield from packet.decode()
                except av.error.InvalidDataError:
                    continue

    pictures = [frame.to_ndarray(format="rgb24") for frame in frames()]
    if not pictures:
        return torch.empty(0)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def load_poisoned(path: Path, frames: int, value: int) -> Any:
    """The clip, where memory that nobody has written holds `value`."""
    empty = torch.empty
    with patch.object(torch, "empty", lambda *sizes, **kinds: empty(*sizes, **kinds).fill_(value)):
        return load_clip(path, frames, (HEIGHT, WIDTH))


@given(FILES, st.sampled_from((2, 5, 8, 20, 48)))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@example(Joined("ts", again=(1.0,)), 8)
@example(Joined("mkv", jumps=((24, -30),)), 8)
@example(Joined("mp4", rotten=((20, 3),)), 20)
def test_what_is_shown_is_what_decoding_everything_shows(made: Joined, frames: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"joined.{made.kind}"
        path.write_bytes(made.content())
        wanted = every_frame(path)
        if len(wanted) < 2:  # an edit list of an MP4 shows what has a time above zero
            with pytest.raises(VideoError, match="at least 2 frames"):
                load_clip(path, frames, (HEIGHT, WIDTH))
            return
        once, again = (load_poisoned(path, frames, value) for value in (77, 200))
    assert torch.equal(once.frames, again.frames)
    if once.source_frames == len(wanted) - 1:  # a segment that was cut: its last frame is torn
        wanted = wanted[:-1]
    assert once.source_frames == len(wanted)
    assert torch.equal(once.frames, wanted[sample_indices(len(wanted), frames)])
    assert once.duration >= 0
    assert list(once.timestamps) == sorted(once.timestamps)


def table(pts: list[int], keys: tuple[int, ...] = (0, 12, 24, 36), **known: Any) -> Packets:
    """Packets of H.264 in the order of the file."""
    count = len(pts)
    columns = {"pts": list(pts), "key": [i in keys for i in range(count)], "shown": [True] * count}
    return Packets("h264", 25.0, 0.04, **columns, **known)


@pytest.mark.parametrize(
    ("moved", "why"),
    [
        (lambda pts: pts[:24] + [time - 30 for time in pts[24:]], "the clock starts again"),
        (lambda pts: [*pts[:30], 2, *pts[31:]], "one time lies in a group before"),
        (lambda pts: [*pts[:45], 900, *pts[46:]], "one time lies far ahead, in the last group"),
        (lambda pts: pts[:24] + [time - 1 for time in pts[24:]], "two frames of one time"),
    ],
)
def test_a_clock_that_does_not_run_forwards_leaves_no_plan(moved: Callable[[list[int]], list[int]], why: str) -> None:
    good, chosen = list(range(72)), sample_indices(72, 5)
    assert plan(table(good), chosen) is not None, why
    assert plan(table(moved(good)), chosen) is None, why
    assert plan(table(good, steady=False), chosen) is None
    assert plan(table(good, keys=(3, 12)), chosen) is None  # it begins in the middle of a group


def test_a_row_that_was_not_put_is_never_shown(tmp_path: Path) -> None:
    """The decoder returns less than the plan promised: everything is decoded; it does so again: an error."""
    path = tmp_path / "clip.ts"
    path.write_bytes(clip("ts", 12, 2))
    wanted = load_clip(path, 8, (HEIGHT, WIDTH)).frames
    with patch.object(decode, "decode_spans", lambda *_: None):
        assert torch.equal(load_poisoned(path, 8, 99).frames, wanted)
    with (
        patch.object(decode, "decode_spans", lambda *_: None),
        patch.object(decode, "decode_all", lambda *_: list(range(COUNT))),
        pytest.raises(VideoError, match="re-encode it"),
    ):
        load_poisoned(path, 8, 99)


def test_a_row_that_is_put_twice_is_a_contradiction() -> None:
    sample = Sample(2, (4, 4), torch.device("cpu"))
    frame = av.VideoFrame.from_ndarray(np.zeros((4, 4, 3), np.uint8), format="rgb24")
    assert sample.put(0, frame)
    assert not sample.put(0, frame)
    with pytest.raises(AssertionError):
        sample.result(np.array([0, 1]))  # row 1 is missing
