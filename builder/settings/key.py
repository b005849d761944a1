"""Which of this project's sources decide what an engine contains: a part of the key under which it is found again.

An engine is built anew when one of them changes, and only then: what asks for a build, shows it, keeps it or looks at
finished ones changes nothing in it. A module is named without its ending, and stands for a file or for a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Of the builder everything counts but commands, their options, screens, the store, and what looks at engines.
_APART = (
    "build",
    "cache",
    "doctor",
    "evaluate",
    "evaluation",
    "gate/drift",
    "inspect",
    "inspection",
    "kernels",
    "micro",
    "operators",
    "plugins/__main__",
    "scripts",
    "settings/arguments",
    "settings/parser",
    "settings/options",
    "show",
    "source",
    "verify",
)
# Of the method everything but the bundled model's training and files: two of these draw random weights, and the scales
# of int8 go by clips of the bundled model's world.
_BUNDLED = ("families/bundled", "micro")
_MICRO = ("data", "random_model", "weights")
# Of the runtime what reads checkpoints, makes the frames that the gate goes by, and writes the folder.
_RUNTIME = (
    "checkpoint",
    "drawing",
    "engine",
    "trt",
    "video",
)


def code_digest(root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of every source under `root` that decides what an engine contains, by its path from there."""
    apart = {path for name in _APART for path in _sources(root / "builder", name)}
    paths = {path for path in (root / "builder").rglob("*.py") if path not in apart}
    method = root / "earlytom"
    bundled = {path for name in _BUNDLED for path in _sources(method, name)}
    paths |= {path for path in method.rglob("*.py") if path not in bundled}
    paths |= {path for name in _MICRO for path in _sources(method / "micro", name)}
    paths |= {path for name in _RUNTIME for path in _sources(root / "runtime", name)}
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def _sources(folder: Path, name: str) -> Iterator[Path]:
    """The file of a module, or every file of a package."""
    if (folder / f"{name}.py").is_file():
        yield folder / f"{name}.py"
    yield from (folder / name).rglob("*.py")
