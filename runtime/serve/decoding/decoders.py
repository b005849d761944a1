"""Decodes each untrusted video in its own process, so that a malicious one can break only that process and one request.

    decoding = Decoders(limits, memory=4 << 30)
    clip = await decoding.clip(taken, counts, (384, 384))

A decoder is a new process (not a fork of this one) that forks for each video. The fork has a memory limit, does not
know the name of the file it reads, and exits after its video. It gets open files and a JSON message; it returns the
frames' bytes through shared memory, and a JSON message whose numbers are checked. So a compromised fork can return
wrong pictures of its own video and nothing more: it never sees another.

Whatever ends a fork (a crash, its memory limit, its deadline) is an invalid video to the client; the next call gets a
new fork. Cancelling a call ends its fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
import torch

from earlytom.errors import UserError
from earlytom.families import FrameSampling
from earlytom.numbers import real, whole
from runtime.serve.decoding.child import write
from runtime.serve.errors import ServeError, no_room
from runtime.serve.media import TakenVideo
from runtime.video import Clip, Limits
from runtime.video.limits import DEFAULT_LIMITS

_START_SECONDS = 300.0  # for the imports of a new process on a busy machine
_STOP_SECONDS = 1.0  # in which a fork must end after its video, else all is killed
_LONGEST = 1 << 20  # bytes of a message
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from runtime.serve.decoding import child; child.run()"
)
_log = logging.getLogger(__name__)


class Decoders:
    """A pool of decoders. Belongs to one event loop.

    limits: the largest video. memory: bytes that decoding one may take, beyond those of the idle process.
    seconds: deadline of one video. workers: videos decoded concurrently; more wait.
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
        self._closed = False

    @property
    def processes(self) -> list[int]:
        """Ids of the running decoder processes."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    async def start(self) -> None:
        """Start all decoders now, so that no video waits for it. Raises ServeError 503 if one does not start."""
        await asyncio.gather(*(worker.start() for worker in self._workers))

    async def clip(
        self, taken: TakenVideo, counts: int | Sequence[int], size: tuple[int, int], sampling: FrameSampling = "ends"
    ) -> Clip:
        """Decode and sample a video as `load_clip` and `clip_from_frames` do; on the CPU.

        Raises:
            ServeError: 400 "invalid_video"; 503 where no decoder starts.
        """
        wanted = [int(count) for count in ([counts] if isinstance(counts, int) else counts)]
        size = (int(size[0]), int(size[1]))
        job = {
            "counts": counts if isinstance(counts, int) else wanted,
            "size": size,
            "sampling": sampling,
            "limits": dataclasses.asdict(self._limits),
            "frames": None if taken.frames is None else [len(frame) for frame in taken.frames],
        }
        worker = await self._free.get()
        try:
            with contextlib.ExitStack() as files:
                out = files.enter_context(_shared_memory())
                given = taken.file if taken.file is not None else files.enter_context(_shared_memory())
                if taken.frames is not None:
                    await asyncio.to_thread(write, given.fileno(), taken.frames)
                for attempt in range(2):
                    await worker.start()
                    try:
                        async with asyncio.timeout(self._seconds):
                            reply = await worker.ask(job, [given.fileno(), out.fileno()])
                        break
                    except _AtRestError:
                        worker.kill()
                        if attempt:
                            raise
                if (error := reply.get("error")) is not None:
                    raise _invalid(str(error))
                return await asyncio.to_thread(_read_clip, reply, out.fileno(), wanted, size)
        except TimeoutError:
            what = f"takes longer than {self._seconds:g} s to decode; send a shorter one, or one of fewer pixels"
            raise _invalid(f"the video {what}") from None
        except _DeadError as error:
            _log.warning("a video has ended its decoder: %s", error)
            raise _invalid("the video cannot be decoded: it ends the decoder; re-encode it") from error
        except OSError as error:  # of this process: no memory, no descriptor
            raise no_room() from error
        finally:
            if not self._closed:
                self._begin(self._release(worker))

    async def close(self) -> None:
        """End all decoders; `clip` must not be called afterwards."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            worker.kill()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, worker: _Decoder) -> None:
        """Make a decoder ready for the next video: wait for its last fork to end, and restart it if necessary."""
        try:
            await worker.rest()
            with contextlib.suppress(ServeError):  # the next call raises it
                await worker.start()
        finally:
            self._free.put_nowait(worker)


class _DeadError(Exception):
    """The process has ended, or sent an invalid message."""


class _AtRestError(_DeadError):
    """The process ended before it saw the video, so the video is not at fault."""


class _Decoder:
    """One decoder process at a time, and this end of the socket to it."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._busy = False  # a fork may still run
        self._line: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the process unless it is running. Raises ServeError 503."""
        if self.process is not None and self.process.poll() is None:
            return
        self.kill()
        try:
            line = self._open()
            async with asyncio.timeout(_START_SECONDS):
                await self._receive(line)
        except (OSError, TimeoutError, _DeadError) as error:
            self.kill()
            _log.error("the decoder does not start: %s", error)
            raise ServeError(503, "overloaded", "the decoder does not start; try again later", retry_after=5) from error
        except BaseException:
            self.kill()
            raise

    async def ask(self, job: dict[str, Any], files: list[int]) -> dict[str, Any]:
        """Send a job and return the reply. Raises _DeadError, _AtRestError."""
        mine, theirs = socket.socketpair()
        with mine:  # closing it ends the fork
            mine.setblocking(False)
            try:
                with theirs:
                    await self._send(job, [*files, theirs.fileno()])
                await self._receive(mine)
            except _DeadError as error:
                # A dying process looks alive until its last thread ends, so only its "begun" message counts.
                raise _AtRestError(str(error)) from error
            return await self._receive(mine)

    async def rest(self) -> None:
        """Wait until the last fork has ended and another is ready; if it does not end in time, kill the decoder."""
        if not self._busy or self._line is None:
            return
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._receive(self._line)
            self._busy = False
        except (TimeoutError, _DeadError):
            self.kill()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        process, line = self.process, self._line
        self.process = self._line = None
        self._busy = False
        if line is not None:
            line.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its forks, too
            process.wait()  # returns at once after the kill

    def _open(self) -> socket.socket:
        self._line, theirs = socket.socketpair()
        with theirs:
            self._line.setblocking(False)
            words = [json.dumps(sys.path), str(theirs.fileno()), str(self._memory)]
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches the server only, and forks can be killed with it
            )
        return self._line

    async def _send(self, message: dict[str, Any], files: list[int]) -> None:
        content, line = json.dumps(message).encode(), self._line
        if line is None:
            raise _DeadError("it was ended")
        self._busy = True
        try:
            # The socket's buffer is empty, so this does not block.
            socket.send_fds(line, [len(content).to_bytes(4, "big")], files)
            await asyncio.get_running_loop().sock_sendall(line, content)
        except OSError as error:
            raise _DeadError(str(error)) from error

    async def _receive(self, line: socket.socket) -> dict[str, Any]:
        length = int.from_bytes(await self._exactly(line, 4), "big")
        if length > _LONGEST:
            raise _DeadError("it says too much")
        try:
            message = json.loads(await self._exactly(line, length))
        except (ValueError, RecursionError) as error:
            raise _DeadError("it says what is no JSON") from error
        if not isinstance(message, dict):
            raise _DeadError("it says what makes no sense")
        return message

    async def _exactly(self, line: socket.socket, count: int) -> bytes:
        content = b""
        while len(content) < count:
            try:
                part = await asyncio.get_running_loop().sock_recv(line, count - len(content))
            except OSError as error:
                raise _DeadError(str(error)) from error
            if not part:
                raise _DeadError("it ended")
            content += part
        return content


def _read_clip(reply: dict[str, Any], out: int, counts: list[int], size: tuple[int, int]) -> Clip:
    """The clip of a reply, with its frames. Raises _DeadError for a reply that no intact decoder sends."""
    try:
        said = reply["clip"]
        count = whole("frames", said["frames"], 1)
        times = tuple(real("a time", time) for time in said["timestamps"])
        if count not in counts or len(times) not in (0, count):
            raise _DeadError("it says another number of frames")
        frames = np.empty((count, 3, *size), np.uint8)
        # Copied, not mapped: the other process may change or truncate the file at any time.
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
    """An unnamed file in memory, or on disk where the system has none."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("frames"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _invalid(what: str) -> ServeError:
    return ServeError(400, "invalid_video", what, param="messages")
