"""Where compiled programs live: one folder each, complete or not there, with a JSON manifest that says what made it.

A store is a folder. A program's folder holds the program's file and `manifest.json`: the *identity* (everything that
would make another program: weights, sizes, versions, GPU), the file's size and SHA-256, and figures. The folder's name
carries a digest of the identity, so programs for other weights, versions or GPUs stand side by side; nobody deletes
them. A folder whose manifest or file is not what was written counts as missing, and is replaced by the next `add`.

It knows nothing of programs: `add` is given a function that writes the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from runtime.engine.layout import MANIFEST_FILE
from runtime.manifest import describe_files

SCHEMA = 1
PROGRAM_FILE = "program.pt2"

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
            manifest = json.loads((place / MANIFEST_FILE).read_bytes())
            record = describe_files(place).get(PROGRAM_FILE)
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        if record is None or not isinstance(manifest, dict):
            return None
        expected = {"schema": SCHEMA, "identity": dict(identity), "file": dataclasses.asdict(record)}
        return place / PROGRAM_FILE if expected.items() <= manifest.items() else None

    @contextmanager
    def locked(self, identity: Identity) -> Iterator[None]:
        """Inside, no other process looks for or adds this program: it waits, so that none is compiled twice.

        Raises:
            OSError: the store cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.path(identity)
        with FileLock(place.with_name(f".{place.name}.lock")):
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
        staging, old = (place.with_name(f".{word}-{place.name}") for word in ("writing", "old"))
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        staging.mkdir()
        try:
            figures = dict(write(staging / PROGRAM_FILE))
            manifest = {
                "schema": SCHEMA,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "identity": dict(identity),
                "file": dataclasses.asdict(describe_files(staging)[PROGRAM_FILE]),
                "figures": figures,
            }
            text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
            (staging / MANIFEST_FILE).write_text(text, encoding="utf-8")
            shutil.rmtree(old, ignore_errors=True)
            if place.exists():
                os.replace(place, old)
            os.replace(staging, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return place / PROGRAM_FILE


def _digest(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
