"""What callers pass: each thing that makes no sense is refused where it is passed, in one line that names the argument.

The tables are (argument, values); what must be taken stands beside them as the control.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from earlytom.errors import UserError
from runtime.decoder.eager import InnerMerge
from runtime.decoder.sampling import Sampling
from runtime.errors import DeadlineExceeded
from runtime.pipeline import Pipeline
from runtime.video import Clip, Limits

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "What happens?"
LONG = 120.0
FRAMES = torch.arange(4 * 3 * 8 * 8).remainder(255).to(torch.uint8).reshape(4, 3, 8, 8)


class Odd:
    """Something that nothing takes, with a `repr` of several lines; it cannot be hashed or compared."""

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "odd\nand " + "long " * 100

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("do not compare me")


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"clip.mp4"


class FailingRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NO_NUMBER: list[Any] = [
    *("3", "", b"3", True, False, Decimal(5), Fraction(1, 2), 1j, [1], (1,), {}, {1}, object(), Odd(), FailingRepr()),
    *(torch.tensor(3.0), np.array([1.0]), np.timedelta64(3, "s"), np.bool_(True), int, math.sin),
]
NOT_FINITE: list[Any] = [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")]
NO_REAL = [*NO_NUMBER, *NOT_FINITE, 10**400]
NO_WHOLE = [*NO_NUMBER, *NOT_FINITE, 1.5, 16.0, np.float32(2), -1, np.int64(-1)]

LOAD: list[tuple[str, list[Any]]] = [
    ("engine", [None, "", b"engines", 3, True, Odd(), [], BytesPath(), "a\0b", torch.zeros(1)]),
    ("model", ["", b"model", 3, True, 1.5, Odd(), [], {}, BytesPath(), object()]),
    ("backend", [None, b"torch", 3, Odd(), ["torch"], {}]),
    ("decoder", [None, b"torch", 3, Odd(), ["torch"], {}, torch.nn.Linear(1, 1)]),
    ("device", ["mps", "", "gpu", "meta", "cuda:x", b"cpu", 3, True, Odd(), [], torch.device("meta"), "xpu", "cpu:-2"]),
    ("dtype", ["fp16", "float32", torch.int8, torch.bool, torch.complex64, np.float32, float, 16, Odd(), []]),
    ("inner", [1, 0.5, "1", (1, 0.5), {"layer": 1}, True, Odd(), InnerMerge]),
    ("inner", [InnerMerge(0), InnerMerge(-1), InnerMerge(1, -0.1), InnerMerge(1, 1.0), InnerMerge(1, 10**300)]),
    ("waiting", NO_WHOLE),
    ("watch_bytes", [*NO_WHOLE, None]),
    ("warm_up", [0, 1, "yes", "", Odd(), [], np.bool_(True)]),
    ("limits", [None, 5, {"max_pixels": 5}, Odd(), Limits]),
]
ASK: list[tuple[str, list[Any]]] = [
    ("deadline", [*NO_REAL, 0, -1, 0.0, -0.5, np.float32(-3)]),
    ("max_new_tokens", [*NO_WHOLE, None, 0]),
    ("sampling", [{}, {"temperature": 1.0}, 0.7, "greedy", True, 0, Odd(), Sampling, (0.7,)]),
    ("frames", [*NO_WHOLE, 0]),
    ("system", ["", " ", "\n", b"Be brief.", 3, True, ["Be brief."], Odd(), {}]),
    ("prompt", [None, "", " \n", b"What?", 3, ["What?"], ("What?",), {}, Odd(), True]),
]
VIDEOS: list[Any] = [
    *(None, "", b"", 3, True, 1.5, Odd(), {}, set(), object(), [], (), [1, 2], ["a.mp4", "b.mp4"], int),
    *("http://example.org/clip.mp4", "file:///tmp/clip.mp4", "no/such.mp4", Path("no-such.mp4"), "a\0b", "."),
    *(io.BytesIO(b""), io.StringIO("text"), SimpleNamespace(read=lambda n: None), b"clip.mp4"[:0]),
    *(FRAMES.float(), FRAMES.bool(), FRAMES[:1], FRAMES[0], FRAMES[:, :2], FRAMES[:0], FRAMES.to_sparse()),
    *(FRAMES.to("meta"), FRAMES.numpy().astype(np.int64), FRAMES.numpy()[:1], np.array(["a", "b"]), np.zeros(())),
    *(np.array([None]), [FRAMES[0], FRAMES[0, :, :4]], [FRAMES[0], None], [np.zeros((4, 4))] * 2),
]
STREAM: list[tuple[str, list[Any]]] = [
    ("total", [*NO_WHOLE, 0, 1, 10**30]),
    ("limit", [*NO_WHOLE, 0, 1, 10**30]),
]
PUSHED: list[Any] = [
    *(None, "", "clip.mp4", b"", 3, True, Odd(), [], [1], {}, object(), FRAMES.float(), FRAMES[:, :2], FRAMES[:0]),
    *(FRAMES.to_sparse(), FRAMES[0].to_sparse(), FRAMES[0].to("meta"), FRAMES[0, 0], np.zeros(3), [FRAMES[0], None]),
]
SAMPLING: list[tuple[str, list[Any]]] = [
    ("temperature", [*NO_REAL, None, -1, 1e-9, -0.1]),
    ("top_k", [*NO_WHOLE, None]),
    ("top_p", [*NO_REAL, None, 0, -0.1, 1.5]),
    ("seed", [*NO_WHOLE, 2**63, 10**400]),
]
INNER: list[tuple[str, list[Any]]] = [
    ("layer", [*NO_NUMBER, *NOT_FINITE, 1.5, None]),
    ("ratio", [*NO_REAL, None]),
]


def rows(table: list[tuple[str, list[Any]]]) -> list[Any]:
    """A test for each value, with a name that is the same in every run."""
    return [
        pytest.param(name, value, id=f"{name}-{row}-{index}-{type(value).__name__}")
        for row, (name, values) in enumerate(table)
        for index, value in enumerate(values)
    ]


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


@pytest.fixture(scope="module")
def pipeline(engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(engine, device="cpu", waiting=20) as made:
        yield made
        assert made._scheduler._occupied() == 0  # nothing that was refused took a place


@pytest.fixture(scope="module")
def chunked(chunked_engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with Pipeline.load(chunked_engine, device="cpu") as made:
        yield made


@pytest.mark.parametrize(("name", "value"), rows(LOAD))
def test_loading(name: str, value: Any) -> None:
    """Before anything is loaded: there is no such engine, and that would be said later."""
    assert name in refused(lambda: Pipeline.load(**{"engine": "no/such/engine", name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("engine", Path("no/such/engine")), ("device", "cpu"), ("device", torch.device("cpu")), ("device", None)),
        *(("dtype", torch.float32), ("waiting", np.int64(0)), ("watch_bytes", 10**30), ("warm_up", False)),
        *(("inner", InnerMerge(1)), ("limits", Limits(max_seconds=1)), ("decoder", "torch"), ("backend", "auto")),
    ],
)
def test_loading_takes_what_makes_sense(name: str, value: Any) -> None:
    assert "no/such/engine" in refused(lambda: Pipeline.load(**{"engine": "no/such/engine", name: value}))


@pytest.mark.parametrize(("name", "value"), rows(ASK))
def test_asking(pipeline: Pipeline, name: str, value: Any) -> None:
    given = {"video": FRAMES, "prompt": QUESTION, name: value}
    assert name in refused(lambda: pipeline.submit(**given))
    assert name in refused(lambda: next(pipeline.stream(**given)))
    if name in ("deadline", "frames", "system"):
        assert name in refused(lambda: pipeline.watch(FRAMES, **{name: value}))


@pytest.mark.parametrize("value", [pytest.param(v, id=f"{i}-{type(v).__name__}") for i, v in enumerate(VIDEOS)])
def test_videos(pipeline: Pipeline, value: Any) -> None:
    assert any(word in refused(lambda: pipeline.submit(value, QUESTION)) for word in ("video", "frame", "'.'", "addr"))
    refused(lambda: pipeline.watch(value))


def test_a_count_that_the_engine_lacks(pipeline: Pipeline) -> None:
    assert "takes 16 frames, not 7" in refused(lambda: pipeline.submit(FRAMES, QUESTION, frames=7))
    assert "context of 4096" in refused(lambda: pipeline.submit(FRAMES, QUESTION, max_new_tokens=10**30))


def test_a_prompt_of_a_megabyte(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pipeline._core.tokenizer), "__call__", lambda *_, **how: pytest.fail("it was tokenized"))
    assert "prompt" in refused(lambda: pipeline.submit(FRAMES, "x" * 1_000_000))
    assert "system" in refused(lambda: pipeline.submit(FRAMES, QUESTION, system="word " * 200_000))
    assert "system" in refused(lambda: pipeline.watch(FRAMES, system="word " * 200_000))


@pytest.mark.parametrize(
    "how",
    [
        {"deadline": np.float32(60)},
        {"deadline": 60, "max_new_tokens": np.int64(2)},
        {"sampling": None, "system": None, "frames": None, "deadline": None},
        {"sampling": Sampling(0.7, top_p=0.5, top_k=np.int64(3), seed=np.int64(5))},  # type: ignore[arg-type]
        {"frames": np.int32(16), "system": "Be brief."},
        {"deadline": 1e300},
    ],
)
def test_asking_takes_what_makes_sense(pipeline: Pipeline, how: dict[str, Any]) -> None:
    assert pipeline.ask(FRAMES, QUESTION, **{"max_new_tokens": 1, **how}).tokens


def test_none_samples_greedily(pipeline: Pipeline) -> None:
    greedy = pipeline.ask(FRAMES, QUESTION, max_new_tokens=4)
    assert pipeline.ask(FRAMES, QUESTION, max_new_tokens=4, sampling=None).tokens == greedy.tokens
    tiny = Sampling(temperature=1.0, top_p=1e-300)  # the best token alone is left
    assert pipeline.ask(FRAMES, QUESTION, max_new_tokens=4, sampling=tiny).tokens == greedy.tokens


@pytest.mark.parametrize("value", [pytest.param(v, id=f"{i}-{type(v).__name__}") for i, v in enumerate(NO_REAL)])
def test_a_timeout(pipeline: Pipeline, value: Any) -> None:
    with pipeline.submit(FRAMES, QUESTION, max_new_tokens=1) as request:
        assert "timeout" in refused(lambda: request.result(value))
        assert request.result(np.float32(LONG)).tokens
        assert request.result(-1).tokens  # it is there


@pytest.mark.parametrize(("name", "value"), rows(STREAM))
def test_opening_a_stream(chunked: Pipeline, name: str, value: Any) -> None:
    assert name in refused(lambda: chunked.open_stream(**{name: value}))


@pytest.mark.parametrize("value", [pytest.param(v, id=f"{i}-{type(v).__name__}") for i, v in enumerate(PUSHED)])
def test_pushing(chunked: Pipeline, value: Any) -> None:
    with chunked.open_stream(total=4) as video:
        assert "frame" in refused(lambda: video.push(value)) or value is True
        video.push(FRAMES)
        assert video.finish()


def test_a_live_video_is_not_ended_by_a_bad_question(chunked: Pipeline) -> None:
    with chunked.open_stream(total=4) as video:
        video.push(FRAMES[:2])
        assert "prompt" in refused(lambda: video.ask(""))
        assert "deadline" in refused(lambda: video.ask(QUESTION, deadline=-1))
        assert "system" in refused(lambda: video.watch(system=""))
        video.push(FRAMES[2:])
        assert "frames" in refused(lambda: video.ask(QUESTION, frames="8"))  # type: ignore[arg-type]
        assert video.ask(QUESTION, max_new_tokens=1, deadline=LONG).tokens
        for value in ("3", Decimal(5), -1):
            assert "deadline" in refused(lambda value=value: video.ask(QUESTION, deadline=value))  # type: ignore[misc]
        with pytest.raises(DeadlineExceeded):
            video.ask(QUESTION, deadline=1e-9)


def test_lists_of_frames_and_pictures(chunked: Pipeline) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures = [image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in FRAMES]
    wanted = chunked.ask(FRAMES, QUESTION, max_new_tokens=4).tokens
    for frames in (pictures, list(FRAMES), tuple(FRAMES.numpy()), [frame.permute(1, 2, 0).numpy() for frame in FRAMES]):
        assert chunked.ask(frames, QUESTION, max_new_tokens=4).tokens == wanted
        for pieces in ([frames], frames):  # all at once, and one by one
            with chunked.open_stream() as video:
                for piece in pieces:
                    video.push(piece)
                assert video.ask(QUESTION, max_new_tokens=4).tokens == wanted


@pytest.mark.parametrize(("name", "value"), rows(SAMPLING))
def test_sampling(name: str, value: Any) -> None:
    assert name in refused(lambda: Sampling(**{name: value}))


def test_sampling_keeps_plain_numbers() -> None:
    numbers: Any = (np.float32(0.5), np.float64(0.25), np.int8(3), np.uint64(5))
    made = Sampling(*numbers)
    assert (made.temperature, made.top_p, made.top_k, made.seed) == (0.5, 0.25, 3, 5)
    assert {type(made.temperature), type(made.top_p)} == {float}
    assert {type(made.top_k), type(made.seed)} == {int}
    assert Sampling(seed=2**63 - 1).greedy


@pytest.mark.parametrize(("name", "value"), rows(INNER))
def test_inner_merging(name: str, value: Any) -> None:
    assert name in refused(lambda: InnerMerge(**{"layer": 1, name: value}))


@pytest.mark.parametrize("value", ["yes", 1, None, Odd()])
def test_closing(pipeline: Pipeline, value: Any) -> None:
    assert "drain" in refused(lambda: pipeline.close(drain=value))
    assert not pipeline._scheduler._closing


def test_unknown_keywords_are_python_s(pipeline: Pipeline) -> None:
    for call in (pipeline.submit, pipeline.ask, lambda *args, **how: next(pipeline.stream(*args, **how))):
        with pytest.raises(TypeError, match="top_k"):
            call(FRAMES, QUESTION, top_k=5)
    with pytest.raises(TypeError, match="gpu"):
        Pipeline.load("no/such/engine", gpu=0)  # type: ignore[call-arg]


# What web frameworks hand over


class Named:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return os.fspath(self._path)


def test_a_video_in_every_form(pipeline: Pipeline, drawn_clip: Path) -> None:
    wanted = pipeline.ask(drawn_clip, QUESTION, max_new_tokens=4).tokens
    assert wanted != pipeline.ask(FRAMES, QUESTION, max_new_tokens=4).tokens  # negative control
    content = drawn_clip.read_bytes()
    for video in (str(drawn_clip), Named(drawn_clip), content, bytearray(content), memoryview(content)):
        assert pipeline.ask(video, QUESTION, max_new_tokens=4).tokens == wanted
    with drawn_clip.open("rb") as file:
        request = pipeline.submit(file, QUESTION, max_new_tokens=4)
    assert request.result(LONG).tokens == wanted  # the file is closed, and was read before
    assert pipeline.ask(io.BytesIO(content), QUESTION, max_new_tokens=4).tokens == wanted


def test_frames_in_every_layout(pipeline: Pipeline) -> None:
    wanted = pipeline.ask(FRAMES.flip(0), QUESTION, max_new_tokens=4).tokens
    turned = FRAMES.numpy()[::-1]  # negative strides, as of a view that was mirrored
    frozen = turned.copy()
    frozen.flags.writeable = False
    for frames in (turned, frozen, turned.transpose(0, 2, 3, 1), FRAMES.flip(0).to(memory_format=torch.channels_last)):
        assert pipeline.ask(frames, QUESTION, max_new_tokens=4).tokens == wanted


@pytest.mark.parametrize("form", ["bytes", "file"])
def test_a_watched_video_is_read_again_from_its_copy(pipeline: Pipeline, drawn_clip: Path, form: str) -> None:
    wanted = pipeline.ask(drawn_clip, QUESTION, max_new_tokens=4).tokens
    content = drawn_clip.read_bytes()
    with pipeline.watch(content if form == "bytes" else io.BytesIO(content)) as watched:
        assert watched.ask(QUESTION, max_new_tokens=4).tokens == wanted
        pipeline.watched.clear()
        assert not watched.held
        assert watched.ask(QUESTION, max_new_tokens=4).tokens == wanted


def test_limits_are_those_of_the_pipeline(engine: Path, drawn_clip: Path) -> None:
    with Pipeline.load(engine, device="cpu", limits=Limits(max_frames=10)) as limited:
        assert "--max-frames" in refused(lambda: limited.ask(drawn_clip, QUESTION))
    size = drawn_clip.stat().st_size
    with Pipeline.load(engine, device="cpu", limits=Limits(max_bytes=size - 1)) as limited:
        for video in (drawn_clip, drawn_clip.read_bytes(), io.BytesIO(drawn_clip.read_bytes())):
            assert "--max-bytes" in refused(lambda video=video: limited.submit(video, QUESTION))  # type: ignore[misc]


def test_a_clip_of_the_caller_s(pipeline: Pipeline) -> None:
    clip = Clip(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), (), 2, 0.0, 0.0, 0.0)
    assert "frames" in refused(lambda: pipeline.ask(clip, QUESTION))
    for frames in (None, [1], torch.zeros(2, 3, 8, 8), FRAMES.to_sparse()):
        odd = dataclasses.replace(clip, frames=frames)  # type: ignore[arg-type]
        assert "frames" in refused(lambda odd=odd: pipeline.submit(odd, QUESTION))  # type: ignore[misc]
