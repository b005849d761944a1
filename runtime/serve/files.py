"""Videos that clients upload once to ask about often: POST, GET and DELETE /v1/files.

Each lies in a private folder, which is made for the first and removed with the last; the folder goes when the server
ends. A file is its owner's: for everybody else it does not exist.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runtime.serve.errors import ServeError

_PIECE = 1 << 20  # bytes that are copied at a time


@dataclass(frozen=True)
class Uploaded:
    """An uploaded file.

    Attributes:
        id: what its owner calls it; name: what it was called there.
        created: seconds since 1970.
    """

    id: str
    owner: str
    name: str
    purpose: str
    path: Path
    sha256: str
    bytes: int
    created: int

    def described(self) -> dict[str, Any]:
        """As OpenAI's files are."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class Files:
    """Uploaded files of one server. Any thread may call anything.

    Args:
        max_bytes: of one file; most: of one owner's files; total: bytes of all files.
        folder: where the private folder is made; default the system's for temporary files.
    """

    def __init__(self, *, max_bytes: int, most: int, total: int, folder: Path | None = None) -> None:
        self._max_bytes, self._most, self._total, self._parent = max_bytes, most, total, folder
        self._lock = threading.Lock()
        self._files: dict[str, Uploaded] = {}
        self._folder: Path | None = None
        self._coming = 0  # bytes that are being copied

    def add(self, owner: str, name: str, purpose: str, content: IO[bytes], size: int) -> Uploaded:
        """Keep a file.

        Raises:
            ServeError: 400, it is empty; 413, it is larger than a file may be; 429, there is no room for it.
            OSError: it cannot be written.
        """
        if not size:
            raise ServeError(400, "invalid_request", "the file is empty", param="file")
        if size > self._max_bytes:
            what = f"the file has {size} bytes, and a video may have {self._max_bytes}"
            raise ServeError(413, "request_too_large", what, param="file")
        name = "".join(c if c.isprintable() else " " for c in name)[:200]
        path = self._reserve(owner, size)
        try:
            digest = _copy(content, path)
            made = Uploaded(
                f"file-{secrets.token_hex(12)}", owner, name, purpose, path, digest, size, int(time.time())
            )
            with self._lock:
                self._files[made.id] = made
            return made
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            with self._lock:
                self._coming -= size
                self._tidy()

    def get(self, owner: str, id: str) -> Uploaded:
        """An owner's file. Raises ServeError, 404, if there is none of that id."""
        with self._lock:
            found = self._files.get(id)
        if found is None or found.owner != owner:
            raise ServeError(404, "file_not_found", f"there is no file {id[:60]!r}; GET /v1/files lists them")
        return found

    def of(self, owner: str) -> list[Uploaded]:
        """An owner's files, the oldest first."""
        with self._lock:
            return [one for one in self._files.values() if one.owner == owner]

    def remove(self, owner: str, id: str) -> None:
        """Delete an owner's file. Raises ServeError as `get`."""
        found = self.get(owner, id)
        with self._lock:
            self._files.pop(id, None)
            found.path.unlink(missing_ok=True)  # whoever has it open reads on
            self._tidy()

    def close(self) -> None:
        """Delete all files."""
        with self._lock:
            self._files.clear()
            self._tidy()

    def _reserve(self, owner: str, size: int) -> Path:
        """Where a file of so many bytes may be written."""
        with self._lock:
            if sum(one.owner == owner for one in self._files.values()) >= self._most:
                what = f"there are {self._most} files already; delete one with DELETE /v1/files/ID"
                raise ServeError(429, "too_many_files", what, retry_after=60)
            if sum(one.bytes for one in self._files.values()) + self._coming + size > self._total:
                what = f"all files may have {self._total} bytes together; delete one with DELETE /v1/files/ID"
                raise ServeError(429, "too_many_files", what, retry_after=60)
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="earlytom-", dir=self._parent))  # for nobody else to read
            self._coming += size
            return self._folder / secrets.token_hex(12)

    def _tidy(self) -> None:
        """Remove the folder if nothing is in it; with the lock held."""
        if self._folder is not None and not self._files and not self._coming:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _copy(content: IO[bytes], path: Path) -> str:
    """Write a content to a new file; its sha256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        while piece := content.read(_PIECE):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
