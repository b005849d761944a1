"""What a few bytes of a file can ask for is refused before it is done, in little memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from earlytom.errors import UserError
from runtime.errors import VideoError
from runtime.video import Limits, load_clip

SIZE = (8, 8)


def gif(width: int, height: int, frames: int) -> bytes:
    """Frames of one pixel each on a canvas of that size: 940 bytes for 40 frames."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    pixel = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + bytes([2, 2, 0x44, 1, 0])
    return head + (b"\x21\xf9\x04\0\x0a\0\0\0" + pixel) * frames + b";"


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(1 + (width + 7) // 8) * height, 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pictures(path: Path, codec: str, said: tuple[int, int], packets: list[bytes]) -> Path:
    """A file whose header says one size, whatever its packets hold."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=24)
        stream.width, stream.height = said
        stream.pix_fmt = "rgb24" if codec == "png" else "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index, content in enumerate(packets):
            packet = av.Packet(content)
            packet.pts = packet.dts = index
            packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, 24), True, stream
            container.mux(packet)
    return path


def black(codec: str, width: int, height: int, count: int = 3) -> list[bytes]:
    """Packets of black frames."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    context: Any = av.CodecContext.create(codec, "w")
    context.width, context.height, context.framerate = width, height, Fraction(24)
    context.pix_fmt, context.time_base = "yuvj420p" if codec == "mjpeg" else "yuv420p", Fraction(1, 24)
    fast = {
        "libx264": {"preset": "ultrafast", "x264-params": "threads=1"},
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
        "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    }
    context.options = fast.get(codec, {})
    frame = av.VideoFrame(width, height, context.pix_fmt)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    packets = []
    for index in range(count):
        frame.pts = index
        packets += [bytes(packet) for packet in context.encode(frame)]
    return packets + [bytes(packet) for packet in context.encode(None)]


def refused_in_little_memory(paths: list[Path], **limits: float) -> list[str]:
    """The lines with which files are refused, by a process that grew by less than 300 MB."""
    program = f"""
import json, resource, sys
from runtime.errors import VideoError
from runtime.video import Limits, load_clip
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before, lines = peak(), []
for path in sys.argv[1:]:
    try:
        load_clip(path, 4, (8, 8), limits=Limits(**{limits!r}))
        lines.append("read")
    except VideoError as error:
        lines.append(str(error))
print(json.dumps([peak() - before, lines]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    grown, lines = json.loads(done.stdout)
    assert grown < 300
    return lines


def test_files_of_a_few_bytes_that_ask_for_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(gif(16000, 16000, 40))
    huge, small = png(16000, 16000), png(64, 48)
    paths = [
        tmp_path / "a.gif",
        pictures(tmp_path / "says so.mov", "png", (16000, 16000), [huge] * 3),
        pictures(tmp_path / "lies.mov", "png", (64, 48), [huge] * 3),
        pictures(tmp_path / "grows.mov", "png", (64, 48), [small] * 5 + [huge]),
        pictures(tmp_path / "lies.avi", "png", (64, 48), [huge] * 3),
    ]
    for line in refused_in_little_memory(paths):
        assert "more than 35389440 pixels (max_pixels)" in line
        assert "limits=Limits(max_pixels=...) (--max-pixels)" in line
        assert "\n" not in line


def test_black_frames_of_8192x8192_compress_to_nothing(tmp_path: Path) -> None:
    packets = black("libx264", 8192, 8192, 2)
    assert sum(map(len, packets)) < 200_000
    paths = [
        pictures(tmp_path / f"a.{kind}", "libx264", (8192, 8192), packets)
        for kind in ("mp4", "mkv", "ts", "flv", "avi")
    ]
    (tmp_path / "a.h264").write_bytes(b"".join(packets))
    (tmp_path / "grows.h264").write_bytes(b"".join(black("libx264", 64, 48, 9) + packets))
    for line in refused_in_little_memory([*paths, tmp_path / "a.h264", tmp_path / "grows.h264"]):
        assert "has frames of 8192x8192, more than 35389440 pixels (max_pixels)" in line


@pytest.mark.parametrize(
    ("codec", "kind"),
    [
        ("mjpeg", "avi"),
        ("mpeg4", "avi"),
        ("libvpx-vp9", "webm"),
        ("libx265", "ts"),
        ("libx264", "ts"),
        ("libx264", "mkv"),
    ],
)
def test_a_size_that_grows_in_the_middle(tmp_path: Path, codec: str, kind: str) -> None:
    packets = black(codec, 64, 64, 8) + black(codec, 1024, 1024)
    path = pictures(tmp_path / f"grows.{kind}", codec, (64, 64), packets)
    with pytest.raises(VideoError, match=r"100000 pixels \(max_pixels\)") as caught:
        load_clip(path, 4, SIZE, limits=Limits(max_pixels=100_000))
    assert "\n" not in str(caught.value)
    if codec != "libx265":  # whose parameters the file's header has once
        assert load_clip(path, 4, SIZE, limits=Limits(max_pixels=1024 * 1024)).source_frames == 11
        assert load_clip(path, 4, SIZE, limits=Limits(max_pixels=None)).source_frames == 11


def clip(path: Path, count: int, step: int = 40) -> Path:
    """`count` frames, `step` milliseconds from one to the next."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=25, width=32, height=16, pix_fmt="yuv420p")
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), index % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index * step, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("limits", "over", "step"),
    [
        ({"max_pixels": 32 * 16}, None, 40),
        ({"max_pixels": 32 * 16 - 1}, "frames of 32x16, more than 511 pixels", 40),
        ({"max_frames": 50}, None, 40),
        ({"max_frames": 49}, "more than 49 frames", 40),
        ({"max_seconds": 2.0}, None, 40),
        ({"max_seconds": 1.5}, "longer than 1.5 seconds", 40),
        ({"max_seconds": 600}, "longer than 600 seconds", 60_000),
        ({"max_bytes": 100_000}, None, 40),
        ({"max_bytes": 500}, "more than 500 bytes", 40),
        (dict.fromkeys(("max_pixels", "max_frames", "max_seconds", "max_bytes")), None, 40),
    ],
)
def test_each_limit_holds_and_is_named(
    tmp_path: Path, limits: dict[str, Any], over: str | None, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip(tmp_path / "a.mkv", 50, step)
    if over is None:
        assert load_clip(path, 4, SIZE, limits=Limits(**limits)).source_frames == 50
        return
    monkeypatch.setattr("runtime.video.load.decode", lambda *_: pytest.fail("decoded first"))
    (name,) = limits
    with pytest.raises(VideoError, match=rf"{over} \({name}\)") as caught:
        load_clip(path, 4, SIZE, limits=Limits(**limits))
    assert f"limits=Limits({name}=...) (--{name.replace('_', '-')})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_that_says_years_is_no_reason_to_refuse_a_file_of_seconds(tmp_path: Path) -> None:
    data = bytearray(clip(tmp_path / "a.mkv", 50).read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    data[at : at + 8] = np.array(1e12, ">f8").tobytes()
    (tmp_path / "a.mkv").write_bytes(data)
    assert load_clip(tmp_path / "a.mkv", 4, SIZE).source_frames == 50


@pytest.mark.parametrize("count", [3_000_000, 80_000_000])
def test_a_list_of_samples_that_a_few_bytes_ask_for(tmp_path: Path, count: int) -> None:
    """1 kB of an MP4 that would make FFmpeg write a list of gigabytes."""
    data = bytearray(clip(tmp_path / "a.mp4", 8).read_bytes())
    at = data.index(b"stsz") + 8
    data[at : at + 8] = struct.pack(">II", 1, count)
    at = data.index(b"stsc") + 16
    data[at : at + 4] = struct.pack(">I", count)
    at = data.index(b"stts") + 12
    data[at : at + 4] = struct.pack(">I", count)
    path = tmp_path / "many.mp4"
    path.write_bytes(data)
    (line,) = refused_in_little_memory([path])
    assert f"says that it has {count} samples, in {len(data)} bytes" in line
    path.write_bytes(data + bytes(4_000_000))
    with pytest.raises(VideoError, match=r"\(max_frames\)|says that it has"):
        load_clip(path, 4, SIZE)


def test_an_edit_list_that_shows_everything_a_million_times(tmp_path: Path) -> None:
    data = bytearray(clip(tmp_path / "a.mp4", 50).read_bytes())
    at = data.index(b"elst") + 8
    data[at : at + 4] = struct.pack(">I", 1_000_000)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(VideoError, match="edit list of too many entries"):
        load_clip(tmp_path / "a.mp4", 4, SIZE)


def test_boxes_in_boxes_in_boxes(tmp_path: Path) -> None:
    path = tmp_path / "deep.mp4"
    path.write_bytes(b"".join(struct.pack(">I4s", 8 * (20_000 - level), b"moov") for level in range(20_000)))
    with pytest.raises(VideoError):
        load_clip(path, 4, SIZE)


def test_fragments_of_more_samples_than_bytes(tmp_path: Path) -> None:
    path = tmp_path / "fragments.mp4"
    with av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream: Any = container.add_stream("mpeg4", rate=25, width=32, height=16, pix_fmt="yuv420p")
        for index in range(30):
            image = np.full((16, 32, 3), index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    assert load_clip(path, 4, SIZE).source_frames == 30
    data = bytearray(path.read_bytes())
    at = data.index(b"trun") + 8
    data[at : at + 4] = struct.pack(">I", 70_000_000)
    path.write_bytes(data)
    assert "samples" in refused_in_little_memory([path])[0]


def test_8k_passes_by_default() -> None:
    limits = Limits()
    assert limits.max_pixels == 8192 * 4320
    assert limits.max_pixels < 8192 * 8192
    assert (limits.max_frames, limits.max_seconds, limits.max_bytes) == (2_000_000, 86_400, 1 << 34)


@pytest.mark.parametrize("value", [0, -1, True, "3", float("nan"), float("inf"), Decimal(5), 10**400])
@pytest.mark.parametrize("name", ["max_pixels", "max_frames", "max_seconds", "max_bytes"])
def test_a_limit_that_is_no_number(name: str, value: Any) -> None:
    if value == 10**400 and name != "max_seconds":
        assert getattr(Limits(**{name: value}), name) == value
        return
    with pytest.raises(UserError, match=f"{name} must be"):
        Limits(**{name: value})


def test_numbers_of_numpy_are_limits() -> None:
    limits: Any = Limits(max_pixels=np.int64(5), max_seconds=np.float32(1.5))
    assert (limits.max_pixels, limits.max_seconds) == (5, 1.5)
    assert type(limits.max_pixels) is int
