"""Decoding in a process of its own, and what happens to that process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.drawing.clips import draw_clip
from runtime.serve.decoding import Decoders
from runtime.serve.decoding import decoders as module
from runtime.serve.errors import ServeError
from runtime.serve.fetch import FetchRules
from runtime.serve.media import Media, TakenVideo, VideoPart
from runtime.video import Clip, Limits, clip_from_frames, load_clip
from tests.processes import HANG_SECONDS
from tests.warm import WarmPopen

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
def decoding(loop: Loop) -> Iterator[Decoders]:
    """Read only: what breaks a decoder has one of its own."""
    one = Decoders(Limits(max_pixels=400 * 300, max_frames=500))
    loop.run(one.start())
    yield one
    loop.run(one.close())


Make = Callable[..., Decoders]


@pytest.fixture
def make(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(DEVNULL=subprocess.DEVNULL, Popen=WarmPopen))
    made: list[Decoders] = []

    def one(**settings: Any) -> Decoders:
        made.append(Decoders(**settings))
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
    loop: Loop, decoding: Decoders, content: bytes | list[bytes], counts: Any = 8, size: tuple[int, int] = SIZE
) -> Clip:
    with taken(content) as video:
        return loop.run(decoding.clip(video, counts, size))


def refused(loop: Loop, decoding: Decoders, content: bytes | list[bytes], counts: Any = 8) -> str:
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
def test_a_file_becomes_the_clip_that_it_becomes_here(loop: Loop, decoding: Decoders, film: Path, counts: Any) -> None:
    got, wanted = clip_of(loop, decoding, film.read_bytes(), counts), load_clip(film, counts, SIZE)
    assert same(got, wanted)
    assert got.decode_seconds > 0
    assert got.frames.is_contiguous()


@pytest.mark.parametrize("count", [2, 5, 8, 40])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_become_the_clip_that_they_become_here(loop: Loop, decoding: Decoders, count: int, kind: str) -> None:
    content = [picture(seed=seed, kind=kind) for seed in range(count)]
    here = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in content]
    assert same(clip_of(loop, decoding, content, [4, 8]), clip_from_frames(here, [4, 8], SIZE))


def test_videos_do_not_get_mixed_up(loop: Loop, decoding: Decoders) -> None:
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
def test_the_one_line_of_what_is_wrong(loop: Loop, decoding: Decoders, content: bytes | list[bytes], said: str) -> None:
    before = decoding.processes
    assert said in refused(loop, decoding, content)
    assert decoding.processes == before  # an error does not cost a process


def test_a_video_cut_off(loop: Loop, decoding: Decoders, film: Path) -> None:
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


def test_a_picture_that_unfolds_is_refused_by_its_header(loop: Loop, decoding: Decoders) -> None:
    content = bomb(12_000)
    assert len(content) < 50_000
    assert "12000x12000" in refused(loop, decoding, [content, content])


def test_a_bound_on_memory(loop: Loop, make: Make) -> None:
    """No limit on pixels, but one on memory: 9,000 x 9,000 pixels in RGB are 243 MB."""
    decoders = make(limits=Limits(max_pixels=None), memory=200 << 20)
    refused(loop, decoders, [bomb(9_000)] * 2)
    good = [picture(), picture(seed=1)]
    assert len(clip_of(loop, decoders, good, 2).frames) == 2
    enough = make(limits=Limits(max_pixels=None), memory=4 << 30)  # negative control
    assert len(clip_of(loop, enough, [bomb(9_000)] * 2, 2).frames) == 2


# What ends a decoder


@pytest.fixture
def stopped(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Callable[[Decoders, Path], Any]:
    """Begin a video with a decoder that does nothing any more; back when it has been told of the video."""
    sent = threading.Event()
    real = module._Decoder._send

    async def send(self: Any, message: dict[str, Any], files: list[int]) -> None:
        await real(self, message, files)
        sent.set()

    monkeypatch.setattr(module._Decoder, "_send", send)

    def begin(decoders: Decoders, film: Path) -> Any:
        os.killpg(decoders.processes[0], signal.SIGSTOP)
        sent.clear()
        call = loop.start(decoders.clip(taken(film.read_bytes()), 8, SIZE))
        assert sent.wait(HANG_SECONDS)
        return call

    return begin


@pytest.fixture
def begun(loop: Loop) -> Callable[[Decoders], tuple[Any, int]]:
    """Begin a video that takes seconds; back with the process that has begun with it."""

    def begin(decoders: Decoders) -> tuple[Any, int]:
        call = loop.start(decoders.clip(taken([bomb(4_000)] * 64), 64, SIZE))
        (decoder,) = decoders.processes
        while not (running := forks(decoder)) or _cpu_seconds(running[0]) < 0.1:
            assert not call.done()
            threading.Event().wait(0.01)
        return call, running[0]

    return begin


def forks(process: int) -> list[int]:
    """Processes that a process has started and that run."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def invalid(call: Any) -> str:
    with pytest.raises(ServeError) as caught:
        call.result(HANG_SECONDS)
    assert (caught.value.status, caught.value.code) == (400, "invalid_video")
    return caught.value.message


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_decoder_that_dies_costs_one_request(
    loop: Loop, make: Make, film: Path, begun: Callable[[Decoders], tuple[Any, int]], how: signal.Signals
) -> None:
    decoders = make()
    (before,) = decoders.processes
    call, fork = begun(decoders)
    os.kill(before, how)
    assert "ends the decoder" in invalid(call)
    assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8
    assert decoders.processes != [before]
    assert ended(fork)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_video_that_ends_its_process_costs_one_request_and_nothing_else(
    loop: Loop, make: Make, film: Path, begun: Callable[[Decoders], tuple[Any, int]], how: signal.Signals
) -> None:
    decoders = make()
    before = decoders.processes
    call, fork = begun(decoders)
    os.kill(fork, how)
    assert "ends the decoder" in invalid(call)
    assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8
    assert decoders.processes == before


def test_no_video_shares_a_process_with_another(
    loop: Loop, make: Make, film: Path, begun: Callable[[Decoders], tuple[Any, int]]
) -> None:
    decoders = make()
    before = decoders.processes
    used = []
    for _ in range(3):
        call, fork = begun(decoders)
        call.cancel()
        used.append(fork)
        assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8
        assert ended(fork)
    assert len(set(used)) == 3
    assert decoders.processes == before


def test_a_decoder_that_died_at_rest_costs_none(loop: Loop, make: Make, film: Path) -> None:
    decoders = make()
    (before,) = decoders.processes
    os.kill(before, signal.SIGKILL)
    while Path(f"/proc/{before}/stat").read_text().split()[2] != "Z":
        threading.Event().wait(0.01)
    assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8
    assert decoders.processes != [before]


def test_a_decoder_that_dies_as_a_video_comes_costs_none(
    loop: Loop, make: Make, film: Path, stopped: Callable[[Decoders, Path], Any]
) -> None:
    """It looked alive and took the words; it never saw the video."""
    decoders = make()
    (before,) = decoders.processes
    call = stopped(decoders, film)
    os.kill(before, signal.SIGKILL)
    assert len(call.result(HANG_SECONDS).frames) == 8
    assert decoders.processes != [before]


def test_a_waiting_fork_that_dies_is_replaced(
    loop: Loop, make: Make, film: Path, begun: Callable[[Decoders], tuple[Any, int]]
) -> None:
    """And is not taken for one that had a video."""
    decoders = make()
    (before,) = decoders.processes
    for _ in range(2):
        while not (waiting := forks(before)):
            threading.Event().wait(0.01)
        os.kill(waiting[0], signal.SIGKILL)
        assert ended(waiting[0])
    call, fork = begun(decoders)
    call.cancel()
    assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8
    assert ended(fork)
    assert decoders.processes == [before]


def test_decoders_that_all_die_at_rest_are_not_tried_for_ever(
    loop: Loop, make: Make, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders = make()
    real, tried = module._Decoder._send, 0

    async def send(self: Any, message: dict[str, Any], files: list[int]) -> None:
        nonlocal tried
        tried += 1
        self.process.kill()
        self.process.wait()
        await real(self, message, files)

    with monkeypatch.context() as patch:
        patch.setattr(module._Decoder, "_send", send)
        assert "ends the decoder" in invalid(loop.start(decoders.clip(taken(film.read_bytes()), 8, SIZE)))
    assert tried == 2
    assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8


def test_a_deadline(loop: Loop, make: Make, film: Path, stopped: Callable[[Decoders, Path], Any]) -> None:
    decoders = make(seconds=0.5)
    (before,) = decoders.processes
    assert "longer than 0.5 s" in invalid(stopped(decoders, film))
    assert ended(before)
    decoders._seconds = HANG_SECONDS
    assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8


def test_a_deadline_ends_a_video_s_process_alone(
    loop: Loop, make: Make, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STOP_SECONDS", HANG_SECONDS)
    decoders = make()
    before = decoders.processes
    decoders._seconds = 1.0
    assert "longer than 1 s" in invalid(loop.start(decoders.clip(taken([bomb(4_000)] * 64), 64, SIZE)))
    decoders._seconds = HANG_SECONDS
    assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8
    assert decoders.processes == before


def test_who_leaves_stops_the_work(
    loop: Loop, make: Make, film: Path, stopped: Callable[[Decoders, Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The video's process ends with it, and the decoder lives on."""
    monkeypatch.setattr(module, "_STOP_SECONDS", HANG_SECONDS)
    decoders = make()
    before = decoders.processes
    call = stopped(decoders, film)
    call.cancel()
    os.killpg(before[0], signal.SIGCONT)
    assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8
    assert decoders.processes == before


def test_a_decoder_that_does_not_listen_is_replaced(
    loop: Loop, make: Make, film: Path, stopped: Callable[[Decoders, Path], Any]
) -> None:
    decoders = make()
    before = decoders.processes
    stopped(decoders, film).cancel()
    assert len(clip_of(loop, decoders, film.read_bytes()).frames) == 8
    assert decoders.processes != before
    assert not Path(f"/proc/{before[0]}").exists()


def test_a_full_line_is_left_by_those_who_go(
    loop: Loop, make: Make, film: Path, stopped: Callable[[Decoders, Path], Any]
) -> None:
    """Callers that wait for a decoder and leave cost nothing, and those who stay are served."""
    decoders = make()
    first = stopped(decoders, film)
    waiting = [loop.start(decoders.clip(taken(film.read_bytes()), 8, SIZE)) for _ in range(4)]
    for call in (waiting[0], waiting[2]):
        call.cancel()
    first.cancel()
    assert same(waiting[1].result(HANG_SECONDS), waiting[3].result(HANG_SECONDS))


PARENT = """
import asyncio, sys
from runtime.serve.decoding import Decoders
from runtime.serve.fetch import FetchRules
from runtime.serve.media import Media, VideoPart

async def main():
    decoding = Decoders()
    await decoding.start()
    print(*decoding.processes, flush=True)
    if sys.argv[1] == "busy":
        taken = await Media(FetchRules()).take(VideoPart(url=sys.stdin.readline().strip()))
        while True:
            await decoding.clip(taken, 128, (24, 32))
    await asyncio.sleep(900)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["idle", "busy"])
def test_it_ends_with_its_parent(how: str) -> None:
    root = Path(__file__).parents[3]
    words = [sys.executable, "-c", PARENT, how]
    with subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        processes = [int(parent.stdout.readline())]
        if how == "busy":
            frames = ",".join([base64.b64encode(bomb(2000)).decode()] * 200)
            parent.stdin.write(f"data:video/png;base64,{frames}\n")
            parent.stdin.flush()
            while not (running := forks(processes[0])) or _cpu_seconds(running[0]) < 0.1:
                threading.Event().wait(0.01)
            processes += running
        parent.kill()
    assert all(ended(process) for process in processes)


def ended(process: int) -> bool:
    """Whether a process ends by itself."""
    for _ in range(int(HANG_SECONDS * 10)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{process}/stat").read_text().split()[2] != "Z":
                threading.Event().wait(0.1)
                continue
        return True
    return False


def _cpu_seconds(process: int) -> float:
    try:
        words = Path(f"/proc/{process}/stat").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, words[13:15])) / os.sysconf("SC_CLK_TCK")


# A decoder that a video has taken over


FAKE = """
import json, socket, sys
def put(line, content):
    line.sendall(len(content).to_bytes(4, "big") + content)
line = socket.socket(fileno=int(sys.argv[2]))
put(line, b"{}")
while True:
    head, files, _, _ = socket.recv_fds(line, 4, 3)
    if not head:
        break
    line.recv(1 << 20)
    with socket.socket(fileno=files[2]) as own:
        def tell(content):
            put(own, content)
        tell(b"{}")
        %s
    put(line, b"{}")
"""
SOUND = {"frames": 2, "timestamps": [], "source_frames": 2, "duration": 0.0}
SOUND |= {"decode_seconds": 0.0, "preprocess_seconds": 0.0}
FRAMES = f"import os; os.write(files[1], bytes(2 * 3 * {SIZE[0] * SIZE[1]}))"


def reply(**clip: Any) -> str:
    said = {**SOUND, **clip}
    return f"{FRAMES}; tell(json.dumps({{'clip': {said!r}}}).encode())"


def faked(loop: Loop, make: Make, monkeypatch: pytest.MonkeyPatch, does: str) -> Clip:
    monkeypatch.setattr(module, "_CHILD", FAKE % does.replace("nan", "float('nan')").replace("inf", "float('inf')"))
    return clip_of(loop, make(), [picture(), picture()], [2, 4])


def test_a_sound_reply_is_believed(loop: Loop, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of those below."""
    clip = faked(loop, make, monkeypatch, reply())
    assert clip.frames.shape == (2, 3, *SIZE)
    assert not clip.frames.any()


@pytest.mark.parametrize(
    "does",
    [
        "tell(b'no JSON')",
        "tell(b'[]')",
        "tell(b'[' * 100000)",
        "tell(b'\\xff')",
        "tell(b'{}')",
        "tell(b'{\"clip\": []}')",
        "import pickle; tell(pickle.dumps(print))",
        "own.sendall(b'\\xff\\xff\\xff\\xff')",
        "own.sendall(b'\\0\\0')",
        reply(frames=4),  # of which there are only two
        reply(frames=3),
        reply(frames=10**9),
        reply(frames=-2),
        reply(frames="2"),
        reply(timestamps=[0.0]),
        reply(timestamps=[0.0, float("nan")]),
        reply(timestamps="ab"),
        reply(timestamps=[None, None]),
        reply(duration=float("inf")),
        reply(duration=-1.0),
        reply(source_frames=1.5),
        reply(source_frames=None),
        reply().replace(FRAMES, "import os; os.write(files[1], bytes(10))"),
    ],
)
def test_anything_else_is_not(loop: Loop, make: Make, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    # A reply that is cut short is the end of the process.
    with pytest.raises(ServeError) as caught:
        faked(loop, make, monkeypatch, does + "; break")
    assert (caught.value.status, caught.value.code) == (400, "invalid_video")
    assert caught.value.message.startswith("the video cannot be decoded")


def test_what_it_says_is_one_line(loop: Loop, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    says = {"error": "a\nb\r\x1b[31m" + "x" * 5000}
    with pytest.raises(ServeError) as caught:
        faked(loop, make, monkeypatch, f"tell(json.dumps({says!r}).encode())")
    assert caught.value.message.startswith("a b [31mx")
    assert len(caught.value.message) <= 1000


def test_a_decoder_that_does_not_start(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHILD", "raise SystemExit(3)")
    decoders = Decoders()
    for work in (decoders.start(), decoders.clip(taken([picture(), picture()]), 2, SIZE)):
        with pytest.raises(ServeError) as caught:
            loop.run(work)
        assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "overloaded", 5)
    loop.run(decoders.close())


def test_no_room_for_a_video_costs_no_decoder(
    loop: Loop, decoding: Decoders, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> Any:
        raise OSError(24, "Too many open files")

    before = decoding.processes
    with monkeypatch.context() as patch:
        patch.setattr(module, "_shared_memory", full)
        for _ in range(3):
            with pytest.raises(ServeError) as caught:
                clip_of(loop, decoding, film.read_bytes())
            assert (caught.value.status, caught.value.retry_after) == (503, 5)
    assert len(clip_of(loop, decoding, film.read_bytes()).frames) == 8
    assert decoding.processes == before


def test_it_keeps_no_file_of_a_video(loop: Loop, decoding: Decoders, film: Path) -> None:
    """Of any kind. The pipe to the fork that waits is another one for each, and the fork is made at any time after a
    video: what is held may differ by that pipe's ends, so that only what grows with the videos is what is kept."""
    videos, ends = 9, 4

    def held() -> int:
        return len(list(Path(f"/proc/{decoding.processes[0]}/fd").iterdir()))

    def stays(before: int) -> bool:
        return any(held() <= before + ends or threading.Event().wait(0.1) for _ in range(int(HANG_SECONDS * 10)))

    clip_of(loop, decoding, film.read_bytes())
    before = held()
    for _ in range(videos):
        clip_of(loop, decoding, [picture(), picture()], 2)
    assert stays(before)
    before = held()
    for _ in range(videos):
        refused(loop, decoding, b"no video")
    assert stays(before)


@pytest.mark.parametrize("setting", [{"memory": 0}, {"seconds": 0}, {"workers": 0}, {"memory": 1.5}])
def test_settings_that_make_no_sense(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Decoders(**setting)
