"""The side of a decoder that sees videos: a process that sees none, and for each video one that sees no other.

The first has imported everything and waits. What it hears, a line of JSON with three open files, it leaves to a fork
of itself, which is as ready as it is after a few milliseconds. The fork says on a line of its own that it has begun,
writes the frames into the second file and says what they are. It has no other line, and ends with the video: whatever a
video does to it, nothing of that is left when the next one comes. It ends, too, when nobody holds the other end of its
line any more, or when the first process ends.

It believes the server and nothing of the video.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from earlytom.errors import UserError
from earlytom.families import FrameSampling
from earlytom.numbers import shown
from runtime.errors import VideoError
from runtime.video import MIN_FRAMES, Clip, Limits, frames_for, load_clip, resize_frames, sample_indices
from runtime.video.limits import remedy

BEGUN = "begun"  # what is said before a video is opened
_PICTURES = ("JPEG", "PNG")
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_log = logging.getLogger(__name__)


def run() -> None:
    """Have videos decoded until the other end of the line is closed. The words: path, line, memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line, memory, parent = socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]), os.getpid()
    _tell(line, {"ready": True})
    while (heard := _hear(line)) is not None:
        job, files = heard
        if (process := os.fork()) == 0:
            line.close()
            _see(job, files, memory, parent)
        for file in files:
            os.close(file)
        _, status = os.waitpid(process, 0)
        _tell(line, {"ended": os.waitstatus_to_exitcode(status)})


def _see(job: dict[str, Any], files: list[int], memory: int, parent: int) -> NoReturn:
    """Decode one video and end."""
    try:
        given, out, theirs = files
        line = socket.socket(fileno=theirs)
        _end_with(parent)
        threading.Thread(target=_end_with_caller, args=(line,), daemon=True).start()
        _bound_memory(memory)
        _tell(line, {BEGUN: True})
        _tell(line, _reply(job, given, out))
    finally:
        os._exit(0)  # nothing of the first process is to be tidied up here


def _end_with(parent: int) -> None:
    """Let the system end this process with the one that forked it; it may be killed while this one is busy."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it was already
        os._exit(0)


def _end_with_caller(line: socket.socket) -> None:
    """Nobody waits for the answer any more, however busy this process is with it."""
    poll = select.poll()
    poll.register(line.fileno(), getattr(select, "POLLRDHUP", select.POLLHUP))
    poll.poll()
    os._exit(0)


def _bound_memory(memory: int) -> None:
    """Bound the memory, where the system can; and if the machine runs out of it, this process goes first."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("900")
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


def _reply(job: dict[str, Any], given: int, out: int) -> dict[str, Any]:
    path = f"/proc/self/fd/{given}" if Path("/proc/self/fd").is_dir() else f"/dev/fd/{given}"
    try:
        limits, counts, size = Limits(**job["limits"]), job["counts"], tuple(job["size"])
        if job["frames"] is None:
            clip = load_clip(Path(path), counts, size, limits=limits, sampling=job["sampling"])
        else:
            clip = _from_pictures(given, job["frames"], counts, size, limits, job["sampling"])
        write(out, [clip.frames.contiguous().numpy().data.cast("B")])
        said = {name: getattr(clip, name) for name in ("timestamps", "source_frames", "duration")}
        said |= {name: getattr(clip, name) for name in ("decode_seconds", "preprocess_seconds")}
        return {"clip": {"frames": len(clip.frames), **said}}
    except UserError as error:
        return {"error": str(error).replace(repr(path), "the video").replace(path, "the video")}
    except MemoryError:
        return {"error": "the video needs more memory than decoding one may take; send one of fewer pixels"}
    except Exception as error:
        _log.exception("a video cannot be decoded")
        return {"error": f"the video cannot be decoded ({type(error).__name__}); re-encode it"}


def _from_pictures(
    file: int,
    lengths: list[int],
    counts: int | list[int],
    size: tuple[int, int],
    limits: Limits,
    sampling: FrameSampling,
) -> Clip:
    """Frames that came as pictures, one behind the other. Only those shown are decoded; the others must fit them."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limit is checked below, before anything is decoded
    if len(lengths) < MIN_FRAMES:
        raise VideoError(f"the frame list has {len(lengths)} frame; a video has at least {MIN_FRAMES}")
    if limits.max_frames is not None and len(lengths) > limits.max_frames:
        raise VideoError(f"the frame list has more than {limits.max_frames} frames; {remedy('max_frames')}")
    chosen = sample_indices(len(lengths), frames_for(len(lengths), counts), sampling)
    rows = {index: row for row, index in enumerate(np.unique(chosen).tolist())}
    frames = torch.empty(len(rows), 3, *size, dtype=torch.uint8)
    first: tuple[int, int] | None = None
    at = 0
    for index, length in enumerate(lengths):
        try:
            image = Image.open(io.BytesIO(os.pread(file, length, at)), formats=_PICTURES)
        except Exception as error:
            raise VideoError(f"frame {index} is no picture that can be read; send frames as JPEG") from error
        at += length
        first = first or image.size
        if limits.max_pixels is not None and image.width * image.height > limits.max_pixels:
            what = f"frame {index} has {image.width}x{image.height} pixels, more than {limits.max_pixels} (max_pixels)"
            raise VideoError(f"{what}; {remedy('max_pixels')}")
        if image.size != first:
            other, one = ("x".join(map(str, sides)) for sides in (image.size, first))
            raise VideoError(f"frame 0 is {one} and frame {index} is {other}; send frames of one size")
        if index in rows:
            frames[rows[index]] = resize_frames(_pixels(image, index), size)[0]
    return Clip(
        frames=frames[torch.from_numpy(np.unique(chosen, return_inverse=True)[1])],
        timestamps=(),
        source_frames=len(lengths),
        duration=0.0,
        decode_seconds=0.0,
        preprocess_seconds=0.0,
    )


def _pixels(image: Any, index: int) -> torch.Tensor:
    """uint8 [1, 3, h, w]"""
    try:
        array = np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # of any kind, by how the picture is broken
        raise VideoError(f"frame {index} cannot be decoded ({shown(str(error))}); send it again") from error
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def _tell(line: socket.socket, message: dict[str, Any]) -> None:
    content = json.dumps(message).encode()
    line.sendall(len(content).to_bytes(4, "big") + content)


def _hear(line: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and the files that came with it; None where the line is closed."""
    head, files, _, _ = socket.recv_fds(line, 4, 3)
    content = b"" if not head else head + _rest(line, 4 - len(head))
    if len(content) < 4:
        return None
    return json.loads(_rest(line, int.from_bytes(content, "big"))), files


def _rest(line: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count and (part := line.recv(count - len(content))):
        content += part
    return content


def write(file: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write parts one behind the other, from the beginning of a file."""
    at = 0
    for part in parts:
        left = memoryview(part)
        while left:
            count = os.pwrite(file, left, at)
            left, at = left[count:], at + count
