"""Frames as they arrive: whatever their number and grouping, the result is that of the whole clip, to the last bit."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earlytom.errors import UserError
from runtime.errors import EngineError
from runtime.video import clip_from_frames, sample_indices
from runtime.vision import Encoded
from runtime.vision import live as live_module
from runtime.vision.chunked import ChunkedVision
from runtime.vision.live import LiveClip, completion
from tests.processes import HANG_SECONDS as WAIT
from tests.runtime.vision.chunked_vision import TinyVision, Toy, tiny_chunked


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The models are tiny."""


def source(count: int, *, height: int = 24, width: int = 26, seed: int = 0) -> Tensor:
    """uint8 [count, 3, h, w]: a picture that moves, a cut in the middle, a few frames that stand still."""
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randint(0, 256, (2, 3, height, 2 * width), generator=generator, dtype=torch.uint8)
    steps = (min(3 * (index // 2), width) for index in range(count))
    frames = [scenes[2 * index // count, :, :, step : step + width] for index, step in enumerate(steps)]
    return torch.stack(frames)


def whole(vision: ChunkedVision, frames: Tensor) -> Encoded:
    clip = clip_from_frames(frames, vision.shape[0], vision.shape[2:])
    return Encoded(*(value.clone() for value in vision.encode(clip.frames)))


def live(vision: ChunkedVision, groups: list[Tensor], **arguments: Any) -> tuple[Encoded, Any]:
    with LiveClip(vision, **arguments) as clip:
        for group in groups:
            clip.push(group)
        return clip.finish()


def split(frames: Tensor, cuts: set[int]) -> list[Tensor]:
    edges = [0, *sorted(cut for cut in cuts if cut < len(frames)), len(frames)]
    return [frames[a:b] for a, b in pairwise(edges)]


KINDS: dict[str, Callable[[int, int], ChunkedVision]] = {
    "tower": tiny_chunked,
    "last merge": lambda frames, chunk: tiny_chunked(frames, chunk, layers=(2,)),
    "no merge": lambda frames, chunk: tiny_chunked(frames, chunk, layers=()),
    "adaptive": lambda frames, chunk: tiny_chunked(frames, chunk, schedule="adaptive"),
    "uneven": lambda frames, chunk: Toy(frames, chunk, uneven=True),
    "even": Toy,
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(
    frames=st.integers(1, 9),
    chunk=st.integers(1, 9),
    count=st.integers(2, 30),
    cuts=st.sets(st.integers(1, 29)),
    known=st.booleans(),
)
def test_the_result_is_that_of_the_whole_clip(
    kind: str, frames: int, chunk: int, count: int, cuts: set[int], known: bool
) -> None:
    vision = KINDS[kind](frames, min(chunk, frames))
    clip = source(count)
    arguments: dict[str, Any] = {"total": count} if known else {"limit": 30}
    found, timings = live(vision, split(clip, cuts), **arguments)
    wanted = whole(vision, clip)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
    assert 0 <= timings.share <= 1
    assert timings.after_last_frame > 0
    assert timings.before >= 0
    backwards = whole(vision, clip.flip(0))  # another clip is another result
    assert frames == 1 or count == 2 or not torch.equal(found.tokens, backwards.tokens)


def test_an_uneven_head_that_passed_for_even_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    vision, clip = Toy(8, 4, uneven=True), source(10)
    assert not vision.rows_alike
    assert Toy(8, 4).rows_alike
    assert tiny_chunked(8, 4).rows_alike
    assert torch.equal(live(vision, [clip])[0].tokens, whole(vision, clip)[0])
    monkeypatch.setattr(Toy, "rows_alike", True)
    assert not torch.equal(live(vision, [clip])[0].tokens, whole(vision, clip)[0])


@pytest.mark.parametrize(
    "give",
    [
        lambda frames: list(frames),
        lambda frames: [frames.permute(0, 2, 3, 1)],
        lambda frames: [frame.permute(1, 2, 0).numpy() for frame in frames],
        lambda frames: [frames.permute(0, 2, 3, 1).numpy()[::-1].copy()[::-1]],
    ],
    ids=["one by one", "channels last", "numpy, one by one", "numpy, negative strides"],
)
@pytest.mark.parametrize("size", [(24, 26), (20, 20)])
def test_every_form_of_frames(give: Callable[[Tensor], list[Any]], size: tuple[int, int]) -> None:
    """(20, 20) is the size of the model: nothing is resized then."""
    vision = tiny_chunked(8, 4)
    clip = source(11, height=size[0], width=size[1])
    wanted = whole(vision, clip)
    for arguments in ({"total": 11}, {}):
        (tokens, positions, *_), _ = live(vision, give(clip), **arguments)
        assert torch.equal(tokens, wanted[0])
        assert torch.equal(positions, wanted[1])


def test_the_callers_frames_may_be_written_over_and_the_result_is_the_callers() -> None:
    vision = tiny_chunked(8, 4)
    clips = [source(8, height=20, width=20, seed=seed) for seed in range(2)]
    wanted = [whole(vision, clip)[0] for clip in clips]
    found = []
    for clip in clips:
        with LiveClip(vision) as open_clip:
            for frame in clip:
                buffer = frame.clone()
                open_clip.push(buffer)
                buffer.zero_()
            found.append(open_clip.finish()[0].tokens)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_clips_at_once_do_not_disturb_each_other() -> None:
    vision = tiny_chunked(8, 4)
    clips = [source(count, seed=count) for count in (9, 16, 5)]
    wanted = [whole(vision, clip)[0] for clip in clips]
    opened = [LiveClip(vision, total=total) for total in (9, None, 5)]
    for step in range(16):
        for clip, frames in zip(opened, clips, strict=True):
            if step < len(frames):
                clip.push(frames[step])
        if step == 8:
            assert torch.equal(whole(vision, clips[0])[0], wanted[0])
    found = [clip.finish()[0].tokens for clip in reversed(opened)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# What is encoded, and when


class Watched(Toy):
    """Tells when the head has run so often, and can be made to wait or to fail in a call."""

    def __init__(self, frames: int, chunk: int) -> None:
        super().__init__(frames, chunk)
        self.ran = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()
        self.fail: int | None = None

    def _head(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        assert self.go.wait(WAIT)
        if self.fail == len(self.calls):
            raise EngineError("the head failed")
        result = super()._head(frames)
        self.ran.release()
        return result

    def require_runs(self, count: int) -> None:
        for _ in range(count):
            assert self.ran.acquire(timeout=WAIT)


@pytest.fixture
def vision() -> Iterator[Watched]:
    backend = Watched(8, 4)
    assert backend.rows_alike
    backend.require_runs(2)
    backend.calls.clear()
    yield backend
    backend.go.set()
    backend.close()


def settle(clip: LiveClip) -> None:
    """Until the worker has done all it was given."""
    assert clip._worker is not None
    clip._worker.submit(int).result(WAIT)


def numbered(*indices: int) -> Tensor:
    """Frames of the toy's size whose values are their indices."""
    return torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


def test_chunks_run_before_the_clip_ends(vision: Watched) -> None:
    with LiveClip(vision, total=20) as clip:
        clip.push(numbered(*range(9)))  # of the sample 0, 2, 5, 8, 10, 13, 16, 19 the first four
        vision.require_runs(1)
        assert vision.calls == [[0, 2, 5, 8]]
        settle(clip)
        clip.push(numbered(*range(9, 19)))
        clip.push(numbered(19))
        _, timings = clip.finish()
    assert vision.calls == [[0, 2, 5, 8], [10, 13, 16, 19]]
    assert timings.share == 0.5
    assert timings.before > 0


def test_pushing_does_not_wait_for_the_encoder(vision: Watched) -> None:
    vision.go.clear()
    with LiveClip(vision, total=8) as clip:
        for index in range(8):
            clip.push(numbered(index))
        assert vision.calls == []
        vision.go.set()
        _, timings = clip.finish()
    assert timings.share == 0
    assert vision.calls == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_short_download_repeats_frames(vision: Watched) -> None:
    live(vision, [numbered(0), numbered(1, 2)], total=3)
    assert vision.calls == [[0, 0, 0, 0], [1, 1, 1, 2]]


@pytest.mark.parametrize(
    ("count", "calls"),
    [
        (3, [[0, 1, 2, 2]]),  # a chunk of three is filled with the last
        (5, [[0, 1, 2, 3], [4, 4, 4, 4]]),
        (8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (10, [[0, 1, 2, 3], [4, 5, 6, 7], [9, 9, 9, 9]]),  # 8 and 4 are not in the sample
        (16, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 10, 12, 15]]),
        (32, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 13, 17, 22], [26, 31, 31, 31]]),
    ],
)
def test_of_a_camera_no_frame_is_encoded_twice(vision: Watched, count: int, calls: list[list[int]]) -> None:
    live(vision, [numbered(index) for index in range(count)])
    assert vision.calls == calls


def test_the_share_of_a_camera_counts_what_the_sample_has(vision: Watched) -> None:
    with LiveClip(vision) as clip:
        for index in range(8):
            clip.push(numbered(index))
        settle(clip)
        clip.push(numbered(*range(8, 15)))
        clip.push(numbered(15))
        _, timings = clip.finish()
    sample = sample_indices(16, 8).tolist()
    assert timings.share == sum(index < 8 for index in sample) / 8 == 0.5


@given(st.integers(1, 12), st.integers(2, 40), st.integers(0, 12), st.none() | st.integers(1, 12))
def test_a_completion_is_the_sample(frames: int, count: int, encoded: int, chunk: int | None) -> None:
    sample, encoded = sample_indices(count, frames).tolist(), min(encoded, count, frames)
    plan = completion(sample, encoded, chunk)
    have = [*plan.keep, *plan.add]
    assert [have[row] for row in plan.rows] == sample
    assert all(index < encoded for index in plan.keep)
    assert plan.ahead(0) == 0
    if chunk is None:
        assert len(set(have)) == len(have)
        assert all(index >= encoded for index in plan.add)
        assert plan.ahead(encoded) == sum(index < encoded for index in sample)
    else:
        assert len(plan.keep) % chunk == 0
        assert plan.ahead(encoded) == len(plan.keep)


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"total": 1}, r"total must be a whole number between 2 and 1000000000, got 1"),
        ({"total": 2.5}, r"total must .*, got 2\.5"),
        ({"total": True}, r"total must .*, got True"),
        ({"total": 10**30}, r"total must .*, got 1000"),
        ({"limit": 0}, r"limit must .*, got 0"),
        ({"limit": "9"}, r"limit must .*, got '9'"),
    ],
)
def test_bad_counts(vision: Watched, arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        LiveClip(vision, **arguments)
    assert threads_of_clips() == []


def test_a_backend_that_takes_whole_clips() -> None:
    with pytest.raises(EngineError, match=r"takes whole clips: build .* python -m builder\.build --chunk"):
        LiveClip(cast(Any, TinyVision(8)))


@pytest.mark.parametrize(
    ("frames", "line"),
    [
        (torch.zeros(2, 3, 4, 4), r"frames are float32 \[2, 3, 4, 4\]"),
        (torch.zeros(2, 4, 4, 4, dtype=torch.uint8), r"frames are uint8 \[2, 4, 4, 4\]"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), r"frames are uint8 \[0, 3, 4, 4\]"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"frames are uint8 \[4, 4\]"),
        ([1, 2], r"frame 0 is .*1.*; give each frame"),
        ([], "empty list of frames"),
        (None, "the video is a NoneType"),
        ("clip.mp4", "the video is a str"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8).to_sparse(), "frames are a sparse tensor"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"), "frames are a meta tensor"),
        (np.zeros((4, 4, 4), np.uint8), r"frames are uint8 \[1, 4, 4, 4\]"),
    ],
)
def test_bad_frames_change_nothing(vision: Watched, frames: Any, line: str) -> None:
    clip = source(6, height=2, width=2)
    with LiveClip(vision) as open_clip:
        open_clip.push(clip[:5])
        with pytest.raises(UserError, match=line) as caught:
            open_clip.push(frames)
        assert "\n" not in str(caught.value)
        open_clip.push(clip[5])
        assert torch.equal(open_clip.finish()[0].tokens, whole(vision, clip)[0])


def test_too_few_and_too_many(vision: Watched) -> None:
    with LiveClip(vision, total=5) as clip:
        clip.push(numbered(0, 1, 2))
        with pytest.raises(UserError, match="total is 5 frames and 3 were pushed"):
            clip.finish()
        with pytest.raises(UserError, match="total is 5 frames and 6 were pushed"):
            clip.push(numbered(3, 4, 5))
        clip.push(numbered(3, 4))
        (tokens, *_), _ = clip.finish()
    assert torch.equal(tokens, whole(vision, numbered(0, 1, 2, 3, 4))[0])
    with LiveClip(vision, limit=9) as clip:
        clip.push(numbered(*range(9)))
        with pytest.raises(UserError, match=r"10 frames were pushed .* at most 9: give total .* push fewer"):
            clip.push(numbered(9))
        clip.finish()
    with LiveClip(vision) as clip:
        clip.push(numbered(*range(32)))
        with pytest.raises(UserError, match="at most 32"):
            clip.push(numbered(32))
    with LiveClip(vision) as clip, pytest.raises(UserError, match=r"got 0 frame\(s\); a video has at least 2"):
        clip.finish()


def threads_of_clips() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("live-clip")]


def test_a_failed_chunk_reaches_the_next_push(vision: Watched) -> None:
    vision.fail = 0
    with LiveClip(vision, total=20) as clip:
        clip.push(numbered(*range(9)))
        while clip._error is None:
            assert threads_of_clips()
        with pytest.raises(EngineError, match="the head failed"):
            clip.push(numbered(9))
        with pytest.raises(EngineError, match="the head failed"):
            clip.finish()
    assert threads_of_clips() == []


@pytest.mark.parametrize("total", [8, None])
@pytest.mark.parametrize("call", [0, 1])
def test_a_failed_chunk_reaches_finish(vision: Watched, total: int | None, call: int) -> None:
    vision.fail = call
    vision.go.clear()
    with LiveClip(vision, total=total) as clip:
        clip.push(numbered(*range(8)))
        vision.go.set()
        with pytest.raises(EngineError, match="the head failed"):
            clip.finish()
    assert len(vision.calls) == call  # nothing runs after a failure
    assert threads_of_clips() == []
    vision.fail = None
    assert torch.equal(live(vision, [numbered(*range(8))])[0].tokens, whole(vision, numbered(*range(8)))[0])


def test_a_rest_that_fails_reaches_finish(vision: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(room: Any) -> Any:
        raise EngineError("the rest failed")

    monkeypatch.setattr(vision, "_rest", fail)
    with pytest.raises(EngineError, match="the rest failed"):
        live(vision, [numbered(*range(8))])


def test_closing_ends_a_finish_before_its_next_chunk(vision: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 frames two chunks are missing at the end."""
    clip, begun, found = LiveClip(vision), threading.Event(), []
    clip.push(numbered(*range(32)))
    settle(clip)
    plain = vision._head

    def head(frames: Tensor) -> tuple[Tensor, Tensor]:
        begun.set()
        return plain(frames)

    def finish() -> None:
        with pytest.raises(RuntimeError, match="finished or closed"):
            clip.finish()
        found.append(True)

    monkeypatch.setattr(vision, "_head", head)
    vision.go.clear()
    finishing = threading.Thread(target=finish)
    finishing.start()
    assert begun.wait(WAIT)
    closing = threading.Thread(target=clip.close)
    closing.start()
    while clip._worker is not None:
        assert closing.is_alive()
    vision.go.set()
    for thread in (closing, finishing):
        thread.join(WAIT)
        assert not thread.is_alive()
    assert found == [True]
    assert len(vision.calls) == 3  # and not the fourth


def test_closing_stops_the_worker_and_frees_the_memory(vision: Watched) -> None:
    vision.go.clear()
    clip = LiveClip(vision, total=8)
    clip.push(numbered(*range(8)))
    assert clip._worker is not None
    last = clip._worker.submit(int)  # dropped after the second chunk
    closing = threading.Thread(target=clip.close)
    closing.start()
    while not last.cancelled():
        assert closing.is_alive()
    vision.go.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    clip.close()
    assert len(vision.calls) <= 1  # the second chunk was dropped
    assert threads_of_clips() == []
    for late in (lambda: clip.push(numbered(0)), clip.finish):
        with pytest.raises(RuntimeError, match="finished or closed"):
            late()
    assert len(vision._rooms) == 1
    with LiveClip(vision) as second:
        assert len(vision._rooms) == 0  # it has the memory of the first
        second.push(numbered(0, 1))
        second.finish()
        with pytest.raises(RuntimeError, match="finished or closed"):
            second.finish()


def test_a_clip_that_nobody_closes_leaves_no_thread(vision: Watched) -> None:
    clip = LiveClip(vision)
    clip.push(numbered(*range(4)))
    (thread,) = threads_of_clips()
    del clip
    gc.collect()
    thread.join(WAIT)
    assert not thread.is_alive()


def test_an_interpreter_with_an_open_clip_exits() -> None:
    program = """
import torch
from runtime.vision import Encoded
from runtime.vision.chunked import ChunkedVision, Room
from runtime.vision.live import LiveClip
class Vision(ChunkedVision):
    def _make_room(self): return Room(torch.zeros(8, 3, 4), None)
    def _head(self, frames): return frames.flatten(2).float(), None
clip = LiveClip(Vision("", (8, 3, 2, 2), 2))
clip.push(torch.zeros(7, 3, 2, 2, dtype=torch.uint8))
print("pushed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "pushed\n", "")


def test_a_backend_that_is_closed_meanwhile(vision: Watched) -> None:
    with LiveClip(vision) as clip:
        clip.push(numbered(0, 1))
        vision.close()
        with pytest.raises(RuntimeError, match="vision backend is closed"):
            clip.finish()
    with pytest.raises(RuntimeError, match="vision backend is closed"):
        LiveClip(vision, total=4)


@pytest.mark.parametrize("total", [9, None])
def test_on_a_gpu_each_thread_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch, total: int | None) -> None:
    """On stand-ins, that write down on which stream each thing is asked: waiting for the GPU comes last on each."""
    log: list[str] = []
    places = threading.local()

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        places.stream = stream
        yield
        del places.stream

    def here() -> Stream:
        return getattr(places, "stream", Stream("caller"))

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            log.append(f"{name} on {here().name}")
            return function(*arguments)

        return call

    vision, frames = Toy(4, 2), source(9)
    wanted = whole(vision, frames).tokens
    assert vision.rows_alike
    monkeypatch.setattr(live_module, "_stream", lambda device, purpose: Stream(purpose))
    monkeypatch.setattr(live_module, "_wait", noted("wait", lambda device: None))
    monkeypatch.setattr(live_module, "resize_frames", noted("resize", live_module.resize_frames))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here())
    monkeypatch.setattr(vision, "_head", noted("head", vision._head))
    monkeypatch.setattr(vision, "_rest", noted("rest", vision._rest))
    (tokens, *_), _ = live(vision, split(frames, {4}), total=total)
    assert torch.equal(tokens, wanted)
    assert log[0] == "encode waits for caller"  # on whose stream the clip's memory was made
    pushed = [line for line in log if "resize" in line]
    assert pushed == ["resize on resize", "wait on resize"] * 2
    encoded = [line for line in log[1:] if "encode" in line]
    heads = encoded.count("head on encode")
    assert heads >= 2
    assert encoded[-2:] == ["rest on encode", "wait on encode"]
    assert len(log) == 1 + len(pushed) + len(encoded)
