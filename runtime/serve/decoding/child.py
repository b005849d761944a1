"""The decoder process: a parent that never sees a video, and a fork of it for each video.

The parent has imported everything; its fork waits for a job: a JSON message on the shared socket, with three open
files. The fork reports that it is ready, and closes the shared socket when it has a job. Through the third file, a
socket of its own, it reports that it has begun, writes the frames into the second file and sends their description. It
exits after one video, so that nothing a video does to it can affect the next one, for which the parent forks again. A
fork also ends when the other end of its socket is closed, or when the parent ends.

It trusts the server, and nothing in a video.
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
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from earlytom.errors import UserError
from earlytom.families import FrameSampling
from earlytom.numbers import shown
from runtime.drawing.clips import draw_clip
from runtime.errors import VideoError
from runtime.video import MIN_FRAMES, Clip, Limits, frames_for, load_clip, resize_frames, sample_indices
from runtime.video.limits import remedy

BEGUN = "begun"  # the message before a video is opened
_PICTURES = ("JPEG", "PNG")
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_NO_MORE = 3  # exit status: the shared socket is closed
_READY, _TAKEN = b"r", b"t"  # a fork's messages to the parent
_log = logging.getLogger(__name__)


def run() -> None:
    """Decode videos until the other end of the socket is closed. Arguments (argv): path, socket, memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line, memory, parent = socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]), os.getpid()
    _warm_up()
    announced = False
    while True:
        told, tell = os.pipe2(os.O_NONBLOCK)
        if (process := os.fork()) == 0:
            _see_one(line, tell, memory, parent, announced)
        os.close(tell)
        _, status = os.waitpid(process, 0)
        if os.waitstatus_to_exitcode(status) == _NO_MORE:
            return
        with os.fdopen(told, "rb") as words:
            said = words.read()
        # A fork that ended while waiting has reported "ready" without taking a job: the next must not report again.
        announced = said == _READY or (announced and not said)


def _warm_up() -> None:
    """Decode a clip of our own, so that no fork pays for the initialisation of a first decoding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork would wait for ever for the parent's threads
    with contextlib.suppress(UserError, OSError), tempfile.TemporaryDirectory() as folder:  # no encoder, no disk
        load_clip(draw_clip(Path(folder, "clip.mp4"), seconds=0.5, size=(64, 64)), 4, (32, 32))
    torch.set_num_threads(threads)


def _see_one(line: socket.socket, tell: int, memory: int, parent: int, announced: bool) -> NoReturn:
    """Wait for a job, decode its video and exit; the fork is made before the job arrives."""
    status = _NO_MORE  # unless a job arrives
    try:
        _end_with(parent)
        _bound_memory(memory)
        if not announced:
            _tell(line, {"ready": True})
        os.write(tell, _READY)
        if (heard := _hear(line)) is not None:
            status = 0
            job, (given, out, theirs) = heard
            line.close()
            os.write(tell, _TAKEN)
            own = socket.socket(fileno=theirs)
            threading.Thread(target=_end_with_caller, args=(own,), daemon=True).start()
            _tell(own, {BEGUN: True})
            _tell(own, _reply(job, given, out))
    finally:
        os._exit(status)  # without the parent's exit handlers


def _end_with(parent: int) -> None:
    """Have the system kill this process when its parent ends, also while it is busy."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(0)


def _end_with_caller(line: socket.socket) -> None:
    """Exit when the caller closes its end of the socket, also while this process is busy."""
    poll = select.poll()
    poll.register(line.fileno(), getattr(select, "POLLRDHUP", select.POLLHUP))
    poll.poll()
    os._exit(0)


def _bound_memory(memory: int) -> None:
    """Limit this process's memory, where the system can, and make it the first to be killed when memory runs out."""
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
    """A clip from frames as pictures, one after the other in `file`. Only sampled frames are decoded; the others' sizes
    are checked."""
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
    """The next message and its files; None if the socket is closed."""
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
    """Write parts one after the other, from the beginning of a file."""
    at = 0
    for part in parts:
        left = memoryview(part)
        while left:
            count = os.pwrite(file, left, at)
            left, at = left[count:], at + count
