"""The parts of a manifest, and what its fields must be: each record checks itself when it is made.

`runtime.engine.manifest` puts them together; a wrong value is an `EngineError` that names the field, whether a builder
set it or a file on disk said so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, TypeVar, get_args

from earlytom.families import FrameSampling
from earlytom.numbers import shown
from runtime.engine.layout import MANIFEST_FILE
from runtime.errors import EngineError

REBUILD = "rebuild it with python -m builder.build --force"
MOST_FRAMES = 100_000  # a video has fewer, and what is counted for each is counted quickly
MOST_COUNTS = 256  # frame counts of one engine
_TEXT = 4096  # characters of a name or a path
_WORDS = 200  # characters of another message

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file of the folder."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check(is_count(self.bytes, 0), "files: bytes", "a whole number", self.bytes)
        check(is_hex(self.sha256) and len(self.sha256) == 64, "files: sha256", "64 hex digits", self.sha256)


@dataclass(frozen=True)
class PreprocessingRecord:
    """How frames become pixels: `size` (H, W) to resize to; `mean` and `std` (RGB) of the engine's normalisation; which
    frames of a video are shown, see `runtime.video.sample_indices` ("ends" is not written)."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sampling: FrameSampling = "ends"

    def __post_init__(self) -> None:
        known = get_args(FrameSampling)
        check(self.sampling in known, "preprocessing: sampling", " or ".join(known), self.sampling)
        for name, length in (("size", 2), ("mean", 3), ("std", 3)):
            value = getattr(self, name)
            good = is_count if name == "size" else is_number
            ok = isinstance(value, (list, tuple)) and len(value) == length and all(map(good, value))
            check(ok, f"preprocessing: {name}", f"{length} numbers", value)
            object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True)
class ModelRecord:
    """The model the engine was made from.

    `digest` identifies the weights that are in the engine; `trained` is False for random weights. `answers` identifies
    everything else that answers depend on, decoder and tokenizer; `commit` that of a hub repository. Manifests of
    earlier versions have neither, and None is not written. `image_size` is the side of a square frame in pixels, or
    (height, width).
    """

    source: str
    family: str
    digest: str
    trained: bool
    image_size: int | tuple[int, int]
    patch_size: int
    preprocessing: PreprocessingRecord
    answers: str | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        for name in ("source", "family", "digest"):
            check(is_text(getattr(self, name)), f"model: {name}", "a text", getattr(self, name))
        check(isinstance(self.trained, bool), "model: trained", "true or false", self.trained)
        for name in ("answers", "commit"):
            value = getattr(self, name)
            check(value is None or is_hex(value), f"model: {name}", "hex digits or left out", value)
        check(is_count(self.patch_size), "model: patch_size", "a positive whole number", self.patch_size)
        side = self.image_size
        if isinstance(side, (list, tuple)):
            ok = len(side) == 2 and all(map(is_count, side)) and side[0] != side[1]
            check(ok, "model: image_size", "two different positive whole numbers", side)
            height, width = side
            object.__setattr__(self, "image_size", (height, width))
        else:
            check(is_count(side), "model: image_size", "a positive whole number", side)
            height = width = side
        size = height, width
        check(self.preprocessing.size == size, "preprocessing: size", list(size), self.preprocessing.size)


@dataclass(frozen=True)
class PluginRecord:
    """One kernel that a TensorRT plugin put into the engine.

    Attributes:
        name, version: of the plugin in TensorRT's registry, such as "earlytom::FramePlan" and "1".
        kernel: its entry function.
        tensors: types and shapes of its inputs and outputs, such as "fp32 [32, 32] -> fp32 [24, 32], bool [32]".
        ptx_sha256: digest of the PTX that is embedded.
        grid, threads: programs in x, y and z, and threads of each.
        registers: of a thread; `shared_bytes` of a block; `spill_bytes` that registers spill to memory.
    """

    name: str
    version: str
    kernel: str
    tensors: str
    ptx_sha256: str
    grid: tuple[int, int, int]
    threads: int
    registers: int
    shared_bytes: int
    spill_bytes: int

    def __post_init__(self) -> None:
        for name in ("name", "version", "kernel", "tensors"):
            check(is_text(getattr(self, name)), f"plugins: {name}", "a text", getattr(self, name))
        digest = self.ptx_sha256
        check(is_hex(digest) and len(digest) == 64, "plugins: ptx_sha256", "64 hex digits", digest)
        ok = isinstance(self.grid, (list, tuple)) and len(self.grid) == 3 and all(map(is_count, self.grid))
        check(ok, "plugins: grid", "3 positive whole numbers", self.grid)
        object.__setattr__(self, "grid", tuple(self.grid))
        for name, low in (("threads", 1), ("registers", 1), ("shared_bytes", 0), ("spill_bytes", 0)):
            check(is_count(getattr(self, name), low), f"plugins: {name}", "a whole number", getattr(self, name))


@dataclass(frozen=True)
class ProgramRecord:
    """One compiled program that a runtime added to the folder: what made it, and size and SHA-256 of its file."""

    bytes: int
    sha256: str
    identity: dict[str, str | int]

    def __post_init__(self) -> None:
        check(is_count(self.bytes, 0), "programs: bytes", "a whole number", self.bytes)
        check(is_hex(self.sha256) and len(self.sha256) == 64, "programs: sha256", "64 hex digits", self.sha256)
        known = self.identity
        good = isinstance(known, Mapping) and all(
            is_text(k) and (is_text(v) or is_count(v, 0)) for k, v in known.items()
        )
        check(good, "programs: identity", "an object of texts and whole numbers", known)
        object.__setattr__(self, "identity", dict(known))


def check(good: bool, where: str, expected: object, got: object) -> None:
    if not good:
        raise EngineError(
            f"manifest field {where.removeprefix('manifest: ')} must be {expected}, got {shown(got)}: {REBUILD}"
        )


def cut(text: object) -> str:
    """Words of another message in one of ours: one line, and no more of a long value than tells what it is."""
    line = " ".join(str(text).split())
    return line if len(line) <= _WORDS else line[: _WORDS - 3] + "..."


def is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _TEXT and "\0" not in value


def is_count(value: Any, low: int = 1, high: int = 2**53) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_hex(value: Any) -> bool:
    return matches(r"[0-9a-f]+", value)


def is_plugins(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, PluginRecord) for v in value)


def is_ascending(value: Any) -> bool:
    if value is None:
        return True
    good = isinstance(value, (list, tuple)) and 0 < len(value) <= MOST_COUNTS and all(map(is_count, value))
    return good and list(value) == sorted(set(value))


def is_verification(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and isinstance(value.get("passed"), bool))


def is_words(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(map(is_text, value)))


def is_kept(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, (list, tuple)) and all(
        isinstance(row, (list, tuple)) and len(row) == 3 and all(map(is_count, row)) and list(row) == sorted(row)
        for row in value
    )


def is_programs(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        is_file_name(name) and isinstance(record, ProgramRecord) for name, record in value.items()
    )


def is_time(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def is_file_name(name: Any) -> bool:
    """A file directly in the folder: no separators of any system, no "..", no drive, no control characters."""
    if not is_text(name) or not name.isprintable() or any(c in name for c in "/\\:") or len(name.encode()) > 255:
        return False
    return PurePosixPath(name).name == name and name not in ("..", MANIFEST_FILE)


def record_of(cls: type[T], values: Any, where: str) -> T:
    """`cls(**values)` with exactly the fields of the dataclass."""
    check(isinstance(values, Mapping), where, "an object", values)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for names, what in ((known - set(values), "lacks"), (set(values) - known, "has an unknown key")):
        if names:
            name = shown(min(names, key=str))
            raise EngineError(f"{where} {what} {name}: it was written by another version; {REBUILD}")
    return cls(**values)


def plain(name: str, value: Any) -> Any:
    """A copy of `value` in plain JSON types (tuples become lists), so that what is read equals what was written."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise EngineError(f"manifest field {name} cannot be written as JSON ({cut(error)})") from error
