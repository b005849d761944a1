"""The drawn clip: the same every time, three scenes as promised, and never half a file."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from earlytom.errors import UserError
from earlytom.micro.data import labelled_clip
from runtime import clip
from runtime.cli import run
from runtime.drawing import clips, scenes
from runtime.drawing.clips import draw_clip, draw_frames, write_test_clip
from runtime.errors import VideoError
from runtime.video import load_clip
from tests.processes import HANG_SECONDS


def changes(frames):
    """Mean absolute difference of each frame to the next, of 255: [n - 1]."""
    return np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))


def test_frames_are_the_same_every_time_and_differ_by_seed():
    frames = draw_frames(6, 48, 64, seed=3)
    assert frames.shape == (6, 3, 48, 64)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, draw_frames(6, 48, 64, seed=3))
    assert (frames != draw_frames(6, 48, 64, seed=4)).mean() > 0.5


@pytest.mark.parametrize("seed", range(5))
def test_three_scenes_with_cuts_between(seed):
    steps = changes(draw_frames(48, 96, 128, seed))
    assert sorted(np.argsort(steps)[-2:].tolist()) == [15, 31]
    moving, still, turning = steps[:15], steps[16:31], steps[32:]
    assert steps[[15, 31]].min() > 2 * moving.max()
    assert still.max() < moving.min() / 2
    assert still.max() < turning.min()
    assert still.min() > 1  # no two frames are equal: the sensor is noisy


def test_still_scene_moves_somewhere_and_moving_scene_everywhere():
    frames = draw_frames(48, 96, 128).astype(np.float32)
    moved = np.abs(frames[[8, 21]] - frames[[5, 18]]).mean(axis=1) > 5 * scenes.NOISE  # [2, h, w]
    assert moved[0].mean() > 0.25
    assert 0.0005 < moved[1].mean() < 0.05


def test_frames_have_texture_and_colour():
    frames = draw_frames(12, 96, 128).astype(np.float32)
    assert (np.ptp(frames, axis=1).mean(axis=(1, 2)) > 10 * scenes.NOISE).all()  # the channels differ
    assert (frames.mean(axis=1).std(axis=(1, 2)) > 5 * scenes.NOISE).all()


def test_a_few_frames_sample_the_same_clip_as_many():
    few, many = draw_frames(6, 48, 64), draw_frames(18, 48, 64)
    middles = many[1::3]  # the middle of each third of a sixth is the same moment
    assert np.abs(few.astype(int) - middles).mean() < 2 * scenes.NOISE
    assert np.abs(few.astype(int) - many[[4, 7, 10, 13, 16, 1]]).mean() > 10


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 200), (200, 7), (33, 31)])
def test_any_shape_can_be_drawn(height, width):
    assert draw_frames(3, height, width).shape == (3, 3, height, width)


@pytest.mark.parametrize("arguments", [(0, 8, 8), (-1, 8, 8), (3, 0, 8), (3, 8, -2), (3, 8, 8, -1)])
def test_what_cannot_be_drawn(arguments):
    with pytest.raises(UserError, match="give a"):
        draw_frames(*arguments)


def test_the_clip_is_a_video_of_these_frames(tmp_path):
    path = draw_clip(tmp_path / "clip.mp4", seconds=2, fps=12, size=(96, 128), seed=5)
    assert path == tmp_path / "clip.mp4"
    loaded = load_clip(path, 24, (96, 128))
    assert loaded.source_frames == 24
    assert loaded.duration == pytest.approx(2)
    drawn = draw_frames(24, 96, 128, seed=5)
    error = np.abs(loaded.frames.numpy().astype(int) - drawn).mean()
    assert error < 6
    assert error < np.abs(loaded.frames.numpy()[:-1].astype(int) - drawn[1:]).mean() / 2  # frame by frame
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_content_of_the_clip_is_the_same_every_time(tmp_path):
    first, second = (load_clip(draw_clip(tmp_path / name, 1), 5, (48, 64)) for name in ("a.mp4", "b.mp4"))
    assert first.frames.equal(second.frames)
    assert not first.frames.equal(load_clip(draw_clip(tmp_path / "c.mp4", 1, seed=1), 5, (48, 64)).frames)


def test_defaults_are_six_seconds_at_24_frames(tmp_path):
    with av.open(str(draw_clip(tmp_path / "clip.mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height) == (144, 320, 240)


def test_mpeg4_where_there_is_no_h264(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "_ENCODERS", {"no such encoder": {}, "mpeg4": clips._ENCODERS["mpeg4"]})
    path = draw_clip(tmp_path / "clip.mp4", 1, size=(96, 128))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    drawn = draw_frames(24, 96, 128)
    assert np.abs(load_clip(path, 24, (96, 128)).frames.numpy().astype(int) - drawn).mean() < 6


def test_no_encoder_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "_ENCODERS", {"no such encoder": {}})
    with pytest.raises(VideoError, match="without an encoder"):
        draw_clip(tmp_path / "clip.mp4", 1)
    assert not list(tmp_path.iterdir())


def test_an_older_file_is_replaced(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    assert load_clip(draw_clip(path, 1, size=(32, 32)), 2, (8, 8)).source_frames == 24


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_nothing_half_written_stays(tmp_path, monkeypatch, failure):
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    drawn = clips._frames(144, 32, 32, 0)  # more than the encoder holds back
    seen = []

    def break_off(*_):
        for index, frame in enumerate(drawn):
            if index == 130:
                seen.extend(file.name for file in tmp_path.iterdir())
                raise failure
            yield frame

    monkeypatch.setattr(clips, "_frames", break_off)
    with pytest.raises(type(failure)) as caught:
        draw_clip(path, 6, size=(32, 32))
    assert len(seen) == 2  # it was being written, beside the old one
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_text() == "old"
    if isinstance(failure, OSError):
        assert caught.value.errno == 28
        assert caught.value.filename == str(path)  # the name the caller knows, not the temporary one


@pytest.mark.parametrize(
    "arguments",
    [
        {"seconds": 0},
        {"seconds": -1},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": 0.01},
        {"fps": 0},
        {"size": (240, 321)},
        {"size": (8, 320)},
        {"size": (0, 0)},
        {"seed": -1},
    ],
)
def test_a_clip_that_cannot_be(tmp_path, arguments):
    with pytest.raises(UserError) as caught:
        draw_clip(tmp_path / "clip.mp4", **arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_no_such_folder(tmp_path):
    with pytest.raises(VideoError, match="folder that does not exist"):
        draw_clip(tmp_path / "none" / "clip.mp4", 1)


def test_the_target_is_a_folder(tmp_path):
    with pytest.raises(VideoError, match="is a folder"):
        draw_clip(tmp_path, 1)


# ---------------------------------------------------------------------------------------------------- command line


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "runtime.clip", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(clip.__file__).parents[1],
        timeout=HANG_SECONDS,
    )


def test_command(tmp_path):
    done = command(tmp_path / "clip.mp4", "--seconds", 1, "--fps", 10, "--size", "64x48", "--seed", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "64x48" in done.stdout
    loaded = load_clip(tmp_path / "clip.mp4", 10, (48, 64))
    drawn = draw_frames(10, 48, 64, seed=2)
    assert loaded.source_frames == 10
    assert np.abs(loaded.frames.numpy().astype(int) - drawn).mean() < 8


def test_command_helps():
    done = command("--help")
    assert done.returncode == 0
    assert "--seconds" in done.stdout


def test_command_with_a_bad_target(tmp_path):
    done = command(tmp_path / "none" / "clip.mp4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--size", "64"], "WIDTHxHEIGHT"), (["--size", "axb"], "WIDTHxHEIGHT"), (["--fps", "fast"], "--fps")],
)
def test_command_with_bad_flags(tmp_path, capsys, arguments, message):
    assert run(clip.main, [str(tmp_path / "clip.mp4"), *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert message in line


def test_command_on_a_full_disk(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clips.os, "replace", full)
    assert run(clip.main, [str(tmp_path / "clip.mp4"), "--seconds", "1", "--size", "32x32"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert "no space" in line
    assert str(tmp_path / "clip.mp4") in line
    assert not list(tmp_path.iterdir())


def test_a_test_clip_comes_back_frame_by_frame(tmp_path):
    path, asked = write_test_clip(tmp_path / "clip.mp4", 3)
    shown, other = (labelled_clip("test", index) for index in (3, 4))
    read = load_clip(path, 16, (72, 72)).frames.numpy().astype(np.float32)
    assert asked == shown.questions
    assert np.abs(read - shown.frames).mean() < 8  # what encoding and colour subsampling take away
    assert np.abs(read - other.frames).mean() > 16
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_plain_file_is_replaced(tmp_path):
    pipe, plain = tmp_path / "pipe.mp4", tmp_path / "plain.mp4"
    os.mkfifo(pipe)
    plain.write_text("what was there")
    with pytest.raises(VideoError, match=r"pipe\.mp4' is a device or a pipe"):
        draw_clip(pipe, 1, 4, (32, 32))
    assert pipe.is_fifo()
    assert draw_clip(plain, 1, 4, (32, 32)).stat().st_size > 100
    assert sorted(tmp_path.iterdir()) == [pipe, plain]


def test_a_size_that_memory_does_not_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"100000x100000.*16 to 8192"):
        draw_clip(tmp_path / "clip.mp4", 1, 4, (100000, 100000))
