"""Checks what a caller gives as a video, and brings it to one form, before it is queued.

Looks at files, bytes and frames from outside only; `runtime.video.opening` opens videos.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from earlytom.numbers import shown
from runtime.errors import VideoError
from runtime.video.clip import Clip
from runtime.video.frames import channels_first, stack_frames
from runtime.video.limits import DEFAULT_LIMITS, Limits, remedy

_COPIED = 1 << 20  # bytes at a time
_NAMED = 400  # characters of a name in a message
# One slash is enough: pathlib drops the second. A single letter is a drive.
_ADDRESS = re.compile(r"(?i)(?:([a-z][a-z0-9+.-]+):/|(data):)")
_OPEN_FILES = Path("/proc/self/fd")
_TAKEN = (
    "give the path of a video file, its content as bytes or as a file opened in binary mode, or its frames as uint8 "
    "[n, height, width, 3]"
)


class Spooled:
    """A copy of a video's content in its own file, unnamed where the system supports it, deleted with the last
    reference to it."""

    def __init__(self, label: str) -> None:
        self.label = label  # its name in messages
        # An unnamed file is gone even after a crash; where open files have no path, a named one is needed.
        make: Any = tempfile.TemporaryFile if _OPEN_FILES.is_dir() else tempfile.NamedTemporaryFile
        self._file: Any = make()
        self.size = 0  # bytes

    @property
    def path(self) -> str:
        """Its path, for this process only, to be opened any number of times."""
        return str(_OPEN_FILES / str(self._file.fileno())) if _OPEN_FILES.is_dir() else self._file.name

    def write(self, content: bytes | bytearray | memoryview, limits: Limits) -> None:
        """Append. Raises VideoError above `limits.max_bytes`."""
        self.size += len(content)
        _check_size(self.label, self.size, limits)
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            reason = error.strerror or "it failed"
            raise VideoError(
                f"{self.label} cannot be copied to {tempfile.gettempdir()!r} ({reason}); make room there, or give the "
                "path of a file"
            ) from error

    def close(self) -> None:
        """Delete the copy now."""
        self._file.close()

    def __repr__(self) -> str:
        return f"<{self.label}, {self.size} bytes>"


def take_video(
    video: Any, limits: Limits = DEFAULT_LIMITS, *, check: Callable[[], object] | None = None
) -> Path | Spooled | Tensor | NDArray[np.uint8] | Clip:
    """Check what a caller gives as a video, and bring it to one form.

    video: the path of a file (str or any os.PathLike), its content (bytes, bytearray, memoryview, or a binary file
        object, which is read from where it stands), frames (see `clip_from_frames`), or a Clip.
    check: called while content is copied; what it raises ends that.

    Nothing is decoded, and no file is opened: it may be a pipe. Content goes to a `Spooled` file. Frames stay where
    they are, but a list of them is stacked: a tensor [n, 3, h, w].

    Raises VideoError, or UserError for frames, for anything that cannot be a video, with what to give instead.
    """
    if isinstance(video, Clip | Spooled):
        return video
    if isinstance(video, Tensor | np.ndarray):
        channels_first(video)
        return video
    if isinstance(video, bytes | bytearray | memoryview):
        return _from_bytes(video, limits)
    if isinstance(video, str | os.PathLike):
        return _existing_file(video, limits)
    if isinstance(video, list | tuple):
        return channels_first(stack_frames(video))
    if hasattr(video, "read"):
        return _from_file(video, limits, check)
    what = "None" if video is None else f"{shown(video)} ({type(video).__name__})"
    raise VideoError(f"the video is {what}; {_TAKEN}")


def label_of(source: Path | Spooled) -> str:
    """The source's name in messages, quoted, so that a line break in it is escaped."""
    return source.label if isinstance(source, Spooled) else _name(os.fspath(source))


def _existing_file(path: str | os.PathLike[Any], limits: Limits) -> Path:
    text = os.fsdecode(path)
    if not text:
        raise VideoError(f"the video is {text!r}; {_TAKEN}")
    source, name = Path(text), _name(text)
    try:
        status = source.stat()
    except (OSError, ValueError) as error:
        _refuse_address(text)
        reason = getattr(error, "strerror", None) or "not a valid name"
        raise VideoError(f"video {name} cannot be opened ({reason}); give the path of a video file") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{name} is a folder or a device; give the path of a video file")
    if status.st_size == 0:
        raise VideoError(f"{name} is empty (0 bytes); copy or download it again")
    _check_size(name, status.st_size, limits)
    return source


def _refuse_address(text: str) -> None:
    """Raises VideoError if the name of a missing file is a URL."""
    match = _ADDRESS.match(text)
    if match is None:
        return
    scheme = (match[1] or match[2]).lower()
    if scheme == "file":
        raise VideoError(f"{_name(text)} is an address; give the path alone, without file://")
    what = "save what it holds as a file" if scheme == "data" else "download it"
    raise VideoError(f"{_name(text)} is an address, which is not fetched; {what} and give the path of the file")


def _from_bytes(content: bytes | bytearray | memoryview, limits: Limits) -> Spooled:
    view = memoryview(content)
    if not view.nbytes:
        raise VideoError("the video given as bytes is empty (0 bytes); give the content of a video file")
    flat = view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
    if len(flat) < os.pathconf("/", "PC_PATH_MAX") and _is_name(flat.tobytes()):
        raise VideoError(f"the video is {shown(bytes(flat))}; bytes are the content of a file: give its path as a str")
    spooled = Spooled("the video given as bytes")
    spooled.write(flat, limits)
    return spooled


def _is_name(content: bytes) -> bool:
    try:
        return os.path.lexists(content)
    except ValueError:  # a zero in it
        return False


def _from_file(file: IO[bytes], limits: Limits, check: Callable[[], object] | None) -> Spooled:
    kind = type(file).__name__
    label = f"the video given as a {kind}"
    if getattr(file, "closed", False) is True:
        raise VideoError(f"{label} is closed; give it before it is closed, or its path")
    if isinstance(file, io.TextIOBase):
        raise VideoError(f'{label} is opened as text; open it in binary mode: open(path, "rb")')
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream has no position
        label += f" from byte {at} on" if (at := file.tell()) else ""
    spooled = Spooled(label)
    while content := _read(file, label):
        if check is not None:
            check()
        spooled.write(content, limits)
    if not spooled.size:
        raise VideoError(f"{label} has nothing to read: it is empty or at its end; call its seek(0) first")
    return spooled


def _read(file: IO[bytes], label: str) -> bytes:
    try:
        content: Any = file.read(_COPIED)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise VideoError(f"{label} cannot be read ({shown(error)}); give the path of a video file") from error
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content)
    if inspect.iscoroutine(content):
        content.close()
        raise VideoError(f"{label} reads asynchronously; give its content: await its read(), and pass the bytes")
    what = "no bytes yet" if content is None else f"a {type(content).__name__} instead of bytes"
    raise VideoError(f"{label} gives {what}; give a file opened in binary mode that waits for its content")


def _check_size(name: str, size: int, limits: Limits) -> None:
    if limits.max_bytes is not None and size > limits.max_bytes:
        raise VideoError(f"{name} has more than {limits.max_bytes} bytes (max_bytes); {remedy('max_bytes')}")


def _name(text: str) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= _NAMED else f"{quoted[: _NAMED // 2]}...{quoted[-_NAMED // 2 :]}"
