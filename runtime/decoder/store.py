"""Where compiled programs live: one folder each, complete or not there, with a JSON manifest that says what made it.

A store is a folder. A program's folder holds the program's file and `manifest.json`: the *identity* (everything that
would make another program: weights, sizes, versions, GPU), the file's size and SHA-256, and figures. The folder's name
carries a digest of the identity, so programs for other weights, versions or GPUs stand side by side; nobody deletes
them. A folder whose manifest or file is not what was written counts as missing, and is replaced by the next `add`.

A store in an engine folder is sealed by it: the engine's own manifest, which carries a digest of itself, gets a record
of every program that is added, and a program without one, or another than the recorded one, counts as missing too.

It knows nothing of programs: `add` is given a function that writes the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from runtime.engine.layout import MANIFEST_FILE
from runtime.engine.manifest import FileRecord, Manifest, ProgramRecord, describe_file
from runtime.errors import EngineError
from runtime.files import staged
from runtime.files.plain import read_json

SCHEMA = 1
PROGRAM_FILE = "program.pt2"
_WORD = "writing"
_REMEDY = "delete the folder"

Identity = Mapping[str, str | int]


class ProgramStore:
    """The programs in `folder`, which is made when the first one is added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, identity: Identity) -> Path:
        """The folder of the program with this identity, whether it is there or not.

        `identity` has a "kind", with which the folder's name begins.
        """
        return self.folder / f"{identity['kind']}-{_digest(identity)[:12]}"

    def find(self, identity: Identity) -> Path | None:
        """The file of the program with this identity; None if there is none, or one that is damaged.

        Reads the whole file, about a second per gigabyte.
        """
        place = self.path(identity)
        try:
            manifest = read_json(place / MANIFEST_FILE, _REMEDY)
            sealed = self._seal(place.name)
            size = (place / PROGRAM_FILE).stat().st_size
            if sealed is not None and (sealed.identity, sealed.bytes) != (dict(identity), size):
                return None
            record = describe_file(place / PROGRAM_FILE)
        except (EngineError, FileNotFoundError, NotADirectoryError):
            return None
        if sealed is not None and sealed.sha256 != record.sha256:
            return None
        expected = {"schema": SCHEMA, "identity": dict(identity), "file": msgspec.structs.asdict(record)}
        good = isinstance(manifest, dict) and expected.items() <= manifest.items()
        return place / PROGRAM_FILE if good else None

    @contextmanager
    def locked(self, identity: Identity) -> Iterator[None]:
        """Inside, no other process looks for or adds this program: it waits, so that none is compiled twice.

        Raises:
            OSError: the store cannot be written.
        """
        with staged.locked(self.path(identity), _WORD):
            if self._engine is not None and not os.access(self._engine, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._engine))
            yield

    def add(self, identity: Identity, write: Callable[[Path], Mapping[str, float]]) -> Path:
        """Add a program in place of whatever has its name, all of it or nothing; call it inside `locked`.

        Args:
            identity: what makes the program.
            write: writes the file of the given path and returns figures for the manifest. What it raises is passed on,
                and the store is as it was.

        Returns:
            the program's file.

        Raises:
            OSError: no space, read-only, no permission.
        """
        place = self.path(identity)
        staging = place.with_name(f".{_WORD}-{place.name}")
        staging.mkdir()
        try:
            figures = dict(write(staging / PROGRAM_FILE))
            record = describe_file(staging / PROGRAM_FILE)
            manifest = {
                "schema": SCHEMA,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "identity": dict(identity),
                "file": msgspec.structs.asdict(record),
                "figures": figures,
            }
            text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
            (staging / MANIFEST_FILE).write_text(text, encoding="utf-8")
            staged.publish(staging, place)
        finally:
            staged.remove(staging)
        self._record(place.name, identity, record)
        return place / PROGRAM_FILE

    @property
    def _engine(self) -> Path | None:
        """The engine folder that the store is in."""
        engine = self.folder.parent
        return engine if (engine / MANIFEST_FILE).is_file() else None

    def _seal(self, name: str) -> ProgramRecord | None:
        """What the engine's manifest records of a program; None where there is no engine."""
        if self._engine is None:
            return None
        recorded = Manifest.read(self._engine, verify_files=False).programs.get(name)
        if recorded is None:
            raise EngineError(f"{self._engine} has no record of {name}: {_REMEDY}")
        return recorded

    def _record(self, name: str, identity: Identity, file: FileRecord) -> None:
        """Put a program that is in its place now into the engine's manifest, and let go of those that are gone."""
        if self._engine is None:
            return
        with staged.locked(self.folder / MANIFEST_FILE, _WORD):  # two programs may be added at once
            manifest = Manifest.read(self._engine, verify_files=False)
            programs = {known: record for known, record in manifest.programs.items() if (self.folder / known).is_dir()}
            programs[name] = ProgramRecord(file.bytes, file.sha256, dict(identity))
            manifest.replace(programs=programs).write(self._engine)


def _digest(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
