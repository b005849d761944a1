"""What the workers of a test run make once and all read: checkpoints, engines, exported graphs, clips.

`shared(name, make)` is the folder that `make` filled, whichever worker did it. The others wait for it at a lock. Nobody
may change what is in it, which is checked when a worker ends. `shared.copy(name, make)` is this worker's copy of it,
for what commands write into, if only for a moment.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock


def name_of(kind: str, words: Sequence[str]) -> str:
    """A folder's name for what `words` make."""
    return f"{kind}-{hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:16]}"


def listing(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of every file below `folder`."""
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): [stat.st_size, stat.st_mtime_ns] for path, stat in found}


class Shared:
    """The folders of one run, below `root`, which is the same for all its workers; `own` is this worker's place."""

    def __init__(self, root: Path, own: Path) -> None:
        self.root, self.own = root, own
        root.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of that name; if it is not there, or its making failed, `make` is given it empty."""
        folder, made = self.root / name, self.root / f"{name}.json"
        with FileLock(self.root / f"{name}.lock"):
            if not made.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.write_text(json.dumps(listing(folder)))
        return folder

    def copy(self, name: str, make: Callable[[Path], object]) -> Path:
        """This worker's copy of the folder of that name."""
        copy = self.own / name
        return copy if copy.is_dir() else Path(shutil.copytree(self(name, make), copy))

    def changed(self) -> list[str]:
        """Names of the folders whose files are not those that were made."""
        return [made.stem for made in sorted(self.root.glob("*.json")) if _read(made) != listing(made.with_suffix(""))]


def _read(made: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(made.read_text())
    return found
