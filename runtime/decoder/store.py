"""The store of compiled programs: a folder for each, published atomically, with a JSON manifest.

A program's folder holds the program's file and `manifest.json`: the *identity* (everything that the program depends on:
weights, sizes, versions, GPU), the file's size and SHA-256, and figures. The folder's name has a digest of the
identity, so programs for other weights, versions or GPUs coexist; nothing deletes them. A folder whose manifest or file
has changed counts as missing, and is replaced by the next `add`.

A store in an engine folder is sealed by it: the engine's own manifest, which has a digest of itself, gets a record of
every added program, and a program that does not match its record counts as missing, too.

It knows nothing of programs: `add` gets a function that writes the file.
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
    """The programs in `folder`, which the first `add` creates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, identity: Identity) -> Path:
        """The folder of the program with this identity, whether it exists or not; its name begins with the identity's
        "kind".
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
        """Within the block other processes that would add this program wait, so that none is compiled twice.

        Raises:
            OSError: the store cannot be written.
        """
        with staged.locked(self.path(identity), _WORD):
            if self._engine is not None and not os.access(self._engine, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._engine))
            yield

    def add(self, identity: Identity, write: Callable[[Path], Mapping[str, float]]) -> Path:
        """Add or replace a program atomically; call it inside `locked`.

        Args:
            identity: of the program.
            write: writes the file of the given path and returns figures for the manifest. If it raises, the store is
                unchanged.

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
        """The program's record in the engine's manifest; None for a store outside an engine folder."""
        if self._engine is None:
            return None
        recorded = Manifest.read(self._engine, verify_files=False).programs.get(name)
        if recorded is None:
            raise EngineError(f"{self._engine} has no record of {name}: {_REMEDY}")
        return recorded

    def _record(self, name: str, identity: Identity, file: FileRecord) -> None:
        """Record a published program in the engine's manifest, and remove records of programs that are gone."""
        if self._engine is None:
            return
        with staged.locked(self.folder / MANIFEST_FILE, _WORD):  # two programs may be added at once
            manifest = Manifest.read(self._engine, verify_files=False)
            programs = {known: record for known, record in manifest.programs.items() if (self.folder / known).is_dir()}
            programs[name] = ProgramRecord(file.bytes, file.sha256, dict(identity))
            manifest.replace(programs=programs).write(self._engine)


def _digest(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
