"""The sources that determine an engine's content: a part of its cache key.

Only a change of these rebuilds an engine, not of command lines, output, the cache or inspection. Modules are named
without suffix and stand for a file or a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Excluded from the builder: commands, their options and output, the cache, and what only reads engines.
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
# Excluded from `earlytom`: the bundled model, except modules for random weights (`_MICRO`) and the clips of its task,
# from which int8 scales come.
_BUNDLED = ("families/bundled", "micro")
_MICRO = ("data", "random_model", "weights")
# Included from the runtime: reading checkpoints, making the gate's frames, and writing the folder.
_RUNTIME = (
    "checkpoint",
    "drawing",
    "engine",
    "trt",
    "video",
)


def code_digest(root: Path = ROOT) -> dict[str, str]:
    """SHA-256 (hex) of every source under `root` that determines an engine, by relative path."""
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
