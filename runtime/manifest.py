"""The manifest of an engine folder: what was built, from what, and what every file in the folder must be.

JSON, never pickle. A `Manifest` is checked when it is made, so a builder cannot write one that a runtime would refuse,
and `Manifest.read` compares every listed file with its recorded size and SHA-256 before anything is deserialised. The
manifest carries a digest of itself, so damage to any byte of the folder is noticed. This guards against accidents (a
torn copy, a bad disk, files of two builds mixed), not against somebody who can write to the folder.

Everything wrong is an `EngineError` of one line that names the file and says how to get a good folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from earlytom.budget import frames_per_stage, most_tokens, token_count
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from runtime.contract import DTYPES, ENGINE_FILE, MANIFEST_FILE, ONNX_FILE, stage_file
from runtime.errors import EngineError

SCHEMA = 2
# backend -> the file it cannot run without (of a chain, one for each stage: see `Manifest.stage_files`)
BACKENDS = {"onnx": ONNX_FILE, "tensorrt": ENGINE_FILE, "tensorrt-rtx": ENGINE_FILE}
# How the compression stage runs in the engine: as the graph's own operators, or as TensorRT plugins.
COMPRESSIONS = ("native", "plugin")
BUILD = "build one with python -m builder.build"
REBUILD = "rebuild it with python -m builder.build --force"

_BLOCK = 4 << 20  # bytes read at a time: large enough that hashing, not the calls, takes the time
_SEAL = "manifest_sha256"
_OPTIONAL = ("islands", "frames_kept")  # not written where they are None

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file of the folder."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check(_is_count(self.bytes, 0), "files: bytes", "a whole number", self.bytes)
        _check(_is_hex(self.sha256) and len(self.sha256) == 64, "files: sha256", "64 hex digits", self.sha256)


@dataclass(frozen=True)
class PreprocessingRecord:
    """How frames become pixels: `size` (H, W) to resize to; `mean` and `std` (RGB) of the engine's normalisation."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name, length in (("size", 2), ("mean", 3), ("std", 3)):
            value = getattr(self, name)
            good = _is_count if name == "size" else _is_number
            ok = isinstance(value, (list, tuple)) and len(value) == length and all(map(good, value))
            _check(ok, f"preprocessing: {name}", f"{length} numbers", value)
            object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True)
class ModelRecord:
    """The model the engine was made from. `digest` identifies its weights; `trained` is False for random weights."""

    source: str
    family: str
    digest: str
    trained: bool
    image_size: int
    patch_size: int
    preprocessing: PreprocessingRecord

    def __post_init__(self) -> None:
        for name in ("source", "family", "digest"):
            _check(_is_text(getattr(self, name)), f"model: {name}", "a text", getattr(self, name))
        _check(isinstance(self.trained, bool), "model: trained", "true or false", self.trained)
        for name in ("image_size", "patch_size"):
            _check(_is_count(getattr(self, name)), f"model: {name}", "a positive whole number", getattr(self, name))
        side = self.image_size
        _check(self.preprocessing.size == (side, side), "preprocessing: size", [side, side], self.preprocessing.size)


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
            _check(_is_text(getattr(self, name)), f"plugins: {name}", "a text", getattr(self, name))
        digest = self.ptx_sha256
        _check(_is_hex(digest) and len(digest) == 64, "plugins: ptx_sha256", "64 hex digits", digest)
        ok = isinstance(self.grid, (list, tuple)) and len(self.grid) == 3 and all(map(_is_count, self.grid))
        _check(ok, "plugins: grid", "3 positive whole numbers", self.grid)
        object.__setattr__(self, "grid", tuple(self.grid))
        for name, low in (("threads", 1), ("registers", 1), ("shared_bytes", 0), ("spill_bytes", 0)):
            _check(_is_count(getattr(self, name), low), f"plugins: {name}", "a whole number", getattr(self, name))


@dataclass(frozen=True)
class Manifest:
    """One engine folder.

    Attributes:
        name: name of the folder.
        key: cache key (hex) of everything that changes the artefact.
        project_version, created: version of this project; ISO 8601 time of the build.
        earlytom: `EarlyTomConfig.to_dict()`.
        frames: `F`, frames the engine takes.
        frames_per_stage: frames before the first merge and after each one; adaptive schedule: the most, which is `F`.
        tokens: `N`, tokens the engine returns; adaptive schedule: the most that any video gives.
        tokens_per_frame: `P`, tokens of one whole frame.
        tokens_full: `F * P`, what the uncompressed model would send to the LLM.
        dim: `D`, width of a token.
        dtype: "fp16", "bf16" or "fp32", the dtype of the graph and of the tokens.
        target: compute capability, for example "8.0".
        backend: "onnx", "tensorrt" or "tensorrt-rtx".
        backend_version: version of the library that compiled (or, for "onnx", checked) it.
        files: every file of the folder but the manifest, external data included.
        compression: "native" or "plugin", how the compression stage runs.
        plugins: the kernels that plugins put into the engine; none where the stage is native.
        figures: measurements of the build (seconds, bytes, flops); names are free, values are finite numbers.
        verification: {"passed": bool, ...steps}, or None where it was switched off.
        polygraphy: command line that compares the folder's files with the saved reference, to be pasted in the folder.
        islands: what is fp32 in a half graph, in words of `--islands`; None (and not written) for the usual ones.
        frames_kept: adaptive schedule: least, median and most frames before the first merge and after each one, on the
            clips that the engine was calibrated on; None (and not written) in the budget schedule.
    """

    name: str
    key: str
    project_version: str
    created: str
    model: ModelRecord
    earlytom: dict[str, Any]
    frames: int
    frames_per_stage: tuple[int, ...]
    tokens: int
    tokens_per_frame: int
    tokens_full: int
    dim: int
    dtype: str
    target: str
    backend: str
    backend_version: str
    files: dict[str, FileRecord]
    compression: str = "native"
    plugins: tuple[PluginRecord, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    verification: dict[str, Any] | None = None
    polygraphy: str = ""
    islands: tuple[str, ...] | None = None
    frames_kept: tuple[tuple[int, int, int], ...] | None = None

    def __post_init__(self) -> None:
        """Raise EngineError unless every field is of its type and the fields agree with each other."""
        self._check_types()
        for name in ("earlytom", "figures", "verification"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        for name in ("frames_per_stage", "plugins"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.islands is not None:
            object.__setattr__(self, "islands", tuple(self.islands))
        if self.frames_kept is not None:
            object.__setattr__(self, "frames_kept", tuple(map(tuple, self.frames_kept)))
        self._check_counts()
        for name in self.files:
            if not _is_file_name(name):
                raise EngineError(f"manifest lists a file named {name!r}, which is no plain file name: {REBUILD}")
        if self.compression == "plugin" and self.backend != "tensorrt":
            raise EngineError(f"manifest contradicts itself: compression is plugin, {self.backend} has none: {REBUILD}")
        if self.plugins and self.compression != "plugin":
            raise EngineError(f"manifest contradicts itself: compression is native and plugins are listed: {REBUILD}")
        for name in self.stage_files(BACKENDS[self.backend]):
            if name not in self.files:
                raise EngineError(f"manifest lists no {name}, which {self.backend} needs: {REBUILD}")

    @property
    def adaptive(self) -> bool:
        """Whether this is a chain of stages, of which the video decides how many frames each keeps."""
        return EarlyTomConfig.from_dict(self.earlytom).schedule == "adaptive"

    def stage_files(self, name: str) -> tuple[str, ...]:
        """`name`, or where this is a chain that file of every stage."""
        return (
            tuple(stage_file(name, stage) for stage in range(len(self.frames_per_stage))) if self.adaptive else (name,)
        )

    def _check_types(self) -> None:
        texts = ("name", "project_version", "backend_version")
        counts = ("frames", "tokens", "tokens_per_frame", "tokens_full", "dim")
        mappings = ("earlytom", "files", "figures")
        rules: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
            (texts, _is_text, "a text"),
            (counts, _is_count, "a positive whole number"),
            (mappings, lambda v: isinstance(v, Mapping), "an object"),
            (("key",), _is_hex, "hex digits"),
            (("created",), _is_time, "an ISO 8601 time"),
            (("frames_per_stage",), lambda v: isinstance(v, (list, tuple)) and all(map(_is_count, v)), "frame counts"),
            (("dtype",), lambda v: isinstance(v, str) and v in DTYPES, f"one of {', '.join(DTYPES)}"),
            (("target",), lambda v: _matches(r"\d+\.\d+", v), 'a compute capability such as "8.0"'),
            (("backend",), lambda v: isinstance(v, str) and v in BACKENDS, f"one of {', '.join(BACKENDS)}"),
            (("compression",), lambda v: v in COMPRESSIONS, f"one of {', '.join(COMPRESSIONS)}"),
            (("plugins",), _is_plugins, "plugin records"),
            (("polygraphy",), lambda v: isinstance(v, str), "a text"),
            (("islands",), _is_words, "null or a list of words"),
            (("frames_kept",), _is_kept, "null or least, median and most of every stage"),
            (("verification",), _is_verification, 'null or an object with "passed": true or false'),
        ]
        for names, good, expected in rules:
            for name in names:
                _check(good(getattr(self, name)), name, expected, getattr(self, name))
        _check(isinstance(self.model, ModelRecord), "model", "an object", self.model)
        _check(all(isinstance(v, FileRecord) for v in self.files.values()), "files", "file records", self.files)
        _check(all(map(_is_number, self.figures.values())), "figures", "finite numbers", self.figures)

    def _check_counts(self) -> None:
        """The counts must be those that `earlytom.budget` gives for the recorded settings."""
        expected: dict[str, Any] = {"tokens_full": self.frames * self.tokens_per_frame}
        try:
            config = EarlyTomConfig.from_dict(self.earlytom)
            if config.schedule == "budget":
                rule: dict[str, Any] = {"merges": len(config.merge_layers), "frame_budget": config.frame_budget}
                expected["frames_per_stage"] = frames_per_stage(self.frames, **rule)
                expected["tokens"] = token_count(self.frames, self.tokens_per_frame, config.retention_ratio, **rule)
                expected["frames_kept"] = None
            else:
                merges = len(config.merge_layers)
                expected["frames_per_stage"] = (self.frames,) * (merges + 1)
                expected["tokens"] = most_tokens(
                    self.frames, self.tokens_per_frame, config.retention_ratio, merges=merges
                )
        except UserError as error:
            raise EngineError(f"manifest has EarlyTom settings that make no sense ({error}): {REBUILD}") from error
        for name, value in expected.items():
            if (got := getattr(self, name)) != value:
                raise EngineError(f"manifest contradicts itself: {name} is {got}, its settings give {value}: {REBUILD}")
        if config.schedule == "adaptive":
            kept = self.frames_kept or ()
            fits = len(kept) == merges + 1 and kept[0] == (self.frames,) * 3
            if not fits or any(most > self.frames for _, _, most in kept):
                raise EngineError(
                    f"manifest contradicts itself: frames_kept is {self.frames_kept}, its settings give {merges + 1} "
                    f"stages of at most {self.frames} frames: {REBUILD}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the schema version first; `from_dict` is its inverse."""
        values = {"schema": SCHEMA, **json.loads(json.dumps(dataclasses.asdict(self)))}
        for name in _OPTIONAL:
            if getattr(self, name) is None:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_dict`.

        Raises:
            EngineError: another schema version, a key too many or too few, a wrong type, counts that disagree.
        """
        schema = values.get("schema") if isinstance(values, Mapping) else None
        if not isinstance(schema, int) or isinstance(schema, bool):
            raise EngineError(f"manifest has no schema version, expected {SCHEMA}: {REBUILD}")
        if schema != SCHEMA:
            remedy = f"update this project or {REBUILD}" if schema > SCHEMA else REBUILD
            raise EngineError(f"manifest has schema {schema}, this version reads {SCHEMA}: {remedy}")
        rest: dict[str, Any] = dict.fromkeys(_OPTIONAL) | {
            name: value for name, value in values.items() if name != "schema"
        }
        if isinstance(rest.get("model"), Mapping):
            model = dict(rest["model"])
            model["preprocessing"] = _build(
                PreprocessingRecord, model.get("preprocessing"), "manifest: model: preprocessing"
            )
            rest["model"] = _build(ModelRecord, model, "manifest: model")
        if isinstance(rest.get("files"), Mapping):
            rest["files"] = {n: _build(FileRecord, v, f"manifest: files: {n!r}") for n, v in rest["files"].items()}
        if isinstance(rest.get("plugins"), list):
            rest["plugins"] = tuple(_build(PluginRecord, v, "manifest: plugins") for v in rest["plugins"])
        return _build(cls, rest, "manifest")

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write `manifest.json` into `folder`, all of it or nothing, and return its path.

        Raises:
            OSError: no space, read-only, no permission; no temporary file is left behind.
        """
        values = self.to_dict()
        text = json.dumps({**values, _SEAL: _seal(values)}, indent=2, allow_nan=False) + "\n"
        target = Path(folder) / MANIFEST_FILE
        temporary = target.with_name(f".{MANIFEST_FILE}.{os.getpid()}")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        if os.name == "posix":  # the new name itself is durable only once the folder is
            descriptor = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return target

    @classmethod
    def read(cls, folder: str | os.PathLike[str], verify_files: bool = True) -> Manifest:
        """Read and check the manifest of an engine folder.

        Args:
            folder: an engine folder.
            verify_files: also compare every listed file's size and SHA-256 (about a second per gigabyte).

        Raises:
            EngineError: no engine folder, or one that is not what was built.
        """
        path = Path(folder)
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise EngineError(f"engine folder {path} {what}: {BUILD}")
        if not (path / MANIFEST_FILE).is_file():
            raise EngineError(f"{path} is no engine folder, it has no {MANIFEST_FILE}: {BUILD}")
        try:
            values = json.loads((path / MANIFEST_FILE).read_bytes(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{path / MANIFEST_FILE} is not valid JSON ({error}): {REBUILD}") from error
        seal = values.pop(_SEAL, None) if isinstance(values, dict) else None
        try:
            manifest = cls.from_dict(values)
        except EngineError as error:
            raise EngineError(f"{path / MANIFEST_FILE}: {error}") from error
        if seal != _seal(values):
            raise EngineError(f"{path / MANIFEST_FILE} changed since it was written (its digest differs): {REBUILD}")
        if verify_files:
            manifest.verify(path)
        return manifest

    def verify(self, folder: str | os.PathLike[str]) -> None:
        """Compare the files of `folder` with the records; sizes first, as they cost nothing.

        Raises:
            EngineError: a file is missing, has another size or another content.
        """
        for name, record in self.files.items():
            path = Path(folder) / name
            if not path.is_file():
                raise EngineError(f"{path} is missing: {REBUILD}")
            if (size := path.stat().st_size) != record.bytes:
                raise EngineError(f"{path} has {size} bytes, the manifest says {record.bytes}: {REBUILD}")
        for name, record in self.files.items():
            path = Path(folder) / name
            if (digest := _sha256(path)) != record.sha256:
                raise EngineError(
                    f"{path} changed since it was built (sha256 {digest[:12]}..., the manifest says "
                    f"{record.sha256[:12]}...): {REBUILD}"
                )


def describe_files(folder: str | os.PathLike[str]) -> dict[str, FileRecord]:
    """Records of every file in `folder` but the manifest, by name; so that no external data file is forgotten."""
    paths = sorted(p for p in Path(folder).iterdir() if p.is_file() and p.name != MANIFEST_FILE)
    return {path.name: FileRecord(path.stat().st_size, _sha256(path)) for path in paths}


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _seal(values: Mapping[str, Any]) -> str:
    """Digest of the content, whatever the order and layout of the file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _build(cls: type[T], values: Any, where: str) -> T:
    """`cls(**values)` with exactly the fields of the dataclass."""
    _check(isinstance(values, Mapping), where, "an object", values)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for names, what in ((known - set(values), "lacks"), (set(values) - known, "has an unknown key")):
        if names:
            raise EngineError(f"{where} {what} {min(names)!r}: it was written by another version; {REBUILD}")
    return cls(**values)


def _check(good: bool, where: str, expected: object, got: object) -> None:
    if not good:
        shown = repr(got) if len(repr(got)) <= 60 else repr(got)[:57] + "..."
        raise EngineError(
            f"manifest field {where.removeprefix('manifest: ')} must be {expected}, got {shown}: {REBUILD}"
        )


def _plain(name: str, value: Any) -> Any:
    """A copy of `value` in plain JSON types (tuples become lists), so that what is read equals what was written."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise EngineError(f"manifest field {name} cannot be written as JSON ({error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Any, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_hex(value: Any) -> bool:
    return _matches(r"[0-9a-f]+", value)


def _is_plugins(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, PluginRecord) for v in value)


def _is_verification(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and isinstance(value.get("passed"), bool))


def _is_words(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(map(_is_text, value)))


def _is_kept(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, (list, tuple)) and all(
        isinstance(row, (list, tuple)) and len(row) == 3 and all(map(_is_count, row)) and list(row) == sorted(row)
        for row in value
    )


def _is_time(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_file_name(name: Any) -> bool:
    """A file directly in the folder: no separators of any system, no "..", no drive, no control characters."""
    if not _is_text(name) or not name.isprintable() or any(c in name for c in "/\\:"):
        return False
    return PurePosixPath(name).name == name and name not in ("..", MANIFEST_FILE)
