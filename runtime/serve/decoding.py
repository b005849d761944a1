"""Videos of strangers are decoded in a process of its own: what they break is that process, and one request.

    decoding = Decoders(limits, memory=4 << 30)
    clip = await decoding.clip(taken, counts, (384, 384))

The process is started afresh (nothing is forked), has a bound on its memory, knows no name of the file that it reads,
and ends with this one. What goes to it are open files and a line of JSON; what comes back are the bytes of the frames,
through memory that both have open, and a line of JSON that is believed no further than its numbers make sense. So a
decoder that a video has taken over can show wrong pictures and nothing more.

Whatever ends a decoder, a crash, its memory, its deadline, is an invalid video to the one who sent it; the next call
finds another. Who stops waiting ends the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earlytom.errors import UserError
from earlytom.numbers import real, shown, whole
from runtime.errors import VideoError
from runtime.serve.errors import ServeError
from runtime.serve.media import TakenVideo
from runtime.video import MIN_FRAMES, Clip, Limits, frames_for, load_clip, resize_frames, sample_indices
from runtime.video.limits import DEFAULT_LIMITS, remedy

_START_SECONDS = 300.0  # for the imports of a new process on a busy machine
_STOP_SECONDS = 1.0  # in which a decoder that is told to stop does, or is killed
_LONGEST = 1 << 20  # bytes of a message
_PICTURES = ("JPEG", "PNG")
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from runtime.serve.decoding import child; child()"
_log = logging.getLogger(__name__)


class Decoders:
    """The decoders. Belongs to one event loop.

    limits: how large a video may be. memory: bytes that decoding one may take, beyond what the process has at rest.
    seconds: after which a video is given up. workers: videos decoded at a time; more wait.
    """

    def __init__(
        self, limits: Limits = DEFAULT_LIMITS, memory: int = 4 << 30, *, seconds: float = 30.0, workers: int = 1
    ) -> None:
        self._limits = limits
        self._seconds = real("seconds", seconds, 0, low_open=True)
        memory = whole("memory", memory, 1)
        self._workers = [_Decoder(memory) for _ in range(whole("workers", workers, 1))]
        self._free: asyncio.Queue[_Decoder] = asyncio.Queue()
        for worker in self._workers:
            self._free.put_nowait(worker)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that run."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    async def start(self) -> None:
        """Start all decoders now, so that no video waits for it. Raises ServeError 503 where they do not start."""
        await asyncio.gather(*(worker.start() for worker in self._workers))

    async def clip(self, taken: TakenVideo, counts: int | Sequence[int], size: tuple[int, int]) -> Clip:
        """Sample a video as `load_clip` and `clip_from_frames` do; on the CPU.

        Raises:
            ServeError: 400 "invalid_video"; 503 where no decoder starts.
        """
        wanted = [int(count) for count in ([counts] if isinstance(counts, int) else counts)]
        size = (int(size[0]), int(size[1]))
        job = {
            "counts": counts if isinstance(counts, int) else wanted,
            "size": size,
            "limits": dataclasses.asdict(self._limits),
            "frames": None if taken.frames is None else [len(frame) for frame in taken.frames],
        }
        worker = await self._free.get()
        busy = False
        try:
            with contextlib.ExitStack() as files:
                out = files.enter_context(_shared_memory())
                given = taken.file if taken.file is not None else files.enter_context(_shared_memory())
                await worker.start()
                if taken.frames is not None:
                    await asyncio.to_thread(_write, given.fileno(), taken.frames)
                busy = True
                async with asyncio.timeout(self._seconds):
                    reply = await worker.ask(job, [given.fileno(), out.fileno()])
                busy = False
                if (error := reply.get("error")) is not None:
                    raise _invalid(str(error))
                return await asyncio.to_thread(_read_clip, reply, out.fileno(), wanted, size)
        except TimeoutError:
            worker.kill()
            what = f"takes longer than {self._seconds:g} s to decode; send a shorter one, or one of fewer pixels"
            raise _invalid(f"the video {what}") from None
        except _DeadError as error:
            worker.kill()
            _log.warning("a video has ended its decoder: %s", error)
            raise _invalid("the video cannot be decoded: it ends the decoder; re-encode it") from error
        except OSError as error:  # of this process: no memory, no descriptor
            raise ServeError(
                503, "overloaded", "there is no room for the video; try again later", retry_after=5
            ) from error
        finally:
            self._begin(self._release(worker, busy))

    async def close(self) -> None:
        """End all decoders."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            worker.kill()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, worker: _Decoder, busy: bool) -> None:
        """Make a decoder fit for the next video: stop what it does, replace it where it is gone."""
        try:
            if busy:
                await worker.stop()
            with contextlib.suppress(ServeError):  # who asks next is told
                await worker.start()
        finally:
            self._free.put_nowait(worker)


class _DeadError(Exception):
    """The process is gone, or says what makes no sense."""


class _Decoder:
    """One process at a time, and this end of the line to it."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._asked = 0
        self._line: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the process if there is none that runs. Raises ServeError 503."""
        if self.process is not None and self.process.poll() is None:
            return
        self.kill()
        try:
            self._open()
            async with asyncio.timeout(_START_SECONDS):
                await self._receive()
        except (OSError, TimeoutError, _DeadError) as error:
            self.kill()
            _log.error("the decoder does not start: %s", error)
            raise ServeError(503, "overloaded", "the decoder does not start; try again later", retry_after=5) from error
        except BaseException:
            self.kill()
            raise

    async def ask(self, job: dict[str, Any], files: list[int]) -> dict[str, Any]:
        """Send a job and return its reply. Raises _DeadError."""
        self._asked += 1
        await self._send({**job, "number": self._asked}, files)
        reply = await self._receive()
        if reply.get("number") != self._asked:
            raise _DeadError("it answers another question")
        return reply

    async def stop(self) -> None:
        """End what it does: by a word if it listens, else altogether."""
        if self.process is None:
            return
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._send({"stop": True}, [])
                await self._receive()
        except (TimeoutError, _DeadError):
            self.kill()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        process, line = self.process, self._line
        self.process = self._line = None
        if line is not None:
            line.close()
        if process is not None:
            process.kill()
            process.wait()  # at once, after a kill

    def _open(self) -> None:
        self._line, theirs = socket.socketpair()
        with theirs:
            self._line.setblocking(False)
            words = [json.dumps(sys.path), str(theirs.fileno()), str(self._memory)]
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the server's
            )

    async def _send(self, message: dict[str, Any], files: list[int]) -> None:
        content, line = json.dumps(message).encode(), self._line
        if line is None:
            raise _DeadError("it was ended")
        try:
            # The line is empty, so this does not wait.
            socket.send_fds(line, [len(content).to_bytes(4, "big")], files)
            await asyncio.get_running_loop().sock_sendall(line, content)
        except OSError as error:
            raise _DeadError(str(error)) from error

    async def _receive(self) -> dict[str, Any]:
        length = int.from_bytes(await self._exactly(4), "big")
        if length > _LONGEST:
            raise _DeadError("it says too much")
        try:
            message = json.loads(await self._exactly(length))
        except (ValueError, RecursionError) as error:
            raise _DeadError("it says what is no JSON") from error
        if not isinstance(message, dict):
            raise _DeadError("it says what makes no sense")
        return message

    async def _exactly(self, count: int) -> bytes:
        content, line = b"", self._line
        while len(content) < count:
            try:
                part = b"" if line is None else await asyncio.get_running_loop().sock_recv(line, count - len(content))
            except OSError as error:
                raise _DeadError(str(error)) from error
            if not part:
                raise _DeadError(f"it ended{self._status()}")
            content += part
        return content

    def _status(self) -> str:
        if self.process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f" with status {self.process.wait(0.1)}"
        return ""


def _read_clip(reply: dict[str, Any], out: int, counts: list[int], size: tuple[int, int]) -> Clip:
    """The clip in a reply, and its frames. Raises _DeadError for what a sound decoder does not say."""
    try:
        said = reply["clip"]
        count = whole("frames", said["frames"], 1)
        times = tuple(real("a time", time) for time in said["timestamps"])
        if count not in counts or len(times) not in (0, count):
            raise _DeadError("it says another number of frames")
        frames = np.empty((count, 3, *size), np.uint8)
        # Copied, not mapped: the other side may change its file, or make it shorter, at any time.
        if _read_into(out, frames) != frames.nbytes:
            raise _DeadError("it gave fewer frames than it says")
        return Clip(
            frames=torch.from_numpy(frames),
            timestamps=times,
            source_frames=whole("source_frames", said["source_frames"], 0),
            duration=real("duration", said["duration"], 0),
            decode_seconds=real("decode_seconds", said["decode_seconds"], 0),
            preprocess_seconds=real("preprocess_seconds", said["preprocess_seconds"], 0),
        )
    except (KeyError, TypeError, UserError) as error:
        raise _DeadError("it says what makes no sense") from error


def _read_into(file: int, frames: np.ndarray[Any, Any]) -> int:
    """Bytes read from the beginning of a file."""
    view, done = frames.data.cast("B"), 0
    while done < len(view) and (count := os.preadv(file, [view[done:]], done)):
        done += count
    return done


def _shared_memory() -> Any:
    """A file in memory, or where there are none such, on the disk; without a name."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("frames"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _write(file: int, parts: Sequence[bytes | memoryview]) -> None:
    at = 0
    for part in parts:
        left = memoryview(part)
        while left:
            count = os.pwrite(file, left, at)
            left, at = left[count:], at + count


def _invalid(what: str) -> ServeError:
    return ServeError(400, "invalid_video", what, param="messages")


# The other side: what follows runs in the decoder's process.


def child() -> None:
    """Decode what is asked for until the other end of the line is closed. The words: path, line, memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = socket.socket(fileno=int(sys.argv[2]))
    threading.Thread(target=_end_with_parent, args=(line,), daemon=True).start()
    _bound_memory(int(sys.argv[3]))
    _tell(line, {"ready": True})
    while (heard := _hear(line)) is not None:
        job, files = heard
        reply = _reply(job, files, line) if "counts" in job else None
        for file in files:
            os.close(file)
        if reply is not None:
            _tell(line, {**reply, "number": job["number"]})


def _end_with_parent(line: socket.socket) -> None:
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


class _StopError(Exception):
    """The caller has left."""


def _reply(job: dict[str, Any], files: list[int], line: socket.socket) -> dict[str, Any]:
    given, out = files
    path = f"/proc/self/fd/{given}" if Path("/proc/self/fd").is_dir() else f"/dev/fd/{given}"

    def check() -> None:
        if select.select([line], [], [], 0)[0]:
            raise _StopError

    try:
        limits, counts, size = Limits(**job["limits"]), job["counts"], tuple(job["size"])
        if job["frames"] is None:
            clip = load_clip(Path(path), counts, size, limits=limits, check=check)
        else:
            clip = _from_pictures(given, job["frames"], counts, size, limits, check)
        _write(out, [clip.frames.contiguous().numpy().data.cast("B")])
        said = {name: getattr(clip, name) for name in ("timestamps", "source_frames", "duration")}
        said |= {name: getattr(clip, name) for name in ("decode_seconds", "preprocess_seconds")}
        return {"clip": {"frames": len(clip.frames), **said}}
    except UserError as error:
        return {"error": str(error).replace(repr(path), "the video").replace(path, "the video")}
    except _StopError:
        return {"error": "nobody waits for it"}
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
    check: Callable[[], None],
) -> Clip:
    """Frames that came as pictures, one behind the other. Only those shown are decoded; the others must fit them."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limit is checked below, before anything is decoded
    if len(lengths) < MIN_FRAMES:
        raise VideoError(f"the frame list has {len(lengths)} frame; a video has at least {MIN_FRAMES}")
    if limits.max_frames is not None and len(lengths) > limits.max_frames:
        raise VideoError(f"the frame list has more than {limits.max_frames} frames; {remedy('max_frames')}")
    chosen = sample_indices(len(lengths), frames_for(len(lengths), counts))
    rows = {index: row for row, index in enumerate(np.unique(chosen).tolist())}
    frames = torch.empty(len(rows), 3, *size, dtype=torch.uint8)
    first: tuple[int, int] | None = None
    at = 0
    for index, length in enumerate(lengths):
        check()
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
    head, files, _, _ = socket.recv_fds(line, 4, 2)
    content = b"" if not head else head + _rest(line, 4 - len(head))
    if len(content) < 4:
        return None
    return json.loads(_rest(line, int.from_bytes(content, "big"))), files


def _rest(line: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count and (part := line.recv(count - len(content))):
        content += part
    return content
