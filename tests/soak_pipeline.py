"""Everything that callers do to one pipeline, at once and for long: every answer has to be the right one.

    python -m tests.soak_pipeline SECONDS SEED

Sixteen threads ask, stream slowly, cancel, drop, give deadlines, watch, push live frames, and pass videos in every
form, broken ones and arguments that make no sense among them, to a pipeline of a tiny engine that is built here. What
is answered is compared with what one caller alone was answered before. Counted as failures are wrong answers, errors of
a kind that is not documented for what was done, requests that hang, and memory, descriptors or threads that grow. The
last line is one JSON object; the exit status is 1 when anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import gc
import io
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from earlytom.errors import UserError
from earlytom.numbers import real, whole
from runtime import cli
from runtime.drawing.clips import draw_clip
from runtime.errors import Cancelled, Closed, DeadlineExceeded, Overloaded
from runtime.measure.memory import resident
from runtime.pipeline import Pipeline, Request
from runtime.video import load_clip

THREADS = 16
WAITING = 6  # fewer than there are callers, so that some find the line full
HANG = 120.0  # seconds that a request may take
TOKENS = 6
QUESTIONS = ("What happens?", "How many balls are there?", "Which digit is on the circle?")
GROWTH = 64 << 20  # bytes that the resident memory may grow from the middle to the end
ENGINE = ["--frames", "8", "--chunk", "2", "--ratio", "0.3", "--fp32", "--backend", "onnx", "--no-verify", "--json"]


T = TypeVar("T")


class WrongError(Exception):
    """Something that must not be."""


@dataclasses.dataclass(frozen=True)
class Video:
    """One video in the forms in which callers have it, and what is answered about it, by kind of request."""

    path: Path
    content: bytes
    frames: Tensor  # uint8 [n, 3, h, w]: other frames than the file's, of which only the sampled ones are there
    answers: dict[tuple[str, str], tuple[int, ...]]  # (kind, question) -> tokens


def prepare(pipeline: Pipeline, folder: Path) -> list[Video]:
    """Three videos, and the answers that one caller gets, alone."""
    videos = []
    for seed in range(3):
        path = draw_clip(folder / f"{seed}.mp4", 1 + seed, seed=seed)
        frames = load_clip(path, 10 + seed, (60, 80)).frames
        video = Video(path, path.read_bytes(), frames, {})
        for question in QUESTIONS:
            for kind, given in (("file", path), ("frames", frames)):
                video.answers[kind, question] = pipeline.ask(given, question, max_new_tokens=TOKENS).tokens
        with pipeline.watch(path) as watched, pipeline.open_stream(total=len(frames)) as live:
            live.push(frames)
            for question in QUESTIONS:
                video.answers["watched", question] = watched.ask(question, max_new_tokens=TOKENS).tokens
                video.answers["live", question] = live.ask(question, max_new_tokens=TOKENS).tokens
        videos.append(video)
    return videos


class Caller(threading.Thread):
    """One caller, who does one thing after the other until `until`; what it did is a function of its seed."""

    def __init__(self, pipeline: Pipeline, videos: Sequence[Video], seed: int, until: float) -> None:
        super().__init__(daemon=True, name=f"caller-{seed}")
        self.pipeline, self.videos, self.until = pipeline, videos, until
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.doing = "nothing"
        self.overloaded = 0

    def run(self) -> None:
        while time.monotonic() < self.until:
            name, action = self.chance.choice(ACTIONS)
            self.doing = name
            try:
                self.done[f"{name}: {self.in_line(lambda action=action: action(self))}"] += 1  # type: ignore[misc]
            except BaseException as error:
                self.failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        self.doing = "nothing"

    def in_line(self, call: Callable[[], T]) -> T:
        """A line that is full is told, and tried again."""
        end = time.monotonic() + HANG
        while True:
            try:
                return call()
            except Overloaded:
                self.overloaded += 1
                if time.monotonic() > end:
                    raise
                time.sleep(self.chance.uniform(0.01, 0.2))

    def pick(self) -> tuple[Video, str]:
        return self.chance.choice(self.videos), self.chance.choice(QUESTIONS)

    def form(self, video: Video) -> tuple[str, Any]:
        """The video in one of its forms, and the kind of answer that it gets."""
        forms: list[tuple[str, Callable[[], Any]]] = [
            ("file", lambda: str(video.path)),
            ("file", lambda: video.path),
            ("file", lambda: video.content),
            ("file", lambda: io.BytesIO(video.content)),
            ("frames", lambda: video.frames),
            ("frames", lambda: video.frames.permute(0, 2, 3, 1).numpy()),
            ("frames", lambda: list(video.frames.permute(0, 2, 3, 1).numpy())),
        ]
        kind, make = self.chance.choice(forms)
        return kind, make()

    def compare(self, video: Video, kind: str, question: str, tokens: Sequence[int]) -> str:
        if tuple(tokens) != video.answers[kind, question]:
            raise WrongError(
                f"{video.path.name}, {kind}, {question!r}: {tokens} and not {video.answers[kind, question]}"
            )
        return "answered"

    def submitted(self, **how: Any) -> tuple[Video, str, str, Request]:
        video, question = self.pick()
        kind, given = self.form(video)
        return video, kind, question, self.pipeline.submit(given, question, max_new_tokens=TOKENS, **how)


def ask(caller: Caller) -> str:
    video, kind, question, request = caller.submitted()
    return caller.compare(video, kind, question, request.result(HANG).tokens)


def read_slowly(caller: Caller) -> str:
    video, kind, question, request = caller.submitted(deadline=HANG)
    tokens = []
    for delta in request:
        time.sleep(caller.chance.uniform(0, 0.02))
        if delta.token is not None:
            tokens.append(delta.token)
    return caller.compare(video, kind, question, tokens)


def cancel(caller: Caller) -> str:
    video, kind, question, request = caller.submitted()
    time.sleep(caller.chance.choice([0, 0.001, 0.02, 0.1]))
    request.cancel()
    try:
        return caller.compare(video, kind, question, request.result(HANG).tokens)
    except Cancelled:
        return "cancelled"


def drop(caller: Caller) -> str:
    video, question = caller.pick()
    stream = caller.pipeline.stream(caller.form(video)[1], question, max_new_tokens=TOKENS)
    if caller.chance.random() < 0.5:
        next(stream)
    stream.close()
    return "dropped"


def hurry(caller: Caller) -> str:
    try:
        video, kind, question, request = caller.submitted(deadline=caller.chance.choice([0.001, 0.01, 0.1, 0.5]))
        return caller.compare(video, kind, question, request.result(HANG).tokens)
    except DeadlineExceeded:
        return "late"


def watch(caller: Caller) -> str:
    video, _ = caller.pick()
    given = caller.chance.choice([video.path, video.content])
    with caller.pipeline.watch(given, deadline=HANG) as watched:
        for _ in range(caller.chance.randrange(1, 4)):
            question = caller.chance.choice(QUESTIONS)
            request = caller.in_line(lambda question=question: watched.submit(question, max_new_tokens=TOKENS))  # type: ignore[misc]
            caller.compare(video, "watched", question, request.result(HANG).tokens)
    return "answered"


def push_live(caller: Caller) -> str:
    video, question = caller.pick()
    known = caller.chance.random() < 0.5
    with caller.pipeline.open_stream(total=len(video.frames) if known else None) as live:
        for frame in video.frames:
            live.push(frame)
            if caller.chance.random() < 0.02:
                return "left"
        request = caller.in_line(lambda: live.submit(question, max_new_tokens=TOKENS))
        return caller.compare(video, "live", question, request.result(HANG).tokens)


def bad_video(caller: Caller) -> str:
    video, question = caller.pick()
    content = video.content
    bad: list[Any] = [
        *(
            "no/such.mp4",
            "",
            None,
            b"",
            b"no video at all" * 50,
            content[: len(content) // 2],
            io.BytesIO(b"text" * 99),
        ),
        *("http://example.org/clip.mp4", video.frames[:1], video.frames.float(), video.frames.to("meta"), [1, 2], {}),
    ]
    try:
        request = caller.pipeline.submit(caller.chance.choice(bad), question)
        request.result(HANG)
    except Overloaded:
        raise
    except UserError as error:
        if "\n" in str(error):
            raise WrongError(f"more than one line: {error}") from error
        return "refused"
    raise WrongError("a bad video was answered")


def bad_argument(caller: Caller) -> str:
    video, question = caller.pick()
    bad: list[dict[str, Any]] = [
        *({"deadline": value} for value in (10**400, "3", float("nan"), -1, True)),
        *({"max_new_tokens": value} for value in (0, 1.5, "3", 10**30, True)),
        *({"frames": value} for value in ("8", 7, 8.0, True)),
        *({"sampling": value} for value in ({}, 1.0)),
        *({"system": value} for value in ("", 3, b"")),
        *({"prompt": value} for value in ("", None, "<video>", "word " * 100_000)),
    ]
    try:
        caller.pipeline.submit(**{"video": video.path, "prompt": question, **caller.chance.choice(bad)})
    except Overloaded:
        raise
    except UserError as error:
        if "\n" in str(error):
            raise WrongError(f"more than one line: {error}") from error
        return "refused"
    raise WrongError("a bad argument was taken")


# Those that are done more often stand there more than once.
ACTIONS: list[tuple[str, Callable[[Caller], str]]] = [
    *[("ask", ask)] * 4,
    *[("read slowly", read_slowly)] * 2,
    *[("cancel", cancel)] * 2,
    ("drop", drop),
    *[("deadline", hurry)] * 2,
    ("watch", watch),
    ("live", push_live),
    ("bad video", bad_video),
    ("bad argument", bad_argument),
]


@dataclasses.dataclass(frozen=True)
class Held:
    """What the process holds at one moment."""

    resident: int | None
    descriptors: int | None
    threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        folder = "/proc/self/fd"
        return cls(resident(), len(os.listdir(folder)) if os.path.isdir(folder) else None, threading.active_count())


def soak(engine: Path, seconds: float, seed: int, threads: int = THREADS) -> dict[str, Any]:
    """The record of a run; `failures` in it is empty if all went well."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pipeline = stack.enter_context(Pipeline.load(engine, device="cpu", waiting=WAITING, watch_bytes=8 << 20))
        videos = prepare(pipeline, folder)
        before, until = Held.now(), time.monotonic() + seconds
        callers = [Caller(pipeline, videos, 1000 * seed + number, until) for number in range(threads)]
        for caller in callers:
            caller.start()
        sizes: list[int] = []
        while time.monotonic() < until:
            time.sleep(min(1.0, max(0.0, until - time.monotonic())))
            sizes.append(resident() or 0)
        failures = _joined(callers)
        failures += [line for caller in callers for line in caller.failures]
        if not any(caller.is_alive() for caller in callers):
            failures += _compare(before, Held.now(), sizes)
            failures += close_while_asked(pipeline, videos)
    done: Counter[str] = sum((caller.done for caller in callers), Counter())
    return {
        "seconds": seconds,
        "seed": seed,
        "threads": threads,
        "done": dict(sorted(done.items())),
        "total": sum(done.values()),
        "overloaded": sum(caller.overloaded for caller in callers),
        "held_before": dataclasses.asdict(before),
        "held_after": dataclasses.asdict(Held.now()),
        "failures": failures,
    }


def _joined(callers: Sequence[Caller]) -> list[str]:
    """Wait for the callers to come to an end; what those that do not are doing."""
    end = time.monotonic() + 2 * HANG
    for caller in callers:
        caller.join(max(0.0, end - time.monotonic()))
    hanging = [f"hangs: {caller.name} in {caller.doing!r}" for caller in callers if caller.is_alive()]
    if hanging:
        faulthandler.dump_traceback(all_threads=True)
    return hanging


def _compare(before: Held, after: Held, sizes: Sequence[int]) -> list[str]:
    found = []
    third = len(sizes) // 3
    if third >= 10:  # a short run says nothing of memory
        growth = statistics.median(sizes[-third:]) - statistics.median(sizes[third : 2 * third])
        if growth > GROWTH:
            found.append(f"memory grew by {growth / 2**20:.0f} MiB from the middle to the end")
    for name in ("descriptors", "threads"):
        if getattr(after, name) != getattr(before, name):
            found.append(f"{name}: {getattr(before, name)} before and {getattr(after, name)} after")
    return found


def close_while_asked(pipeline: Pipeline, videos: Sequence[Video]) -> list[str]:
    """Close it with a full line: each request ends, answered or with `Closed`, and so does closing."""
    requests = [pipeline.submit(videos[0].path, QUESTIONS[0], max_new_tokens=TOKENS) for _ in range(WAITING)]
    closing = threading.Thread(target=pipeline.close, daemon=True)
    closing.start()
    failures = []
    for request in requests:
        try:
            request.result(HANG)
        except Closed:
            continue
        except BaseException as error:
            failures.append(f"closing: {type(error).__name__}: {error}")
    closing.join(HANG)
    return failures + (["hangs: close()"] if closing.is_alive() else [])


def build(folder: Path) -> Path:
    """The engine, of the bundled model, for ONNX Runtime and for frames as they come."""
    from builder import build as builder

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        builder.main([*ENGINE, "--out", str(folder)])
    return Path(json.loads(printed.getvalue())["folder"])


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="python -m tests.soak_pipeline", description=(__doc__ or "").splitlines()[0])
    p.add_argument("seconds", type=float, metavar="SECONDS")
    p.add_argument("seed", type=int, metavar="SEED")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 1 if anything failed."""
    options = parser().parse_args(argv)
    seconds, seed = real("SECONDS", options.seconds, 0, low_open=True), whole("SEED", options.seed, 0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        record = soak(build(Path(folder)), seconds, seed)
    screen = cli.Screen()
    screen.table(("what", "times"), list(record["done"].items()))
    for line in Counter(record["failures"]).most_common(20):
        screen.line(f"FAILED {line[1]} times: {line[0]}")
    screen.result(record)
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
