"""Files as recorders, joiners and interrupted copies leave them: what is right is what FFmpeg itself shows."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from runtime.errors import VideoError
from runtime.video import Limits, load_clip, sample_indices
from runtime.video.decode import decode_all
from runtime.video.limits import DEFAULT_LIMITS
from runtime.video.opening import Opener

CASES = Path(__file__).parents[2] / "cases" / "video"
SIZE = (108, 192)


def refused(video: Any, **given: Any) -> str:
    with pytest.raises(VideoError) as caught:
        load_clip(video, 4, SIZE, **given)
    line = str(caught.value)
    assert "\n" not in line
    assert ";" in line  # and what to do about it
    return line


def frames_or_line(path: Path) -> int:
    """How many frames the file has; 0 where it is refused in one line."""
    try:
        return load_clip(path, 4, SIZE).source_frames
    except VideoError as error:
        if "\n" in str(error):
            raise
        return 0


def digests(path: Path) -> list[str]:
    """MD5 of every frame's raw picture, in the order in which this project decodes everything."""
    taken: list[str] = []

    def put(_: int, frame: av.VideoFrame) -> bool:
        taken.append(hashlib.md5(frame.to_ndarray().tobytes()).hexdigest())
        return True

    decode_all(Opener(path, DEFAULT_LIMITS, None), 10**6, {index: index for index in range(10**4)}, put)
    return taken


@pytest.mark.parametrize(("name", "frames", "seconds"), [("cat_back.ts", 100, 4.0), ("concat_copy.mp4", 105, 4.0)])
def test_joined_recordings_are_shown_in_ffmpegs_order(name: str, frames: int, seconds: float) -> None:
    path = CASES / name
    wanted = (CASES / f"{name}.framemd5.txt").read_text().split()
    assert digests(path) == wanted
    pictures: list[Any] = []

    def put(_: int, frame: av.VideoFrame) -> bool:
        pictures.append(frame.to_ndarray(format="rgb24"))
        return True

    decode_all(Opener(path, DEFAULT_LIMITS, None), 10**6, {index: index for index in range(frames)}, put)
    chosen = sample_indices(frames, 8)
    once, again = load_clip(path, 8, SIZE), load_clip(path, 8, SIZE)
    assert once.source_frames == frames
    assert once.duration == pytest.approx(seconds, abs=0.05)
    assert once.timestamps == pytest.approx((chosen / 25).tolist(), abs=0.5)
    assert torch.equal(once.frames, again.frames)
    taken = torch.from_numpy(np.stack([pictures[index] for index in chosen])).permute(0, 3, 1, 2)
    assert torch.equal(once.frames, taken)


@pytest.mark.parametrize(
    ("name", "frames", "seconds"),
    [
        ("seg1.mkv", 24, 0.96),  # begins after a second; its length counts from zero
        ("copyts.mkv", 64, 2.56),
        ("offset1s.mkv", 100, 4.0),
        ("h264_bframes.avi", 100, 4.0),  # times of decoding only, in half frames
        ("camera_multipart.mjpg", 5, 0.2),  # ends in an error of the format
        ("torn_tail.ts", 60, 2.4),  # the 61st frame is not there in full
    ],
)
def test_files_that_play_everywhere_are_read(name: str, frames: int, seconds: float) -> None:
    clips = [load_clip(CASES / name, 8, SIZE) for _ in range(5)]
    for clip in clips:
        assert clip.source_frames == frames
        assert clip.duration == pytest.approx(seconds, abs=1e-3)
        assert list(clip.timestamps) == sorted(clip.timestamps)
        assert torch.equal(clip.frames, clips[0].frames)  # also where many threads decode


def test_a_torn_frame_is_left_out_whether_or_not_all_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is left out is the torn one: the frame before it comes last."""
    planned = load_clip(CASES / "torn_tail.ts", 60, SIZE)
    monkeypatch.setattr("runtime.video.decode.plan", lambda *_: None)
    everything = load_clip(CASES / "torn_tail.ts", 60, SIZE)
    assert torch.equal(planned.frames, everything.frames)
    assert planned.timestamps == everything.timestamps
    with av.open(str(CASES / "torn_tail.ts")) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        decoded = [(frame.is_corrupt, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    assert [torn for torn, _ in decoded] == [False] * 60 + [True]
    assert np.array_equal(planned.frames[-1].permute(1, 2, 0).numpy(), decoded[59][1])


def test_a_torn_avi_is_refused_without_numbers_that_contradict_each_other() -> None:
    line = refused(CASES / "torn.avi")
    assert "is cut off" in line
    assert "seconds" not in line


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("name", ["seg1.mkv", "copyts.mkv", "offset1s.mkv", "concat_copy.mp4", "h264_bframes.avi"])
def test_the_same_files_cut_off_are_refused(tmp_path: Path, name: str, share: float) -> None:
    content = (CASES / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(share * len(content))])
    assert "cut off" in refused(path) or name.endswith((".mp4", ".avi"))  # an index that is missing says nothing


@pytest.mark.parametrize("longer", [1.5, 10.0, 1e6])
def test_a_header_that_says_another_length_is_not_believed(tmp_path: Path, longer: float) -> None:
    """The wall clock's, or that of the recording from which it was cut."""
    data = bytearray((CASES / "offset1s.mkv").read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # the length, a number of 8 bytes
    data[at : at + 8] = np.array(5000 * longer, ">f8").tobytes()
    path = tmp_path / "length.mkv"
    path.write_bytes(data)
    clip = load_clip(path, 8, SIZE)
    assert (clip.source_frames, clip.duration) == (100, pytest.approx(4))
    path.write_bytes(data[: len(data) * 2 // 3])
    assert "cut off" in refused(path)


def test_a_matroska_file_of_unknown_size_is_cut_off_where_a_cluster_is(tmp_path: Path) -> None:
    """Written to a pipe, so that nobody went back to the header; with the length of another recording in it."""
    data = bytearray((CASES / "offset1s.mkv").read_bytes())
    at = data.index(b"\x18\x53\x80\x67") + 4
    data[at : at + 8] = b"\x01" + b"\xff" * 7
    at = data.index(b"\x44\x89\x88") + 3
    data[at : at + 8] = np.array(60000, ">f8").tobytes()
    path = tmp_path / "pipe.mkv"
    path.write_bytes(data)
    assert load_clip(path, 8, SIZE).source_frames == 100
    path.write_bytes(data[: len(data) * 2 // 3])
    assert "cut off" in refused(path)


def write(path: Path, codec: str, count: int = 30, **muxer: str) -> Path:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    quiet = {"libx265": {"x265-params": "log-level=none"}}.get(codec, {})
    with av.open(str(path), "w", options=muxer) as container:
        stream: Any = container.add_stream(codec, rate=25, options=quiet)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 48, 64, "yuv420p", 12
        noise = np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3), np.uint8)
        for image in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx264"), ("a.ts", "mpeg2video"), ("a.mpg", "mpeg2video")])
def test_a_recording_that_ended_at_any_byte_is_the_same_every_time(tmp_path: Path, name: str, codec: str) -> None:
    content = write(tmp_path / name, codec).read_bytes()
    path = tmp_path / f"torn {name}"
    for share in (0.5, 0.61, 0.77, 0.93):
        path.write_bytes(content[: int(share * len(content))])
        clips = [load_clip(path, 30, (48, 64)) for _ in range(3)]
        assert len({clip.source_frames for clip in clips}) == 1
        assert all(torch.equal(clip.frames, clips[0].frames) for clip in clips)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            torn = [frame.is_corrupt for frame in container.decode(stream)]
        assert len(torn) - sum(torn[-3:]) <= clips[0].source_frames <= len(torn)


# ------------------------------------------------------------------------------------- what is no video by itself

TEXTS = {
    "live.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:4,\nseg.ts\n",
    "ended.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:4,\nseg.ts\n#EXT-X-ENDLIST\n",
    "master.M3U8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000\nlive.m3u8\n",
    "called.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:4,\nseg.ts\n",
    "called.ts": "\ufeff\n#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:4,\nseg.ts\n",
    "list.ffconcat": "ffconcat version 1.0\nfile seg.ts\n",
    "list.mp4": "ffconcat version 1.0\nfile seg.ts\n",
    "manifest.mpd": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="dynamic"></MPD>\n',
    "camera.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "old.pls": "[playlist]\nFile1=seg.ts\nNumberOfEntries=1\n",
}


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_what_speaks_of_other_files_is_refused_at_once(tmp_path: Path, name: str, as_bytes: bool) -> None:
    shutil.copy(CASES / "torn_tail.ts", tmp_path / "seg.ts")  # it is there, and must not be read
    path = tmp_path / name
    path.write_bytes(TEXTS[name].encode())
    result: list[str] = []
    worker = threading.Thread(
        target=lambda: result.append(refused(path.read_bytes() if as_bytes else path)), daemon=True
    )
    worker.start()
    worker.join(60)  # a live playlist would never end
    assert result
    assert "segments joined into one file" in result[0]


@pytest.mark.parametrize("name", ["img%03d.png", "img*.png", "img001.png"])
def test_a_sequence_of_pictures_is_refused(tmp_path: Path, name: str) -> None:
    for index in range(3):
        target = tmp_path / (name if index == 2 else f"img{index:03}.png")
        with av.open(str(tmp_path / "x.png"), "w", options={"update": "1"}) as container:
            stream: Any = container.add_stream("png", rate=24, width=16, height=16, pix_fmt="rgb24")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode(None))
        (tmp_path / "x.png").rename(target)
    assert "picture" in refused(tmp_path / name)


def test_a_format_that_reads_other_files_is_not_taken(tmp_path: Path) -> None:
    """An IMF or VapourSynth script, a picture drawn from letters: what FFmpeg would read, and what is no video file."""
    path = tmp_path / "notes.ans"
    path.write_bytes(b"\x1b[1;31mletters\x1b[0m\r\n" * 100)
    assert "format that is not read here; convert it to MP4" in refused(path)


def test_a_reference_inside_a_file_is_not_followed(tmp_path: Path) -> None:
    """A QuickTime file whose track lies in another file."""
    path = write(tmp_path / "a.mov", "mpeg4")
    (tmp_path / "other.mov").write_bytes(path.read_bytes())
    data = bytearray(path.read_bytes())
    at = data.index(b"dref") - 4
    size = int.from_bytes(data[at : at + 4])
    assert data[at + 20 : at + 24] == b"url "
    data[at + 27] = 0  # not in this file
    data[at + 20 : at + 24] = b"alis"
    assert size == 28
    path.write_bytes(data)
    frames_or_line(path)  # FFmpeg then looks in this file, or at nothing; never in another


# ------------------------------------------------------------------------------------------------ a check while reading


class StoppedError(Exception):
    """What a caller's own check raises."""


@pytest.mark.parametrize("calls", [1, 2, 5, 40, 150, 200])
@pytest.mark.parametrize("name", ["cat_back.ts", "offset1s.mkv"])
def test_what_the_check_raises_ends_the_reading(name: str, calls: int) -> None:
    left = calls
    error = StoppedError()

    def check() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise error

    with pytest.raises(StoppedError) as caught:
        load_clip(CASES / name, 8, SIZE, check=check)
    assert caught.value is error
    if Path("/proc/self/fd").is_dir():
        assert not any(name in os.path.realpath(file) for file in Path("/proc/self/fd").iterdir())  # it is closed
    with pytest.raises(StoppedError):
        load_clip(io.BytesIO((CASES / name).read_bytes()), 8, SIZE, check=lambda: (_ for _ in ()).throw(StoppedError()))


def test_one_group_of_pictures_is_left_in_the_middle(tmp_path: Path) -> None:
    """Where nothing is skipped, as in a recording with one keyframe, every frame asks."""
    path = tmp_path / "one.avi"
    if "mpeg4" not in av.codecs_available:
        pytest.skip("this FFmpeg has no encoder mpeg4")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=25, width=64, height=48, pix_fmt="yuv420p")
        stream.gop_size = 600
        for index in range(200):
            image = np.full((48, 64, 3), index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    load_clip(path, 2, (48, 64), check=count)
    assert calls >= 400


# --------------------------------------------------------------------------- streams that come to light late, odd bits


def test_a_bit_that_announces_another_stream_gives_frames_or_one_line(tmp_path: Path) -> None:
    data = bytearray((CASES / "torn_tail.ts").read_bytes())
    path = tmp_path / "bit.ts"
    read = 0
    for packet in range(3, len(data) // 188, 5):
        broken = bytearray(data)
        broken[188 * packet + 2] ^= 2  # of the packet's stream
        path.write_bytes(broken)
        read += frames_or_line(path) > 40
    assert read > 10


def test_a_stream_that_begins_late_is_found(tmp_path: Path) -> None:
    """7 MB of another stream come before the picture."""
    content = write(tmp_path / "a.ts", "mpeg2video").read_bytes()
    packets = [content[at : at + 188] for at in range(0, len(content), 188)]
    tables = [packet for packet in packets if int.from_bytes(packet[1:3]) & 0x1FFF in (0, 0x11, 0x1000)][:3]
    empty = b"\x47\x1f\xff\x10" + b"\xff" * 184
    path = tmp_path / "late.ts"
    path.write_bytes(b"".join(tables) + empty * 40_000 + content)
    assert load_clip(path, 4, SIZE).source_frames == 30


def test_time_bases_of_odd_rates(tmp_path: Path) -> None:
    path = tmp_path / "ntsc.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=Fraction(30000, 1001), width=64, height=48, pix_fmt="yuv420p")
        for index in range(30):
            image = np.full((48, 64, 3), 8 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    assert load_clip(path, 4, SIZE, limits=Limits(max_seconds=2)).duration == pytest.approx(1.001, abs=2e-3)
