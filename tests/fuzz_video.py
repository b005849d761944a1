"""Broken video files by the thousand: each has to become frames or one line, quickly and in little memory.

    python -m tests.fuzz_video N SEED

Valid small clips of a dozen containers are written, broken in ways that depend on SEED alone, and loaded with small
limits by a child process. Counted are crashes of the child, files that take longer than 10 seconds, exceptions other
than UserError, and memory that grows. The last line is one JSON object; the exit status is 1 when anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from earlytom.errors import UserError
from runtime.video import Limits, load_clip

HANG = 10.0  # seconds
GROWTH = 400 << 10  # KiB by which one file may raise the peak of memory
LIMITS = Limits(max_pixels=1 << 20, max_frames=5000, max_seconds=3600, max_bytes=16 << 20)
COUNT, HEIGHT, WIDTH = 24, 48, 64
CLIPS: dict[str, dict[str, Any]] = {  # a file's name -> codec, format of pixels, options of encoder and muxer
    "h264.mp4": {"codec": "libx264"},
    "fragments.mp4": {"codec": "libx264", "muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "mjpeg.mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "h264.mkv": {"codec": "libx264"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "h264.flv": {"codec": "libx264"},
    "h264.ts": {"codec": "libx264"},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "colours.gif": {"codec": "gif", "pixels": "rgb8"},
    "wmv2.asf": {"codec": "wmv2"},
    "parts.mjpeg": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "bare.h264": {"codec": "libx264"},
    "mpeg4.nut": {"codec": "mpeg4"},
    "vp8.ivf": {"codec": "libvpx", "options": {"deadline": "realtime"}},
}


def write_clips(folder: Path) -> list[Path]:
    """The valid clips, but for those that this FFmpeg has no encoder for."""
    paths = []
    for name, made in CLIPS.items():
        if made["codec"] not in av.codecs_available:
            continue
        path = folder / name
        with av.open(str(path), "w", options=made.get("muxer", {})) as container:
            stream: Any = container.add_stream(made["codec"], rate=24, options=made.get("options", {}))
            stream.height, stream.width, stream.gop_size = HEIGHT, WIDTH, 8
            stream.pix_fmt = made.get("pixels", "yuv420p")
            for index in range(COUNT):
                y, x = np.mgrid[:HEIGHT, :WIDTH]
                grey = (x * 4 + y + 9 * index) % 256
                image = np.stack([grey, 255 - grey, grey // 2], axis=-1).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        paths.append(path)
    return paths


# ----------------------------------------------------------------------------------------------------- breaking a file


def _place(data: bytearray, rng: random.Random) -> int:
    """A position: half of them in the header, where formats keep what they believe."""
    return rng.randrange(min(len(data), 600) if rng.random() < 0.5 else len(data))


def _flip_bits(data: bytearray, rng: random.Random, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _set_run(data: bytearray, rng: random.Random, other: bytes) -> None:
    at, length = _place(data, rng), rng.choice((1, 2, 4, 8, 100))
    data[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f", rng.randbytes(1))) * length


def _set_noise(data: bytearray, rng: random.Random, other: bytes) -> None:
    at, length = _place(data, rng), rng.choice((1, 4, 16, 200))
    data[at : at + length] = rng.randbytes(length)


def _truncate(data: bytearray, rng: random.Random, other: bytes) -> None:
    del data[rng.randrange(1, max(2, len(data))) :]


def _cut_out(data: bytearray, rng: random.Random, other: bytes) -> None:
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 2, 7, 188, 1000))]


def _repeat(data: bytearray, rng: random.Random, other: bytes) -> None:
    at, length = _place(data, rng), rng.choice((4, 188, 1000, len(data)))
    data[at:at] = data[at : at + length]


def _swap(data: bytearray, rng: random.Random, other: bytes) -> None:
    length = rng.choice((8, 188, 500))
    a, b = sorted((_place(data, rng), _place(data, rng)))
    if a + length <= b:
        data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


def _splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    data[rng.randrange(1, max(2, len(data))) :] = other[rng.randrange(len(other)) :]


def _set_number(data: bytearray, rng: random.Random, other: bytes) -> None:
    size = rng.choice((2, 4, 8))
    value = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 10**9, rng.getrandbits(8 * size)))
    at = rng.randrange(min(len(data), 2000))
    data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, rng.choice(("big", "little")))


BREAKS: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    _flip_bits,
    _flip_bits,
    _set_run,
    _set_noise,
    _truncate,
    _cut_out,
    _repeat,
    _swap,
    _splice,
    _set_number,
    _set_number,
)


def broken(clips: list[Path], seed: int, index: int) -> tuple[Path, bytes]:
    """File `index` of a run: the clip that it was made from, and its content."""
    rng = random.Random(f"{seed} {index}")
    path, other = rng.choice(clips), rng.choice(clips)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(BREAKS)(data, rng, other.read_bytes())
        if not data:
            data = bytearray(1)
    return path, bytes(data)


# ------------------------------------------------------------------------------------------------------------- loading


def load_all(folder: Path, seed: int, start: int, stop: int) -> None:
    """The child: a line when a file begins and a line with what became of it."""
    clips = sorted(path for path in folder.iterdir() if path.name in CLIPS)
    load_clip(clips[0], 4, (24, 24))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(start, stop):
        print(json.dumps({"begins": index}), flush=True)
        path, content = broken(clips, seed, index)
        target = folder / f"broken {path.name}"
        target.write_bytes(content)
        began, told = time.perf_counter(), ""
        try:
            load_clip(content if index % 8 == 0 else target, 4, (24, 24), limits=LIMITS)
            outcome = "frames"
        except UserError as error:
            outcome = "one line" if "\n" not in str(error) else "traceback"
            told = str(error)
        except Exception:
            outcome, told = "traceback", traceback.format_exc()
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now - peak > GROWTH:
            outcome, told = "memory", f"{(now - peak) >> 10} MiB more; {told}"
        peak = max(peak, now)
        took = time.perf_counter() - began
        line = {"ends": index, "clip": path.name, "outcome": outcome, "seconds": took, "told": told}
        print(json.dumps(line), flush=True)


def _lines(child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What the child says. Ends when it has ended, or has said nothing for too long; then it is killed."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            arrived.put(line)
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    patience = 120.0  # it imports torch first, on a machine that may be busy
    with contextlib.suppress(queue.Empty):
        while (line := arrived.get(timeout=patience)) is not None:
            yield json.loads(line)
            patience = HANG
        return
    child.kill()


def run(count: int, seed: int, folder: Path) -> tuple[Counter[tuple[str, str]], list[dict[str, Any]]]:
    """Load `count` broken files. Returns (clip, outcome) -> how many, and the failures."""
    clips = write_clips(folder)
    tally: Counter[tuple[str, str]] = Counter()
    failures: list[dict[str, Any]] = []
    index = 0
    while index < count:
        command = [sys.executable, "-m", "tests.fuzz_video", str(count), str(seed)]
        child = subprocess.Popen(
            [*command, "--child", str(folder), "--start", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        begun = index
        for line in _lines(child):
            if "begins" in line:
                begun = line["begins"]
                continue
            index = line["ends"] + 1
            tally[line["clip"], line["outcome"]] += 1
            if line["outcome"] not in ("frames", "one line"):
                failures.append(line)
        status = child.wait()
        if index < count:  # the child did not get through file `begun`
            outcome = "hang" if status == -9 else "crash"
            clip = broken(clips, seed, begun)[0].name
            tally[clip, outcome] += 1
            failures.append({"ends": begun, "clip": clip, "outcome": outcome, "told": f"status {status}"})
            index = begun + 1
    return tally, failures


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tests.fuzz_video", description=__doc__)
    p.add_argument("count", type=int, help="how many broken files")
    p.add_argument("seed", type=int)
    p.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--start", type=int, default=0, help="the first file; the earlier ones are left out")
    return p


def main(words: list[str]) -> int:
    given = parser().parse_args(words)
    if given.child:
        load_all(given.child, given.seed, given.start, given.count)
        return 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally, failures = run(given.count, given.seed, Path(folder))
    outcomes = ("frames", "one line", "traceback", "hang", "crash", "memory")
    print(f"{'clip':15}" + "".join(f"{name:>10}" for name in outcomes))
    for clip in sorted({clip for clip, _ in tally}):
        print(f"{clip:15}" + "".join(f"{tally[clip, name]:10}" for name in outcomes))
    for failure in failures[:20]:
        print(f"file {failure['ends']}, {failure['clip']}, {failure['outcome']}: {failure['told']}")
    totals = {name: sum(n for (_, outcome), n in tally.items() if outcome == name) for name in outcomes}
    seconds = round(time.perf_counter() - began, 1)
    print(json.dumps({"files": given.count, "seed": given.seed, **totals, "seconds": seconds}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
