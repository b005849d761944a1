"""Gets the video of a request, in whatever form it is given, as a private file or a list of frames, with its SHA-256.

    media = Media(rules, max_video, files)
    with await media.take(VideoPart(url="data:video/mp4;base64,..."), key=key) as taken:
        ...

A URL is fetched (`runtime.serve.fetch`), a data URL is decoded outside the event loop, an uploaded file's id is looked
up among the caller's own. Nothing here decodes a video.

Files are unnamed where the system supports it, so that nothing is left after a crash and no other process can open
them.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import os
import re
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from earlytom.numbers import shown, whole
from runtime.serve.errors import ServeError, no_room, one_line
from runtime.serve.fetch import FetchRules, Resolve, fetch, resolve

# A media type, ignored parameters (browsers write codecs=vp8,opus), and ";base64".
_DATA = re.compile(r"(?i)data:([a-z0-9.+_-]+/[a-z0-9.+_-]+)((?:;[^;]*)*?; ?base64)?,")
_LONGEST_HEAD = 200  # characters of a data URL before its comma
_FRAMES = ("video/jpeg", "video/png")  # frames as pictures, separated by commas
_MOST_FRAMES = 4096
_SLICE = 1 << 20  # base64 characters (a multiple of 4) decoded per call, so that other threads can run in between
_BLOCK = 1 << 20  # bytes of an upload per read
_OPEN_FILES = Path("/proc/self/fd")
Pictures = list[bytes]  # encoded frames as they came
_EXAMPLE = "data:video/mp4;base64,..."


@dataclass(frozen=True)
class VideoPart:
    """How a request gives its video: one of the two."""

    url: str = ""  # http, https, or data with a video or with frames
    file: str = ""  # id of an uploaded file


@dataclass
class TakenVideo:
    """A received video: in a file or as encoded frames. Must be closed; `path` is invalid afterwards."""

    sha256: str
    bytes: int
    frames: Pictures | None = None
    file: PrivateFile | None = None

    @property
    def path(self) -> Path | None:
        """The file's path, for this process only."""
        return None if self.file is None else self.file.path

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def __enter__(self) -> TakenVideo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class PrivateFile:
    """A file of mode 0600 that is deleted on close, with its length and SHA-256 so far.

    Raises:
        ServeError: 413 above `limit` bytes, 503 where the disk is full.
    """

    def __init__(self, limit: int) -> None:
        make: Any = tempfile.TemporaryFile if _OPEN_FILES.is_dir() else tempfile.NamedTemporaryFile
        self._file: Any = make(prefix="earlytom-", buffering=0)
        self._limit = limit
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def path(self) -> Path:
        return _OPEN_FILES / str(self._file.fileno()) if _OPEN_FILES.is_dir() else Path(self._file.name)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, content: bytes, /) -> None:
        self.size += len(content)
        if self.size > self._limit:
            raise _too_large(self._limit)
        self._digest.update(content)
        left = memoryview(content)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise no_room() from error

    def again(self) -> PrivateFile:
        """A read-only handle to the same content, to be closed separately."""
        other = object.__new__(PrivateFile)
        other.__dict__.update(self.__dict__)
        if _OPEN_FILES.is_dir():
            other._file = os.fdopen(os.dup(self._file.fileno()), "rb", buffering=0)
        else:
            other._file = self.path.open("rb", buffering=0)
        return other

    def close(self) -> None:
        self._file.close()


class Media:
    """Takes the videos that requests name.

    rules: of fetching; its `max_bytes` holds for addresses. max_video: bytes of a video that came with the request.
    files: uploaded ones.
    """

    def __init__(
        self,
        rules: FetchRules,
        max_video: int = 256 << 20,
        files: FileStore | None = None,
        *,
        resolve: Resolve = resolve,
    ) -> None:
        self._rules, self._files, self._resolve = rules, files, resolve
        self._max_video = whole("--max-video", max_video, 1)

    async def take(self, part: VideoPart, *, key: str = "") -> TakenVideo:
        """Get the video of a request; `key` is the id of the caller's key.

        Raises:
            ServeError: 400 "video_not_allowed", "video_fetch_failed" or "invalid_video"; 404 "file_not_found"; 413.
        """
        if part.file:
            if self._files is None:
                raise _no_file(part.file)
            return self._files.take(part.file, key)
        if part.url[:5].lower() == "data:":
            return await self._from_data(part.url)
        file = PrivateFile(self._rules.max_bytes)
        try:
            await fetch(part.url, self._rules, file, resolve=self._resolve)
        except BaseException:
            file.close()
            raise
        return TakenVideo(file.sha256, file.size, file=file)

    async def _from_data(self, url: str) -> TakenVideo:
        match = _DATA.match(url[:_LONGEST_HEAD])
        if match is None:
            raise _invalid(f"the video's data URL does not begin as {_EXAMPLE}: {shown(url)}")
        kind = match[1].lower()
        if match[2] is None:
            raise _invalid(f"the video's data URL is not base64; write {_EXAMPLE}, got {shown(match[0])}")
        if not kind.startswith("video/"):
            raise _invalid(f"the video's data URL is of type {kind}; give a video: {_EXAMPLE}")
        if kind in _FRAMES:
            return await asyncio.to_thread(_decode_frames, url, match.end(), self._max_video)
        file = PrivateFile(self._max_video)
        try:
            await asyncio.to_thread(_decode, url, match.end(), len(url), file.write, self._max_video, "the video")
        except BaseException:
            file.close()
            raise
        return TakenVideo(file.sha256, file.size, file=file)


def _decode_frames(url: str, start: int, limit: int) -> TakenVideo:
    """The pictures of a frame list."""
    if url.count(",", start) >= _MOST_FRAMES:
        raise _invalid(f"the frame list has more than {_MOST_FRAMES} frames; send fewer of them")
    frames: Pictures = []
    digest, size = hashlib.sha256(b"frames\0"), 0  # with lengths, so that it differs from any other list or file
    while start <= len(url):
        end = url.find(",", start)
        end = len(url) if end < 0 else end
        parts: list[bytes] = []
        _decode(url, start, end, parts.append, limit - size, f"frame {len(frames)}")
        frames.append(b"".join(parts))
        digest.update(len(frames[-1]).to_bytes(8, "big") + frames[-1])
        size += len(frames[-1])
        start = end + 1
    if len(frames) < 2:
        raise _invalid("the frame list has 1 frame; a video has at least 2, with commas between them")
    return TakenVideo(digest.hexdigest(), size, frames=frames)


def _decode(url: str, start: int, end: int, write: Callable[[bytes], object], limit: int, what: str) -> None:
    """Strict base64: whole groups of four, padding at the end and nowhere else, no line breaks."""
    if start == end:
        raise _invalid(f"{what} in the data URL is empty (0 bytes)")
    if (end - start) // 4 * 3 - 2 > limit:
        raise _too_large(limit)
    for at in range(start, end, _SLICE):
        part = url[at : min(at + _SLICE, end)]
        try:
            content = binascii.a2b_base64(part.encode("ascii"), strict_mode=True)
        except ValueError as error:  # of both
            raise _invalid(
                f"{what} in the data URL is not base64: characters A to Z, a to z, 0 to 9, +, / and ="
            ) from error
        if at + _SLICE < end and part.endswith("="):
            raise _invalid(f"{what} in the data URL is not base64: it goes on after its end (=)")
        write(content)


@dataclass(frozen=True)
class StoredFile:
    """An uploaded video."""

    id: str
    name: str  # from the client
    key: str  # id of the uploader's key
    created: float  # seconds since 1970
    content: PrivateFile = field(repr=False)
    purpose: str = "user_data"  # from the client

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.content.size,
            "created_at": int(self.created),
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """Uploaded videos, each visible to its uploader's key only.

    Every key has the same share of files and bytes. When that is used up, the key's least recently used file is
    deleted; uploads never delete another key's files. Belongs to one event loop.

    max_bytes, max_files: of all together. owners: number of keys. max_file: bytes of one file.
    """

    def __init__(
        self, max_bytes: int = 1 << 30, max_files: int = 64, *, owners: int = 1, max_file: int = 256 << 20
    ) -> None:
        owners = whole("owners", owners, 1)
        self._share = whole("max_bytes", max_bytes, 1) // owners
        self._count = max(1, whole("max_files", max_files, 1) // owners)
        self._max_file = min(whole("--max-video", max_file, 1), self._share)
        self._files: OrderedDict[str, StoredFile] = OrderedDict()  # the one not used for the longest is first

    async def put(
        self, read: Callable[[int], Awaitable[bytes]], *, name: str, key: str = "", purpose: str = "user_data"
    ) -> StoredFile:
        """Store the blocks of `read(size)` until it returns none.

        Raises:
            ServeError: 400 "invalid_video" for an empty file; 413.
        """
        content = PrivateFile(self._max_file)
        try:
            while block := await read(_BLOCK):
                await asyncio.to_thread(content.write, block)
            if not content.size:
                raise ServeError(400, "invalid_video", "the file is empty (0 bytes)", param="file")
        except BaseException:
            content.close()
            raise
        told = [one_line(text)[:200] for text in (name, purpose)]
        stored = StoredFile("file-" + secrets.token_hex(12), told[0], key, time.time(), content, told[1])
        self._make_room(key, content.size)
        self._files[stored.id] = stored
        return stored

    def get(self, file_id: str, key: str = "") -> StoredFile:
        """The caller's file of this id; ServeError 404 if there is none, even if another key has it."""
        stored = self._files.get(file_id)
        if stored is None or stored.key != key:
            raise _no_file(file_id)
        return stored

    def of(self, key: str = "") -> list[StoredFile]:
        """The caller's files, the newest first."""
        return sorted((one for one in self._files.values() if one.key == key), key=lambda one: -one.created)

    def take(self, file_id: str, key: str = "") -> TakenVideo:
        """The video of a file; it stays valid until closed, even if the file is deleted."""
        stored = self.get(file_id, key)
        self._files.move_to_end(file_id)
        return TakenVideo(stored.content.sha256, stored.content.size, file=stored.content.again())

    def delete(self, file_id: str, key: str = "") -> None:
        """Raises ServeError 404 as `get` does."""
        self.get(file_id, key)
        self._files.pop(file_id).content.close()

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].content.close()

    def _make_room(self, key: str, size: int) -> None:
        own = [one for one in self._files.values() if one.key == key]
        used = sum(one.content.size for one in own)
        while own and (used + size > self._share or len(own) >= self._count):
            oldest = own.pop(0)
            used -= oldest.content.size
            self.delete(oldest.id, key)


def _no_file(file_id: str) -> ServeError:
    return ServeError(
        404, "file_not_found", f"there is no file {shown(file_id)}; upload it with POST /v1/files", param="file"
    )


def _invalid(what: str) -> ServeError:
    return ServeError(400, "invalid_video", what, param="messages")


def _too_large(limit: int) -> ServeError:
    return ServeError(
        413, "request_too_large", f"the video has more than {limit} bytes (--max-video)", param="messages"
    )
