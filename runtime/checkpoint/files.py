"""The files of a checkpoint in a local folder. A checkpoint is untrusted: sizes are bounded.

`Files` does not interpret contents: it lists files, reads JSON and hashes contents. A subclass fetches files from the
hub (`runtime.checkpoint.hub`). A file that is missing, too large, broken or only a Git LFS pointer raises a `UserError`
of one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from earlytom.errors import UserError
from earlytom.numbers import shown

SETTINGS_BYTES = 4 << 20
INDEX_BYTES = 32 << 20
TOKENIZER_BYTES = 64 << 20
_POINTER = b"version https://git-lfs.github.com/spec/"
# Usual names of the folder of one training step or result; the parent folder has the training's name.
_STEP = re.compile(r"(checkpoint|step|epoch|global[-_]?step|iter)([-_]?\d+)?|final|best|last|latest|merged|model|hf")
_OUT_OF_MEMORY = re.compile("cannot allocate|can't allocate|not enough memory|out of memory|mmap", re.IGNORECASE)


class Files:
    """The files of the checkpoint in the local folder `root`; `label` is the user's name for it.

    Attributes:
        source: as in `Checkpoint`; of a local folder its absolute path.
        commit: the hub commit that pins its content; None for a local folder.
    """

    commit: str | None = None

    def __init__(self, label: str, root: Path) -> None:
        self.label = label
        self.source = str(absolute(root))
        self._root = root

    @property
    def name(self) -> str:
        """The folder's name, after its parent's where it says nothing alone ("checkpoint-500", "final")."""
        root = self._root.resolve()
        return f"{root.parent.name}-{root.name}".lstrip("-") if _STEP.fullmatch(root.name) else root.name

    def names(self) -> list[str]:
        """Names of the files directly in the folder."""
        return sorted(path.name for path in self._root.iterdir() if path.is_file())

    def has(self, name: str) -> bool:
        """Whether the checkpoint has the file `name`, without fetching it."""
        return (self._root / name).is_file()

    def at_hand(self, name: str) -> bool:
        """Whether `path(name)` needs no download: the file is local, or the checkpoint has none."""
        return True

    def path(self, name: str) -> Path | None:
        """The path of the file `name`, fetched if need be; None if the checkpoint has no such file."""
        path = self._root / name
        return path if path.is_file() else None

    def folder(self, names: list[str]) -> Path:
        """A local folder with those files of `names` that the checkpoint has."""
        return self._root

    def bytes(self, name: str, limit: int) -> bytes | None:
        """The content of the file `name`, or None if there is no such file."""
        path = self.path(name)
        if path is None:
            return None
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = b"" if size > limit else file.read(size)  # a larger number would be allocated first
        except OSError as error:
            raise self.error(f"cannot read {name} ({first_line(error)}); check its permissions") from error
        if size > limit:
            raise self.error(f"{name} is larger than {limit >> 20} MiB, which no such file is; download it again")
        if content.startswith(_POINTER):
            raise self._pointer(name)
        return content

    def json(self, name: str, limit: int = SETTINGS_BYTES) -> dict[str, Any] | None:
        """The JSON object in the file `name`, or None if there is no such file."""
        raw = self.bytes(name, limit)
        if raw is None:
            return None
        try:
            content = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self.error(f"cannot read {name} ({first_line(error)}); download it again") from error
        if not isinstance(content, dict):
            raise self.error(f"{name} is not a JSON object; download it again")
        return content

    def refuse_pointer(self, name: str, path: Path) -> None:
        """Raise `UserError` if the file is a pointer of Git LFS."""
        with open(path, "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise self._pointer(name)

    def sha256(self, name: str) -> str:
        """SHA-256 (hex) of the content of the file `name`. Raises `UserError` if it is missing."""
        path = self.path(name)
        if path is None:
            raise self.error(f"{name} is missing; download it again")
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self.error(f"cannot read {name} ({first_line(error)}); check its permissions") from error

    def error(self, text: str) -> UserError:
        """An error about this checkpoint, in terms of the command line."""
        return UserError(f"--model {self.label}: {text}")

    def _pointer(self, name: str) -> UserError:
        return self.error(
            f"{name} is a pointer of Git LFS, not the file itself; run git lfs pull in the folder, or download it again"
        )

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Turn errors of allocation into a `UserError`: weights that do not fit into memory."""
        try:
            yield
        except (MemoryError, RuntimeError, OSError) as error:
            if not out_of_memory(error):
                raise
            raise self.no_memory() from error

    def no_memory(self) -> UserError:
        return self.error(
            "its weights do not fit into the memory that is free here; raise the limit (ulimit -v, the container's), "
            "use a machine with more, or ask with --dtype bf16 or fp16, which take half of what fp32 takes"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, which libraries raise as several types."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def absolute(path: Path) -> Path:
    """The absolute path. Symbolic links stay as they are, unless the path has "..": then all are resolved."""
    path = path.expanduser()
    return path.resolve() if ".." in path.parts else path.absolute()


def first_line(error: BaseException) -> str:
    """The first line of a library's error, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def some(names: list[str]) -> str:
    """The first three names of a list, shortened, and how many more there are."""
    return ", ".join(map(cut, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def cut(name: str) -> str:
    """A name in one line of at most 120 characters."""
    name = " ".join(name.split())
    return name if len(name) <= 120 else f"{name[:117]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with a key twice is refused, as parsers disagree about which value holds."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it names {shown(twice)} twice in one object")
    return found
