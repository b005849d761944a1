"""What callers hand over as a video: taken in every form that web frameworks have it in, or refused with the remedy."""

from __future__ import annotations

import array
import gc
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from earlytom.errors import UserError
from runtime.errors import VideoError
from runtime.video import Clip, Limits, Spooled, clip_from_frames, load_clip, take_video
from runtime.video.frames import resize_frames

CASES = Path(__file__).parents[2] / "cases" / "video"
VIDEO = CASES / "seg1.mkv"
SIZE = (36, 64)
CONTENT = VIDEO.read_bytes()


class Named:
    """An os.PathLike that is no Path."""

    def __init__(self, path: str | bytes) -> None:
        self.path = path

    def __fspath__(self) -> str | bytes:
        return self.path


class Reader:
    """A file object with nothing but read, which gives a few bytes at a time."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.left = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self.left.read(min(size, 1000))


def spooled_file() -> Any:
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115 - as a web framework hands it over
    file.write(CONTENT)
    file.seek(0)
    return file


def zipped() -> Any:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("a.mkv", CONTENT)
    return zipfile.ZipFile(memory).open("a.mkv")


FORMS: dict[str, Any] = {
    "str": lambda: str(VIDEO),
    "Path": lambda: VIDEO,
    "PathLike": lambda: Named(str(VIDEO)),
    "PathLike of bytes": lambda: Named(os.fsencode(VIDEO)),
    "bytes": lambda: CONTENT,
    "bytearray": lambda: bytearray(CONTENT),
    "memoryview": lambda: memoryview(CONTENT),
    "memoryview with steps": lambda: memoryview(bytes(byte for byte in CONTENT for _ in range(2)))[::2],
    "array": lambda: memoryview(array.array("B", CONTENT)),
    "BytesIO": lambda: io.BytesIO(CONTENT),
    "open file": lambda: VIDEO.open("rb"),
    "unbuffered": lambda: VIDEO.open("rb", buffering=0),
    "SpooledTemporaryFile": spooled_file,
    "in an archive": zipped,
    "only read": Reader,
    "Spooled": lambda: take_video(CONTENT),
    "name in the open files": lambda: f"/proc/self/fd/{os.open(VIDEO, os.O_RDONLY)}",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_clip(form: str) -> None:
    if "open files" in form and not Path("/proc/self/fd").is_dir():
        pytest.skip("only Linux has these")
    wanted = load_clip(VIDEO, 4, SIZE)
    taken = take_video(FORMS[form]())
    assert isinstance(taken, Path | Spooled)
    for clip in (load_clip(FORMS[form](), 4, SIZE), load_clip(taken, 4, SIZE), load_clip(taken, 4, SIZE)):
        assert torch.equal(clip.frames, wanted.frames)
        assert clip.timestamps == wanted.timestamps


def test_a_file_is_read_from_where_it_stands() -> None:
    file = io.BytesIO(b"a header of the caller's" + CONTENT)
    file.seek(24)
    assert load_clip(file, 4, SIZE).source_frames == 24
    with pytest.raises(VideoError, match=r"nothing to read.*seek\(0\)"):
        take_video(file)


def test_content_is_copied_to_a_file_that_goes_when_it_is_let_go() -> None:
    buffer = bytearray(CONTENT)
    taken = take_video(buffer)
    assert isinstance(taken, Spooled)
    buffer[:] = bytes(len(buffer))  # the caller goes on using it
    assert load_clip(taken, 4, SIZE).source_frames == 24
    assert "bytes" in repr(taken)
    path = Path(taken.path)
    assert path.stat().st_size == taken.size == len(CONTENT)
    if Path("/proc/self/fd").is_dir():
        assert path.stat().st_nlink == 0  # no name: gone even after a crash
    del taken
    gc.collect()
    assert not path.exists()


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9:1 %03d.mkv")
    try:
        with open(name, "wb") as file:
            file.write(CONTENT)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    assert load_clip(Named(name), 4, SIZE).source_frames == 24
    assert load_clip(os.fsdecode(name), 4, SIZE).source_frames == 24
    with open(name, "wb") as file:
        file.write(b"no video")
    with pytest.raises(VideoError) as caught:
        load_clip(Named(name), 4, SIZE)
    str(caught.value).encode()  # it can be printed


class Asynchronous:
    async def read(self, size: int = -1) -> bytes:
        return CONTENT


class Closed:
    closed = True

    def read(self, size: int = -1) -> bytes:
        raise AssertionError


class Silent:
    def read(self, size: int = -1) -> None:
        return None


class Broken:
    def read(self, size: int = -1) -> bytes:
        raise OSError("the line\nis dead")


REFUSED: dict[str, tuple[Any, str]] = {
    "None": (lambda: None, "is None; give the path"),
    "a number": (lambda: 3, r"is 3 \(int\); give the path"),
    "a float": (lambda: 1.5, "float"),
    "True": (lambda: True, "bool"),
    "a dict": (lambda: {"video": "a.mp4"}, "dict"),
    "a set": (lambda: {1}, "set"),
    "a generator": (lambda: (frame for frame in ()), "generator"),
    "no name": (lambda: "", "give the path"),
    "no name as PathLike": (lambda: Named(""), "give the path"),
    "a folder": (lambda: CASES, "is a folder or a device"),
    "a device": (lambda: "/dev/zero", "is a folder or a device"),
    "missing": (lambda: "no such.mp4", "No such file"),
    "http": (lambda: "http://example.org/a.mp4", "is an address, which is not fetched; download it"),
    "https in capitals": (lambda: "HTTPS://example.org/a.mp4", "download it"),
    "http as a Path": (lambda: Path("http://example.org/a.mp4"), "download it"),
    "rtsp": (lambda: "rtsp://camera/1", "download it"),
    "s3": (lambda: "s3://bucket/a.mp4", "download it"),
    "file": (lambda: f"file://{VIDEO}", "without file://"),
    "file as a Path": (lambda: Path(f"file://{VIDEO}"), "without file://"),
    "data": (lambda: "data:video/mp4;base64,AAAA", "save what it holds"),
    "long data": (lambda: "data:video/mp4;base64," + "A" * 100_000, "save what it holds"),
    "no bytes": (lambda: b"", "is empty"),
    "a path as bytes": (lambda: os.fsencode(VIDEO), "give its path as a str"),
    "bytes that are no video": (lambda: b"hello" * 20, "the video given as bytes cannot be read as a video"),
    "an empty file object": (lambda: io.BytesIO(), "nothing to read"),
    "text": (lambda: io.StringIO("text"), "binary mode"),
    "a file opened as text": (lambda: open(__file__), "binary mode"),  # noqa: SIM115
    "a closed file": (Closed, "closed"),
    "a file read in part": (
        lambda: [f := io.BytesIO(CONTENT), f.seek(100)][0],
        "BytesIO from byte 100 on cannot be read",
    ),
    "an asynchronous file": (Asynchronous, "await its read"),
    "a file that does not wait": (Silent, "no bytes yet"),
    "a file that fails": (Broken, "cannot be read"),
    "an empty list": (list, "an empty list of frames"),
    "a list of names": (lambda: ["a.png", "b.png"], r"frame 0 is 'a.png' \(str\); give each frame"),
    "a list of numbers": (lambda: [1, 2], r"frame 0 is 1 \(int\)"),
    "a list of bytes": (lambda: [b"\xff\xd8", b"\xff\xd8"], "frame 0 is b"),
    "one frame": (lambda: [np.zeros((8, 8, 3), np.uint8)], "1 frame"),
    "frames of two sizes": (
        lambda: [np.zeros((8, 9, 3), np.uint8), np.zeros((8, 7, 3), np.uint8)],
        "frame 0 is 9x8 and frame 1 is 7x8; give frames of one size",
    ),
    "frames in float": (lambda: [np.zeros((8, 8, 3))] * 2, "float64"),
    "frames without colours": (lambda: [np.zeros((8, 8), np.uint8)] * 2, r"frame 0 is uint8 \[8, 8\]"),
    "frames of four colours": (lambda: [np.zeros((8, 8, 4), np.uint8)] * 2, r"\[8, 8, 4\]"),
    "batches": (lambda: [np.zeros((2, 8, 8, 3), np.uint8)] * 2, "frame 0"),
    "a sparse tensor": (lambda: torch.zeros(4, 3, 8, 8, dtype=torch.uint8).to_sparse(), "sparse"),
    "a meta tensor": (lambda: torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device="meta"), "meta"),
    "a quantised tensor": (
        lambda: torch.quantize_per_tensor(torch.zeros(4, 3, 8, 8), 1.0, 0, torch.quint8),
        "quantised",
    ),
    "a nested tensor": (lambda: torch.nested.nested_tensor([torch.zeros(3, 8, 8), torch.zeros(3, 4, 4)]), "nested"),
    "a conjugated tensor": (lambda: torch.zeros(4, 3, 8, 8, dtype=torch.complex64).conj(), "conjugates"),
    "a masked array": (lambda: np.ma.masked_all((4, 8, 8, 3), np.uint8), "masked"),
    "an array of objects": (lambda: np.full((4, 8, 8, 3), None), "object"),
    "an array of text": (lambda: np.full((4, 8, 8, 3), "a"), "<U1"),
    "an array of records": (lambda: np.zeros((4, 8, 8, 3), [("r", np.uint8)]), "array of"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_video_is_refused_in_one_line_with_the_remedy(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(UserError, match=message) as caught:
        load_clip(take_video(make()), 4, SIZE)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700
    with pytest.raises(UserError, match=message):
        load_clip(make(), 4, SIZE)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(CONTENT)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(VideoError, match="Permission denied"):
        load_clip(path, 4, SIZE)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="is a folder or a device"):
        take_video(tmp_path / "pipe.mp4")


def test_a_file_of_the_name_of_an_address_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:").mkdir()
    (tmp_path / "http:" / "a.mkv").write_bytes(CONTENT)
    assert load_clip("http://a.mkv", 4, SIZE).source_frames == 24


def test_what_is_ready_is_passed_on() -> None:
    clip = load_clip(VIDEO, 4, SIZE)
    assert take_video(clip) is clip
    assert isinstance(clip, Clip)
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    assert take_video(pixels) is pixels
    tensor = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    assert take_video(tensor) is tensor
    with pytest.raises(UserError, match="clip_from_frames"):
        load_clip(tensor, 4, SIZE)


def test_lists_of_frames_are_stacked() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), np.uint8)
    wanted = clip_from_frames(images, 4, (10, 12)).frames
    lists: list[Any] = [
        list(images),
        tuple(images),
        list(images.transpose(0, 3, 1, 2)),
        list(torch.from_numpy(images)),
        list(torch.from_numpy(images).permute(0, 3, 1, 2)),
        [images[0], torch.from_numpy(images[1]), *images[2:].transpose(0, 3, 1, 2)],
    ]
    for given in lists:
        taken = take_video(given)
        assert isinstance(taken, torch.Tensor)
        assert taken.shape == (6, 3, 20, 30)
        assert torch.equal(clip_from_frames(taken, 4, (10, 12)).frames, wanted)
        assert torch.equal(clip_from_frames(given, 4, (10, 12)).frames, wanted)


def test_pictures_of_pillow_are_frames() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), np.uint8)
    taken = take_video([image.fromarray(frame) for frame in pixels])
    assert np.array_equal(taken, pixels.transpose(0, 3, 1, 2))
    grey = take_video([image.fromarray(frame[..., 0]) for frame in pixels])
    assert np.array_equal(grey[:, 1], pixels[..., 0])  # type: ignore[call-overload]
    with pytest.raises(UserError, match="frame 0 is an image of mode I;16, values not 0 to 255"):
        take_video([image.fromarray(frame[..., 0].astype(np.uint16) * 257) for frame in pixels])
    operations = pytest.importorskip("PIL.ImageOps", reason="Pillow is not installed")
    for orientation in range(1, 9):  # of a camera that was held in every way
        held = [image.fromarray(frame) for frame in pixels]
        for one in held:
            one.getexif()[0x0112] = orientation
        upright = np.stack([np.asarray(operations.exif_transpose(one)) for one in held])
        assert np.array_equal(take_video(held), upright.transpose(0, 3, 1, 2))


def test_odd_views_of_frames_are_taken_as_they_are() -> None:
    frame = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(clip_from_frames(frame.expand(5, -1, -1, -1), 2, (8, 8)).frames, frame.repeat(2, 1, 1, 1))
    subclass = torch.nn.Parameter(frame.repeat(4, 1, 1, 1), requires_grad=False)
    assert torch.equal(clip_from_frames(subclass, 2, (4, 4)).frames, resize_frames(frame.repeat(2, 1, 1, 1), (4, 4)))


@pytest.mark.parametrize("form", ["Path", "bytes", "BytesIO", "only read"])
def test_the_limit_on_bytes_holds_while_content_is_copied(form: str) -> None:
    with pytest.raises(VideoError, match="more than 1000 bytes"):
        take_video(FORMS[form](), Limits(max_bytes=1000))

    class Endless:
        def read(self, size: int = -1) -> bytes:
            return bytes(size)

    with pytest.raises(VideoError, match="more than 100000000 bytes"):
        take_video(Endless(), Limits(max_bytes=10**8))


def test_a_check_ends_the_copying() -> None:
    calls = 0

    class Endless:
        def read(self, size: int = -1) -> bytes:
            return bytes(1000)

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise KeyError("over")

    with pytest.raises(KeyError, match="over"):
        load_clip(Endless(), 4, SIZE, check=check)
    assert calls == 21
