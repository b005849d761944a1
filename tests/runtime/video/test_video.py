"""Every frame of the clips written here carries its index as a barcode, so a test can read which frames came out."""

import os
import struct
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from earlytom.errors import UserError
from runtime.errors import VideoError
from runtime.video import apply_display_matrix, clip_from_frames, decode, load, load_clip, sample_indices
from runtime.video.frames import resize_frames, resize_in_float
from tests.processes import HANG_SECONDS

HEIGHT, WIDTH, BITS = 48, 80, 10
SIZE = (HEIGHT, WIDTH)
X264 = {"bf": "2", "x264-params": "scenecut=0:b-adapt=0:bframes=2:b-pyramid=1"}


# --------------------------------------------------------------------------------------------------- writing clips


def picture(index, height=HEIGHT, width=WIDTH):
    """uint8 [h, w, 3]: the index as bars of black and white above, something that moves below."""
    y, x = np.mgrid[:height, :width]
    bars = ((index >> (x * BITS // width)) & 1) * 180 + 40
    waves = 128 + 90 * np.sin((x + 3 * index) / 6) * np.cos((y - index) / 5)
    grey = np.where(y < height // 2, bars, waves)
    return np.stack([grey, grey, np.where(y < height // 2, bars, 200 - grey / 2)], axis=-1).astype(np.uint8)


def barcodes(frames):
    """The indices that the frames [F, 3, H, W] carry."""
    height, width = frames.shape[-2:]
    above = frames[:, :, : height // 2 - 4].float().mean(dim=(1, 2))  # [F, W]
    middles = (torch.arange(BITS) * 2 + 1) * width // (2 * BITS)
    return ((above[:, middles] > 130).long() << torch.arange(BITS)).sum(dim=1).tolist()


def write(path, count, *, codec="libx264", options=None, gop=12, pts=None, pix_fmt="yuv420p", images=None, **muxer):
    """A clip of `count` frames at 24 a second, or at `pts` milliseconds."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(
            codec, rate=24, options=X264 if codec == "libx264" and options is None else options
        )
        images = [picture(index) for index in range(count)] if images is None else images
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        if pts is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def patch(path, box, offset, content):
    """Overwrite bytes of a box of an mp4 file, `offset` from the end of the box's name."""
    data = bytearray(path.read_bytes())
    start = data.index(box) + 4 + offset
    data[start : start + len(content)] = content
    path.write_bytes(data)
    return path


def every_frame(path):
    """The obvious slow way: decode everything in one thread and keep it. uint8 [n, 3, h, w]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.fixture
def no_full_decode(monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded the whole file")

    monkeypatch.setattr(decode, "decode_all", refuse)


@pytest.fixture
def full_decodes(monkeypatch):
    """Counts the times that a whole file was decoded."""
    calls = []
    original = decode.decode_all
    monkeypatch.setattr(decode, "decode_all", lambda *args: calls.append(1) or original(*args))
    return calls


# -------------------------------------------------------------------------------------------------------- sampling


def test_sampling_is_uniform_and_rounds_down():
    assert sample_indices(10, 4).tolist() == [0, 3, 6, 9]
    assert sample_indices(10, 5).tolist() == [0, 2, 4, 6, 9]
    assert sample_indices(3, 8).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert sample_indices(7, 1).tolist() == [0]


@pytest.mark.parametrize("frames", [2, 8, 32, 64])
@pytest.mark.parametrize("count", [2, 31, 32, 33, 524, 108_000])
def test_sampling_spans_the_clip_in_even_steps(count, frames):
    indices = sample_indices(count, frames)
    assert (indices[0], indices[-1], len(indices)) == (0, count - 1, frames)
    assert np.ptp(np.diff(indices)) <= 1
    assert (indices == np.linspace(0, count - 1, frames, dtype=int)).all()


@pytest.mark.parametrize("frames", [1, 2, 7, 16])
def test_the_sampled_frames_are_the_ones_asked_for(tmp_path, frames):
    path = write(tmp_path / "clip.mp4", 100)
    clip = load_clip(path, frames, SIZE)
    assert barcodes(clip.frames) == sample_indices(100, frames).tolist()
    assert clip.frames.shape == (frames, 3, *SIZE)
    assert clip.frames.dtype == torch.uint8
    assert clip.frames.is_contiguous()
    assert clip.source_frames == 100
    assert clip.duration == pytest.approx(100 / 24)
    assert clip.timestamps == pytest.approx([index / 24 for index in sample_indices(100, frames)], abs=1e-3)
    assert clip.decode_seconds > 0
    assert clip.preprocess_seconds > 0


def test_a_short_clip_repeats_frames(tmp_path):
    clip = load_clip(write(tmp_path / "short.mp4", 3), 8, SIZE)
    assert barcodes(clip.frames) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert clip.source_frames == 3
    assert torch.equal(clip.frames[0], clip.frames[3])
    assert not torch.equal(clip.frames[3], clip.frames[4])


@pytest.mark.parametrize("options", [{}, {"codec": "mpeg1video"}])  # the second has no rate but that of its clock
def test_two_frames_are_enough(tmp_path, options):
    clip = load_clip(write(tmp_path / ("two.mpg" if options else "two.mp4"), 2, **options), 2, SIZE)
    assert barcodes(clip.frames) == [0, 1]
    assert clip.duration == pytest.approx(2 / 24, abs=0.01)


# ------------------------------------------------------------------------- only what is needed is decoded, exactly

EXACT = {  # a name of the file, and how it is written; all of these start at keyframes
    "closed groups.mp4": {},
    "open groups.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}},
    "one group.mp4": {"gop": 1000},
    "no B.mp4": {"options": {"bf": "0"}},
    "interlaced.mp4": {"options": {"x264-params": "tff=1:bframes=2"}},
    "ten bit.mp4": {"pix_fmt": "yuv420p10le"},
    "h264.mkv": {},
    "h264.ts": {},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=1:bframes=3:scenecut=0"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2", "b": "2M"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "b": "2M"}},
    "mpeg4 no B.mp4": {"codec": "mpeg4", "options": {"bf": "0", "b": "2M"}},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}
WHOLE = {  # and these are decoded from the start: no timestamps, or a codec that is not known to be exact
    "bare.h264": {},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2", "b": "2M"}},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}},
    "ffv1.mkv": {"codec": "ffv1"},
    "intra refresh.mp4": {"options": {"x264-params": "intra-refresh=1:bframes=0"}, "gop": 20},
}


@pytest.mark.parametrize("frames", [5, 90])
@pytest.mark.parametrize("name", [*EXACT, *WHOLE])
def test_decoding_parts_gives_the_pixels_of_decoding_everything(tmp_path, name, frames, full_decodes):
    path = write(tmp_path / name, 90, **(EXACT | WHOLE)[name])
    expected = every_frame(path)
    assert barcodes(expected) == list(range(90))  # or the clip is no test

    clip = load_clip(path, frames, SIZE)

    chosen = sample_indices(90, frames)
    assert barcodes(clip.frames) == chosen.tolist()
    assert torch.equal(clip.frames, expected[chosen])
    assert clip.timestamps == pytest.approx((chosen / (25 if name == "bare.h264" else 24)).tolist(), abs=2e-3)
    if name in EXACT:
        assert not full_decodes
    elif (name, frames) != ("intra refresh.mp4", 90):  # decoded in one go, and no gap shows that there is no keyframe
        assert full_decodes


@pytest.fixture
def decoded(monkeypatch):
    """The pts of all frames that were decoded."""
    decoded = []
    original = decode.span_frames

    def counted(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode, "span_frames", counted)
    return decoded


def test_most_of_a_long_clip_is_never_decoded(tmp_path, decoded, no_full_decode):
    path = write(tmp_path / "long.mp4", 400, gop=10)
    assert barcodes(load_clip(path, 6, SIZE).frames) == sample_indices(400, 6).tolist()
    assert 6 <= len(decoded) <= 6 * 10


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this FFmpeg cannot write H.264 with B-frames")
def test_pictures_that_nobody_needs_are_not_decoded(tmp_path, decoded, no_full_decode):
    flat = {"x264-params": "bframes=2:b-pyramid=0:b-adapt=0:scenecut=0"}  # nothing refers to two of three frames
    path = write(tmp_path / "one group.mp4", 90, gop=1000, options=flat)
    assert barcodes(load_clip(path, 4, SIZE).frames) == sample_indices(90, 4).tolist()
    assert 30 <= len(decoded) <= 50


@pytest.mark.parametrize(
    "name", ["closed groups.mp4", "mpeg4.mp4", "mpeg4 no B.mp4", "vp9.webm", "hevc.mp4", "av1.mp4"]
)
def test_keyframes_that_are_none_are_found_out(tmp_path, monkeypatch, full_decodes, name):
    """A file that calls every packet a keyframe would have frames built on nothing; they are not believed."""
    path = write(tmp_path / name, 90, **EXACT[name])
    original = load.read_packets

    def lie(source):
        packets = original(source)
        packets.key = [True] * len(packets.key)
        return packets

    monkeypatch.setattr(load, "read_packets", lie)
    clip = load_clip(path, 8, SIZE)
    assert full_decodes
    assert torch.equal(clip.frames, every_frame(path)[sample_indices(90, 8)])


def test_packets_that_give_no_frame_are_not_counted(tmp_path, monkeypatch, full_decodes):
    """The decoder has the last word on how many frames there are."""
    path = write(tmp_path / "hollow.mkv", 90, codec="mpeg4", options={"b": "2M"})
    original = load.read_packets

    def lie(source):
        packets = original(source)
        packets.pts.extend(range(10**6, 10**6 + 10))
        packets.key.extend([False] * 10)
        packets.shown.extend([True] * 10)
        return packets

    monkeypatch.setattr(load, "read_packets", lie)
    clip = load_clip(path, 8, SIZE)
    assert len(full_decodes) == 2  # once by the wrong count, once by the right one
    assert clip.source_frames == 90
    assert barcodes(clip.frames) == sample_indices(90, 8).tolist()


def test_a_broken_packet_costs_a_frame_not_the_clip(tmp_path):
    path = write(tmp_path / "whole.mkv", 60, codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(path)) as container:
        sizes = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, size = sizes[20]
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xd8", position)
    data[start : start + size - 4] = bytes(size - 4)
    path.write_bytes(data)

    clip = load_clip(path, 60, SIZE)
    intact = [index for index in range(60) if index != 20]
    assert clip.source_frames == 59
    assert barcodes(clip.frames) == [intact[index] for index in sample_indices(59, 60)]


def test_a_broken_keyframe_of_vp9_does_not_end_the_process(tmp_path):
    """FFmpeg did that where it decoded frames side by side and had been flushed, so it is a child that loads."""
    path = write(
        tmp_path / "vp9.webm", 60, codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}, gop=8
    )
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size and packet.is_keyframe]
    data = path.read_bytes()
    for content in packets[1:]:
        data = data.replace(content, b"\x21\x89\xc4\xfa" + content[4:])
    path.write_bytes(data)
    program = f"""
from runtime.errors import VideoError
from runtime.video import load_clip
for frames in (2, 3, 4, 5, 8, 20):
    try:
        print(load_clip({str(path)!r}, frames, (8, 8)).source_frames)
    except VideoError as error:
        print(error)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 6


def test_memory_does_not_grow_with_the_clip(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of a process is read from /proc, which is Linux")
    count, height, width = 250, 360, 640
    image = np.broadcast_to(picture(7, height, width), (height, width, 3))
    path = write(
        tmp_path / "big.mp4", count, images=[image] * count, options={"preset": "ultrafast", "x264-params": "threads=1"}
    )
    program = f"""
import av, sys
from pathlib import Path
from runtime.video import load_clip
def peak():
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024
def grown(work):
    Path('/proc/self/clear_refs').write_text('5')
    before = peak()
    result = work()
    return peak() - before
load_clip({str(path)!r}, 2, (8, 8))
print(grown(lambda: load_clip({str(path)!r}, {count}, (8, 8))))
print(grown(lambda: list(av.open({str(path)!r}).decode(video=0))))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_SECONDS,
    )
    ours, everything = map(float, output.stdout.split())
    assert everything > 60  # MiB: 250 frames of 640x360 are 82 MiB as YUV and 165 MiB as RGB
    assert ours < everything / 4


# ------------------------------------------------------------------------------------------- clocks and edit lists


def test_a_clip_of_variable_rate_is_sampled_by_index_and_tells_the_times(tmp_path):
    pts = np.cumsum(np.random.default_rng(0).integers(10, 200, 60)).tolist()  # milliseconds
    clip = load_clip(write(tmp_path / "variable.mkv", 60, pts=pts), 7, SIZE)
    chosen = sample_indices(60, 7)
    assert barcodes(clip.frames) == chosen.tolist()
    assert clip.timestamps == pytest.approx([(pts[index] - pts[0]) / 1000 for index in chosen], abs=2e-3)
    steps = np.diff(clip.timestamps)
    assert steps.max() > 1.2 * steps.min()  # or the rate does not vary


@pytest.mark.parametrize("frames", [6, 45])
def test_frames_that_an_edit_list_cuts_away_are_not_shown(tmp_path, frames, no_full_decode):
    path = write(tmp_path / "edited.mp4", 50)
    # version 0: the edit starts 16 bytes behind the name, in units of 1/12288 second; 512 of them are a frame
    start = struct.unpack(">i", path.read_bytes().split(b"elst")[1][12:16])[0]
    patch(path, b"elst", 12, struct.pack(">i", start + 5 * 512))
    clip = load_clip(path, frames, SIZE)
    assert clip.source_frames == 45
    assert barcodes(clip.frames) == [5 + index for index in sample_indices(45, frames)]
    assert clip.timestamps[0] == 0.0


def test_timestamps_that_run_backwards_are_not_believed(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", 30)
    original = decode.decode_all
    monkeypatch.setattr(decode, "plan", lambda *_: None)
    monkeypatch.setattr(decode, "decode_all", lambda *args: [pts // 1500 % 3 for pts in original(*args)])
    assert load_clip(path, 4, SIZE).timestamps == pytest.approx([0, 9 / 24, 19 / 24, 29 / 24])


def test_one_rotten_time_moves_no_other(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", 30)
    original = decode.decode_all
    monkeypatch.setattr(decode, "plan", lambda *_: None)
    monkeypatch.setattr(decode, "decode_all", lambda *args: [pts + 9000 * (pts == 5120) for pts in original(*args)])
    assert load_clip(path, 4, SIZE).timestamps == pytest.approx([0, 9 / 24, 19 / 24, 29 / 24])


def test_packets_without_different_times_are_decoded_in_order(tmp_path, monkeypatch, full_decodes):
    path = write(tmp_path / "clip.mp4", 30)
    original = load.read_packets

    def lie(source):
        packets = original(source)
        packets.pts[3] = packets.pts[4]
        return packets

    monkeypatch.setattr(load, "read_packets", lie)
    assert barcodes(load_clip(path, 5, SIZE).frames) == sample_indices(30, 5).tolist()
    assert full_decodes


# ------------------------------------------------------------------------------------------ rotation, size, colour

QUARTERS = {  # display matrix (a, b, c, d) -> the image as a person has to see it
    "upright": ((1, 0, 0, 1), lambda image: image),
    "clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "half": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "counterclockwise": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda image: image[::-1]),
    "transposed": ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
    "anti-transposed": ((0, -1, -1, 0), lambda image: np.rot90(image, 2).transpose(1, 0, 2)),
}


def display_matrix(a, b, c, d):
    return np.array([a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30], dtype=np.int32)


@pytest.mark.parametrize("name", QUARTERS)
def test_display_matrix(name):
    matrix, expected = QUARTERS[name]
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(apply_display_matrix(image, display_matrix(*matrix)), expected(image))


def test_a_slightly_tilted_display_matrix_is_the_nearest_quarter_turn():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    tilted = display_matrix(np.cos(1.5), np.sin(1.5), -np.sin(1.5), np.cos(1.5))
    assert np.array_equal(apply_display_matrix(image, tilted), np.rot90(image, -1))


@pytest.mark.parametrize("name", QUARTERS)
def test_a_file_that_asks_for_rotation_gets_it(tmp_path, name):
    matrix, expected = QUARTERS[name]
    path = write(tmp_path / "phone.mp4", 12)
    plain = every_frame(path)[[0, 11]].permute(0, 2, 3, 1).numpy()
    # the track header's matrix: 40 bytes behind its name, then nine numbers of 4 bytes
    patch(path, b"tkhd", 40, display_matrix(*matrix).astype(">i4").tobytes())
    upright = [expected(image) for image in plain]
    clip = load_clip(path, 2, upright[0].shape[:2])
    assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), np.stack(upright))


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write a rotation")
def test_rotation_as_another_program_writes_it(tmp_path):
    """A red corner at the top left of a picture to be turned counterclockwise ends at the bottom left."""
    image = np.full((48, 80, 3), 90, dtype=np.uint8)
    image[:24, :40] = (220, 20, 20)
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24, width=80, height=48, pix_fmt="yuv420p")
        stream.set_display_rotation(90)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    red = load_clip(path, 2, (80, 48)).frames[0, 0] > 150
    assert red[40:, :24].float().mean() > 0.95
    assert red[:40].float().mean() < 0.05


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this FFmpeg cannot write H.264")
def test_a_rotation_that_the_stream_says_once_holds_for_all_frames(tmp_path):
    plain = every_frame(write(tmp_path / "plain.mp4", 12)).permute(0, 2, 3, 1).numpy()
    with av.open(str(tmp_path / "plain.mp4")) as source, av.open(str(tmp_path / "said.mp4"), "w") as target:
        given = source.streams.video[0]
        stream = target.add_stream_from_template(given)
        turn = av.BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", given, stream)
        for packet in source.demux(given):
            for turned in turn.filter(packet if packet.size else None):
                turned.stream = stream
                target.mux(turned)
    clip = load_clip(tmp_path / "said.mp4", 12, (WIDTH, HEIGHT))
    assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), np.rot90(plain, 1, axes=(1, 2)))


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this FFmpeg cannot write H.264")
def test_what_the_stream_crops_on_the_left_is_gone(tmp_path):
    path = write(tmp_path / "crop.mp4", 3, options={"x264-params": "crop-rect=16,4,8,6", "crf": "1"})
    clip = load_clip(path, 3, (HEIGHT - 10, WIDTH - 24))
    wanted = torch.from_numpy(np.stack([picture(index)[4:-6, 16:-8] for index in range(3)])).permute(0, 3, 1, 2)
    assert (clip.frames.float() - wanted.float()).abs().mean() < 3


@pytest.mark.parametrize(("height", "width"), [(47, 33), (17, 101), (16, 16)])
def test_odd_sizes(tmp_path, height, width):
    images = [picture(index, height, width) for index in range(6)]
    path = write(tmp_path / "odd.mkv", 6, codec="ffv1", pix_fmt="bgr0", images=images)
    clip = load_clip(path, 6, (height, width))
    assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), np.stack(images))  # without loss, so exactly
    assert load_clip(path, 3, (31, 57)).frames.shape == (3, 3, 31, 57)


def test_tags_may_be_in_any_encoding(tmp_path):
    """Files of old cameras name themselves in whatever was usual there."""
    path = tmp_path / "old.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Kueche"
        stream = container.add_stream("mpeg4", rate=24, width=64, height=48)
        for index in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index)[:48, :64], format="rgb24")))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    assert content.count(b"Kueche") == 1
    path.write_bytes(content.replace(b"Kueche", b"K\xfcche "))  # Latin-1, as long as before
    assert load_clip(path, 4, (48, 64)).source_frames == 4


def write_colour(path, colour, matrix, full_range, tagged=True):
    image = np.broadcast_to(np.array(colour, dtype=np.uint8), (48, 64, 3)).copy()
    space, swscale = {"601": (6, "itu601"), "709": (1, "itu709"), "2020": (9, "bt2020")}[matrix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, width=64, height=48, pix_fmt="yuv444p", options={"crf": "1"})
        if tagged:
            stream.codec_context.colorspace, stream.codec_context.color_range = space, 2 if full_range else 1
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv444p", dst_colorspace=swscale, dst_color_range="JPEG" if full_range else "MPEG"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this FFmpeg cannot write the colour tags of H.264")
@pytest.mark.parametrize("colour", [(220, 30, 60), (20, 200, 90), (255, 255, 255), (0, 0, 0)])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["601", "709", "2020"])
def test_colours_come_back_whatever_matrix_and_range_the_file_uses(tmp_path, colour, matrix, full_range):
    clip = load_clip(write_colour(tmp_path / "colour.mp4", colour, matrix, full_range), 2, (48, 64))
    assert (clip.frames.float().mean(dim=(0, 2, 3)) - torch.tensor(colour)).abs().max() < 3.5


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this FFmpeg cannot write the colour tags of H.264")
def test_colours_are_wrong_where_the_file_does_not_say_its_matrix(tmp_path):
    """What shows that the test above sees a difference."""
    clip = load_clip(write_colour(tmp_path / "colour.mp4", (20, 200, 90), "2020", False, tagged=False), 2, (48, 64))
    assert (clip.frames.float().mean(dim=(0, 2, 3)) - torch.tensor([20, 200, 90])).abs().max() > 8


# -------------------------------------------------------------------------------------------------------- resizing


def bicubic_weights(source, target):
    """[target, source]: Keys' cubic with a = -0.5, widened where the picture shrinks; written from its definition."""
    scale = source / target
    spread = max(scale, 1.0)
    middle = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source)[None] + 0.5 - middle[:, None]) / spread
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def difference(frames, size, resized):
    """Mean absolute difference to the definition, of 255."""
    rows, columns = bicubic_weights(frames.shape[2], size[0]), bicubic_weights(frames.shape[3], size[1])
    exact = np.einsum("yh,fchw,xw->fcyx", rows, frames.numpy().astype(np.float64), columns).round().clip(0, 255)
    return float(np.abs(exact - resized.numpy()).mean())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(24, 40), (31, 17), (96, 128), (48, 40), (7, 200)])
def test_resize_is_bicubic_with_antialias(size, layout):
    frames = (
        torch.from_numpy(np.stack([picture(i) for i in range(5)])).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    )
    resized = resize_frames(frames, size)
    assert resized.shape == (5, 3, *size)
    assert resized.dtype == torch.uint8
    assert difference(frames, size, resized) < 0.5


@pytest.mark.parametrize("other", [{"mode": "bicubic"}, {"mode": "bilinear", "antialias": True}])
def test_other_ways_to_resize_would_be_noticed(other):
    frames = torch.from_numpy(np.stack([picture(i) for i in range(5)])).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(frames.float(), (17, 23), **other).round().clamp(0, 255)
    assert difference(frames, (17, 23), resized) > 1


def test_frames_of_the_right_size_stay_as_they_are():
    frames = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    assert torch.equal(resize_frames(frames, (9, 7)), frames)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_frame_is_resized_by_itself(layout):
    frames = torch.randint(0, 256, (4, 3, 30, 50), dtype=torch.uint8).contiguous(memory_format=layout)
    alone = torch.cat([resize_frames(frame[None], (16, 16)) for frame in frames])
    assert torch.equal(resize_frames(frames, (16, 16)), alone)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_resize_refuses_what_is_no_rgb(frames):
    with pytest.raises(UserError, match=r"uint8 \[F, 3, height, width\]"):
        resize_frames(frames, (4, 4))


# ----------------------------------------------------------------------------------------------- frames from outside


def pixels(count=10):
    return np.stack([picture(index) for index in range(count)])  # [n, h, w, 3]


@pytest.mark.parametrize(
    "given",
    [
        pixels(),
        pixels().transpose(0, 3, 1, 2),
        torch.from_numpy(pixels()),
        torch.from_numpy(pixels()).permute(0, 3, 1, 2).contiguous(),
        pixels()[::-1].copy()[::-1],  # negative strides
    ],
    ids=["numpy last", "numpy first", "torch last", "torch first", "numpy reversed"],
)
def test_frames_from_outside_are_sampled_and_resized_alike(given):
    clip = clip_from_frames(given, 4, (24, 40))
    expected = torch.from_numpy(pixels()[[0, 3, 6, 9]]).permute(0, 3, 1, 2)
    assert torch.equal(clip.frames, resize_frames(expected.contiguous(memory_format=torch.channels_last), (24, 40)))
    assert clip.frames.is_contiguous()
    assert barcodes(clip.frames) == [0, 3, 6, 9]
    assert (clip.source_frames, clip.timestamps, clip.duration, clip.decode_seconds) == (10, (), 0.0, 0.0)


def test_frames_from_outside_get_times_from_their_rate():
    clip = clip_from_frames(pixels(), 4, SIZE, fps=5)
    assert clip.timestamps == pytest.approx((0, 0.6, 1.2, 1.8))
    assert clip.duration == pytest.approx(2)


def test_the_clip_keeps_no_hold_on_the_callers_frames():
    given = pixels()
    clip = clip_from_frames(given, 10, SIZE)
    given[:] = 0
    assert barcodes(clip.frames) == list(range(10))


def test_the_same_frames_from_file_and_from_memory_give_the_same_clip(tmp_path):
    path = write(tmp_path / "lossless.mkv", 10, codec="ffv1", pix_fmt="bgr0")
    assert torch.equal(load_clip(path, 4, (24, 40)).frames, clip_from_frames(pixels(), 4, (24, 40)).frames)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (pixels().astype(np.float32), "float32"),
        (np.full((4, 3, 8, 8), np.nan), "float64"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.float16), "float16"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.int64), "int64"),
        (np.zeros((4, 8, 8), np.uint8), r"\[4, 8, 8\]"),
        (np.zeros((4, 4, 8, 8), np.uint8), r"\[4, 4, 8, 8\]"),
        (np.zeros((4, 3, 0, 8), np.uint8), r"\[4, 3, 0, 8\]"),
        (np.zeros((1, 3, 8, 8), np.uint8), "1 frame; a video has at least 2"),
        (np.zeros((0, 3, 8, 8), np.uint8), r"\[0, 3, 8, 8\]"),
        ({0: picture(0)}, "dict"),
    ],
)
def test_bad_frames_from_outside(given, message):
    with pytest.raises(UserError, match=message) as caught:
        clip_from_frames(given, 4, SIZE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_bad_rate(fps):
    with pytest.raises(UserError, match="frames per second"):
        clip_from_frames(pixels(), 4, SIZE, fps=fps)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("frames", [0, -3, 2.5, True, None, "8"])
def test_bad_number_of_frames(tmp_path, frames):
    path = write(tmp_path / "clip.mp4", 4)
    with pytest.raises(UserError, match="frames is"):
        load_clip(path, frames, SIZE)


@pytest.mark.parametrize("size", [(0, 8), (8, -1), (8,), (8, 8, 3), (8.0, 8.0)])
def test_bad_size(tmp_path, size):
    path = write(tmp_path / "clip.mp4", 4)
    with pytest.raises(UserError, match="size is"):
        load_clip(path, 2, size)


def refused(path):
    """The line that refuses this file."""
    with pytest.raises(VideoError) as caught:
        load_clip(path, 4, SIZE)
    line = str(caught.value)
    assert "\n" not in line
    assert repr(os.fspath(path)) in line
    assert ";" in line  # and what to do about it
    return line


def test_no_such_file(tmp_path):
    assert "No such file" in refused(tmp_path / "none.mp4")


def test_a_name_that_no_file_can_have():
    assert "not a valid name" in refused("a\0b.mp4")


def test_a_folder(tmp_path):
    assert "is a folder" in refused(tmp_path)


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.mp4").touch()
    assert "empty" in refused(tmp_path / "empty.mp4")


def test_a_text_file_called_mp4(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("This is not a video.\n" * 500)
    assert "cannot be read as a video" in refused(path)


def test_a_text_file_that_ffmpeg_would_draw(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("This is not a video.\n" * 500)
    assert "text file" in refused(path)


def test_noise_called_mp4(tmp_path):
    path = tmp_path / "noise.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(50_000))
    assert "cannot be read as a video" in refused(path)


def test_a_clip_of_one_frame(tmp_path):
    assert "1 frame" in refused(write(tmp_path / "one.mp4", 1))


def test_a_still_picture(tmp_path):
    assert "1 frame" in refused(write(tmp_path / "still.png", 1, codec="png", pix_fmt="rgb24", update="1"))


def test_an_animated_webp_is_not_called_a_still_picture(tmp_path):
    path = tmp_path / "a.webp"
    path.write_bytes(b"RIFF\x80\0\0\0WEBPVP8X\x0a\0\0\0\x02" + bytes(9) + b"ANIM\x06\0\0\0" + bytes(90))
    assert "is an animated WebP" in refused(path)


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this FFmpeg cannot write H.264")
def test_an_encrypted_file(tmp_path):
    keys = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76" * 16, "encryption_kid": "a7" * 16}
    assert "is encrypted; give a copy" in refused(write(tmp_path / "bought.mp4", 6, **keys))


@pytest.mark.parametrize(("name", "first"), [("preview.ts", (24, 40)), ("picture.mp4", (96, 160))])
def test_of_several_streams_the_largest_that_moves_is_shown(tmp_path, name, first):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        sizes = [first, (48, 80)]
        for height, width in sizes:
            stream = container.add_stream("mpeg4", rate=24, width=width, height=height, pix_fmt="yuv420p")
            stream.codec_context.bit_rate = 2_000_000
        for stream, (height, width) in zip(container.streams.video, sizes, strict=True):
            for index in range(1 if height == 96 else 6):
                image = picture(index + 100 * (height != 48), height, width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
    assert barcodes(load_clip(path, 6, SIZE).frames) == list(range(6))


def test_sound_only(tmp_path):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16_000))
    assert "no video stream" in refused(path)


def test_sound_with_a_cover(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg", rate=1, width=64, height=48, pix_fmt="yuvj420p")
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        image = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        for stream, frame in ((cover, image), (sound, silence)):
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert "no video stream" in refused(path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("index last.mp4", {}),
        ("index first.mp4", {"movflags": "faststart"}),
        ("clip.mkv", {}),
        ("clip.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
        ("clip.flv", {}),
        ("clip.avi", {"codec": "mpeg4", "options": {"b": "2M"}}),
    ],
)
def test_a_file_that_was_cut_off(tmp_path, name, options):
    path = write(tmp_path / name, 100, **options)
    assert load_clip(path, 4, SIZE).source_frames == 100
    whole = path.read_bytes()
    for share in (0.3, 0.75):
        path.write_bytes(whole[: int(share * len(whole))])
        assert "is cut off" in refused(path)


def test_a_file_cut_between_two_packets(tmp_path):
    path = write(tmp_path / "clip.mp4", 100, movflags="faststart")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: packets[70].pos])
    assert "is cut off" in refused(path)


def test_a_recording_without_a_length_is_used_as_far_as_it_goes(tmp_path):
    path = write(tmp_path / "live.ts", 100)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    clip = load_clip(path, 4, SIZE)
    assert 40 < clip.source_frames < 100
    assert barcodes(clip.frames)[0] == 0


@pytest.mark.parametrize(
    ("name", "left", "written"),
    [
        ("a.gif", 0.5, {"codec": "gif", "pix_fmt": "rgb8"}),
        ("a.mjpeg", 0.5, {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("a.ivf", 0.5, {"codec": "libvpx", "options": {"deadline": "realtime"}}),
        ("a.nut", 0.1, {}),  # the decoder refuses it, and may have others on their way
        ("a.apng", 0.5, {"codec": "apng", "pix_fmt": "rgb24"}),  # the format refuses it
    ],
)
def test_a_torn_last_picture_is_left_out_and_no_other(tmp_path, name, left, written):
    path = write(tmp_path / name, 20, **written)
    whole = load_clip(path, 20, SIZE)
    assert whole.source_frames == 20
    with av.open(str(path)) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][-1]
    path.write_bytes(path.read_bytes()[: last.pos + int(left * last.size)])
    torn = load_clip(path, 19, SIZE)
    assert torn.source_frames == 19
    assert torch.equal(torn.frames, whole.frames[:19])


def test_sound_longer_than_the_picture_is_not_a_cut(tmp_path):
    path = tmp_path / "long sound.mkv"
    with av.open(str(path), "w") as container:
        moving = container.add_stream("mpeg4", rate=24, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for index in range(24):
            container.mux(moving.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
        container.mux(moving.encode(None))
        for second in range(4):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            silence.rate, silence.pts = 8000, 8000 * second
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    clip = load_clip(path, 4, SIZE)
    assert clip.source_frames == 24
    assert clip.duration == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["a:b.mp4", "concat:x|y.mp4", "snow ☃ %03d.mp4", "two\nlines.mp4"])
def test_unusual_names(tmp_path, name):
    path = write(tmp_path / "plain.mp4", 6).rename(tmp_path / name)
    assert barcodes(load_clip(path, 2, SIZE).frames) == [0, 5]
    path.write_text("no video")
    refused(path)


def test_a_relative_name_with_a_colon(tmp_path, monkeypatch):
    write(tmp_path / "plain.mp4", 6).rename(tmp_path / "http:clip.mp4")
    monkeypatch.chdir(tmp_path)
    assert barcodes(load_clip("http:clip.mp4", 2, SIZE).frames) == [0, 5]


# ------------------------------------------------------------------------------------- the model's own video processor


@pytest.fixture(scope="module")
def drawn_frames(drawn_clip):
    """uint8 [16, 3, 240, 320]: frames of the demo's clip as they are."""
    return load_clip(drawn_clip, 16, (240, 320)).frames


def processor_resize(frames, size):
    """What transformers' video processor documents, torchvision's resize of uint8: widen, resize, round, clamp."""
    wide = torch.nn.functional.interpolate(frames.float(), size, mode="bicubic", align_corners=False, antialias=True)
    return wide.round().clamp(0, 255)


def pillow_resize(frames, size):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    height, width = size
    resized = [
        np.asarray(image.fromarray(frame).resize((width, height), image.Resampling.BICUBIC))
        for frame in frames.permute(0, 2, 3, 1).numpy()
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float()


def mean_difference(a, b):
    return float((a.float() - b.float()).abs().mean())


@pytest.mark.parametrize("reference", [processor_resize, pillow_resize])
@pytest.mark.parametrize("size", [(72, 72), (384, 384)])
def test_resizing_matches_the_models_own_processor(drawn_frames, reference, size):
    """Within 1 of 255 on average, on real frames; the processor itself needs torchvision."""
    assert mean_difference(resize_frames(drawn_frames, size), reference(drawn_frames, size)) < 0.5
    bilinear = torch.nn.functional.interpolate(drawn_frames.float(), size, mode="bilinear", antialias=True)
    coarse = torch.nn.functional.interpolate(drawn_frames.float(), size, mode="bicubic")
    shifted = reference(drawn_frames.roll(1, dims=3), size)
    least = min(mean_difference(other, reference(drawn_frames, size)) for other in (bilinear, coarse, shifted))
    assert least > mean_difference(resize_frames(drawn_frames, size), reference(drawn_frames, size))


@pytest.mark.parametrize("size", [(72, 72), (384, 384), (240, 320)])
def test_resizing_without_a_kernel_for_uint8(drawn_frames, size):
    """What runs on a GPU: the same within 1 of 255 on average, and of any number of frames at a time."""
    wide = resize_in_float(drawn_frames, size)
    assert wide.dtype == torch.uint8
    assert wide.shape == (16, 3, *size)
    assert mean_difference(wide, resize_frames(drawn_frames, size)) < 0.5
    assert torch.equal(wide, processor_resize(drawn_frames, size).to(torch.uint8))
    assert torch.equal(resize_in_float(drawn_frames[3:4], size), wide[3:4])


def test_overshoot_is_clamped():
    """Bicubic overshoots at an edge of black and white: without the clamp, 255 and more would wrap round to black."""
    edge = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    edge[..., 20:] = 255
    wide = resize_in_float(edge, (60, 60))
    assert mean_difference(wide, resize_frames(edge, (60, 60))) < 1
    assert (wide[..., 45:] == 255).all()


def test_frames_are_resized_where_they_are_asked_to_be(drawn_frames):
    assert torch.equal(resize_frames(drawn_frames, (72, 72), "cpu"), resize_frames(drawn_frames, (72, 72)))
    assert resize_frames(drawn_frames[:2], (240, 320), "meta").device.type == "meta"
    assert resize_frames(drawn_frames[:2], (72, 72), "meta").shape == (2, 3, 72, 72)
    clip = clip_from_frames(drawn_frames, 4, (72, 72), device="meta")
    assert (clip.frames.device.type, clip.frames.dtype) == ("meta", torch.uint8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_resizing_on_a_gpu(drawn_frames):
    for size in ((72, 72), (384, 384)):
        resized = resize_frames(drawn_frames, size, "cuda")
        assert resized.is_cuda
        assert mean_difference(resized.cpu(), resize_frames(drawn_frames, size)) < 1
        assert torch.equal(resize_frames(drawn_frames[2:3], size, "cuda"), resized[2:3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("frames", [8, 400])
def test_a_file_resized_on_a_gpu(drawn_clip, frames):
    there, here = (load_clip(drawn_clip, frames, (72, 72), device=device) for device in ("cuda", "cpu"))
    assert there.frames.is_cuda
    assert there.timestamps == here.timestamps
    assert mean_difference(there.frames.cpu(), here.frames) < 1


def test_an_array_that_is_read_only_is_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    want = clip_from_frames(pixels, 4, (8, 8)).frames
    pixels.flags.writeable = False
    assert torch.equal(clip_from_frames(pixels, 4, (8, 8)).frames, want)
    assert not list(recwarn)
