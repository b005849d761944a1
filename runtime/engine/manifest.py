"""The manifest of an engine folder: what was built, from what, and what every file in the folder must be.

JSON, never pickle. A `Manifest` is checked when it is made, so a builder cannot write one that a runtime would refuse,
and `Manifest.read` compares every listed file with its recorded size and SHA-256 before anything is deserialised. The
manifest carries a digest of itself, so damage to any byte of the folder is noticed. This guards against accidents (a
torn copy, a bad disk, files of two builds mixed), not against somebody who can write to the folder. The compiled
programs that a runtime adds later (`runtime.decoder.store`) are recorded here, too.

Everything wrong is an `EngineError` of one line that names the file and says how to get a good folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from earlytom.config import EarlyTomConfig
from earlytom.families import NAMED, Closings, family_named
from earlytom.numbers import shown
from earlytom.settings import SETTINGS, MethodSettings, settings_of
from runtime.engine.agreement import check_agreement
from runtime.engine.layout import DTYPE_NAMES, ENGINE_FILE, MANIFEST_FILE, ONNX_FILE, Layout, Sizes, count_file
from runtime.engine.records import (
    MOST_COUNTS,
    MOST_FRAMES,
    REBUILD,
    Count,
    FileRecord,
    Hex,
    ModelRecord,
    Name,
    PluginRecord,
    ProgramRecord,
    Record,
    Text,
    one_of,
    plain,
    refusal,
)
from runtime.errors import EngineError
from runtime.files.partial import partial
from runtime.files.plain import MIB, open_plain, read_json

SCHEMA = 2
# backend -> the file it cannot run without (there may be several of it: see `Manifest.stage_files`)
BACKENDS = {"onnx": ONNX_FILE, "tensorrt": ENGINE_FILE, "tensorrt-rtx": ENGINE_FILE}
# How the compression stage runs in the engine: as the graph's own operators, or as TensorRT plugins.
COMPRESSIONS = ("native", "plugin")
BUILD = "build one with python -m builder.build"

_MOST_BYTES = MIB  # of a manifest, which has a few kilobytes
_BLOCK = 4 << 20  # bytes read at a time: large enough that hashing, not the calls, takes the time
_SEAL = "manifest_sha256"
AND = " && "  # between the Polygraphy lines of several frame counts


class Manifest(Record, frozen=True, kw_only=True):
    """One engine folder.

    Attributes:
        name: name of the folder.
        key: cache key (hex) of everything that changes the artefact.
        project_version, created: version of this project; ISO 8601 time of the build.
        method: its name. earlytom: the settings of the method (`earlytom.settings`), whichever it is.
        frames: `F`, pictures per clip; the tower makes one frame of `step` pictures (usually 1), see `Layout.steps`.
            With several frame counts the largest, and all other counts are those for it.
        frames_per_stage: frames before the first merge and after each one; adaptive schedule: the most, `Layout.steps`.
        tokens: `N`, tokens the engine returns; adaptive schedule: the most that any video gives.
        tokens_per_frame: `P`, tokens of one whole frame.
        tokens_full: `Layout.steps * P`, what the uncompressed model would send to the LLM.
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
        polygraphy: command line, to be run in the folder, that compares its files with the saved reference; one for
            each frame count, joined by `AND`.
        islands: what is fp32 in a half graph, in words of `--islands`; None (and not written) for the default.
        int8: the products that are int8, in words of `--int8-keep`; None (and not written) for an engine without.
        frames_kept: adaptive schedule: least, median and most frames before the first merge and after each one, on the
            clips that the engine was calibrated on; None (and not written) in the budget schedule.
        batch: `B`, videos per call; all counts are those of one video. 1 is not written.
        frame_counts: the frame counts, ascending, each with its own files (`at`); None (and not written) for one count.
            The manifest that `at` returns has that count alone.
        chunk: `C`, frames of a chunk; None (and not written) for an engine that takes whole clips.
        programs: the decoder's compiled programs that a runtime added, by the names of their folders; none (and not
            written) when the engine is built.
    """

    name: Name
    key: Hex
    project_version: Text
    created: str
    model: ModelRecord
    earlytom: dict[str, Any]
    frames: Annotated[int, Meta(ge=1, le=MOST_FRAMES)]
    frames_per_stage: tuple[Count, ...]
    tokens: Count
    tokens_per_frame: Count
    tokens_full: Count
    dim: Count
    dtype: Annotated[str, one_of(*DTYPE_NAMES)]
    target: Annotated[str, Meta(pattern=r"\A\d+\.\d+\Z")]
    backend: Annotated[str, one_of(*BACKENDS)]
    backend_version: Text
    files: dict[str, FileRecord]
    compression: Annotated[str, one_of(*COMPRESSIONS)]
    plugins: tuple[PluginRecord, ...]
    figures: dict[str, int | float]
    verification: dict[str, Any] | None
    polygraphy: str
    islands: tuple[Text, ...] | None = None
    int8: tuple[Text, ...] | None = None
    frames_kept: tuple[tuple[Count, Count, Count], ...] | None = None
    batch: Count = 1
    frame_counts: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MOST_COUNTS)] | None = None
    chunk: Count | None = None
    programs: dict[str, ProgramRecord] = msgspec.field(default_factory=dict)
    method: Annotated[str, one_of(*SETTINGS)] = EarlyTomConfig.method

    def __post_init__(self) -> None:
        """Raise EngineError unless every field is of its type and the fields agree with each other."""
        for name in ("earlytom", "figures", "verification"):
            msgspec.structs.force_setattr(self, name, plain(name, getattr(self, name)))
        super().__post_init__()
        check_agreement(self)
        for name in self.stage_files(BACKENDS[self.backend]):
            if name not in self.files:
                raise EngineError(f"manifest lists no {name}, which {self.backend} needs: {REBUILD}")
        for frames in self.counts[:-1]:
            self.at(frames)  # this constructor checked the largest count; `at` checks the others

    @property
    def settings(self) -> MethodSettings:
        """The method's settings."""
        return settings_of(self.method, self.earlytom)

    @property
    def layout(self) -> Layout:
        """What the engine is: its graphs, tensors and counts."""
        family = NAMED.get(self.model.family)
        step = 1 if family is None else family.step
        sizes = Sizes(self.tokens_per_frame, self.model.preprocessing.size, self.dim, step=step)
        return Layout(self.settings, self.frames, self.batch, self.chunk, self.dtype, sizes, self.frame_counts)

    @property
    def closings(self) -> Closings:
        """Where the family's closing tokens stand among the visual tokens."""
        family, (height, width) = family_named(self.model.family), self.model.preprocessing.size
        return family.closings(family.cells((height // self.model.patch_size, width // self.model.patch_size)))

    @property
    def precision(self) -> str:
        """The precision whose limits the accuracy gate applied: "int8" or the dtype."""
        return self.dtype if self.int8 is None else "int8"

    @property
    def adaptive(self) -> bool:
        """Whether the video decides how many frames each merge keeps, so that the engine is a chain of stages."""
        return self.layout.adaptive

    @property
    def in_stages(self) -> bool:
        """Whether a clip runs through several graphs: a chain, or a graph for its chunks and one for the rest."""
        return self.layout.in_stages

    @property
    def counts(self) -> tuple[int, ...]:
        """The frame counts that the engine takes, ascending."""
        return self.frame_counts or (self.frames,)

    def at(self, frames: int) -> Manifest:
        """The manifest of one of the frame counts: its counts, the names of its files, its Polygraphy line.

        Raises:
            EngineError: the engine does not take that many.
        """
        if frames not in self.counts:
            raise EngineError(
                f"engine {self.name} takes {' or '.join(map(str, self.counts))} frames, not {frames}: "
                f"{self._offer(frames)}"
            )
        if self.counts == (frames,):
            return self
        one = self.layout.at(frames)
        graph = one.graphs[0].file(ONNX_FILE)
        return self.replace(
            frames=frames,
            frames_per_stage=one.stages,
            tokens=one.tokens,
            tokens_full=one.tokens_full,
            frame_counts=(frames,),
            polygraphy=next((line for line in self.polygraphy.split(AND) if graph in line.split()), ""),
        )

    def _offer(self, frames: object) -> str:
        """The remedy for a caller who asked for `frames`."""
        given = "leave the number out" if len(self.counts) == 1 else "give one of them"
        if not isinstance(frames, int) or not 1 <= frames <= MOST_FRAMES:
            return given
        return f"{given}, or {BUILD} --frames {','.join(map(str, sorted({*self.counts, frames})))}"

    def file(self, name: str) -> str:
        """A file's name in this folder: `name`, with the frame count in it where there are several."""
        return name if self.frame_counts is None else count_file(name, self.frames)

    def stage_files(self, name: str) -> tuple[str, ...]:
        """The names of file `name` for each graph of the largest frame count; those of another count: `at(count)`."""
        return tuple(graph.file(name) for graph in self.layout.graphs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the schema version first; `from_dict` is its inverse."""
        values = {"schema": SCHEMA, **json.loads(json.dumps(msgspec.to_builtins(self, enc_hook=_builtin)))}
        if self.method == EarlyTomConfig.method:
            values.pop("method", None)
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
            raise EngineError(f"manifest has schema {shown(schema)}, this version reads {SCHEMA}: {remedy}")
        rest = {name: value for name, value in values.items() if name != "schema"}
        try:
            manifest = msgspec.convert(rest, cls)
        except msgspec.ValidationError as error:
            raise refusal("manifest", error, rest) from error
        if len(manifest.frame_counts or ()) == 1:  # one alone is for `at`
            raise EngineError(f"manifest.frame_counts: expected null or several frame counts: {REBUILD}")
        return manifest

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write `manifest.json` into `folder`, all of it or nothing, and return its path.

        Raises:
            EngineError: this is the manifest of a single one of several counts (`at`), which has no folder.
            OSError: no space, read-only, no permission; no temporary file is left behind.
        """
        if len(self.frame_counts or ()) == 1:
            raise EngineError(f"{self.name}: a manifest has all frame counts of its folder, not {self.counts[0]} alone")
        values = self.to_dict()
        text = json.dumps({**values, _SEAL: _seal(values)}, indent=2, allow_nan=False) + "\n"
        if len(text) > _MOST_BYTES:
            raise EngineError(f"{self.name}: a manifest has at most {_MOST_BYTES} bytes, this one has {len(text)}")
        target = Path(folder) / MANIFEST_FILE
        with partial(target) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
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
            EngineError: no engine folder, or one that changed since it was built.
        """
        path = Path(folder)
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise EngineError(f"engine folder {path} {what}: {BUILD}")
        if not (path / MANIFEST_FILE).is_file():
            raise EngineError(f"{path} is no engine folder, it has no {MANIFEST_FILE}: {BUILD}")
        values = read_json(path / MANIFEST_FILE, REBUILD, _MOST_BYTES)
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
    return {path.name: describe_file(path) for path in paths}


def describe_file(path: Path) -> FileRecord:
    """Record of one file; EngineError if it is no plain one."""
    with open_plain(path, REBUILD) as file:
        size = os.fstat(file.fileno()).st_size
    return FileRecord(size, _sha256(path))


def _sha256(path: Path) -> str:
    """Digest of a plain file up to its size at opening, plus one byte if it has grown, so that growth changes it."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open_plain(path, REBUILD) as file:
        left = os.fstat(file.fileno()).st_size + 1
        while left > 0 and (count := file.readinto(block[: min(left, _BLOCK)])):
            digest.update(block[:count])
            left -= count
    return digest.hexdigest()


def _seal(values: Mapping[str, Any]) -> str:
    """Digest of the content, independent of key order and white space."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _builtin(value: object) -> str | int | float:
    """A subclass of str, int or float (such as torch's version) as the plain type."""
    return next(kind(value) for kind in (str, int, float) if isinstance(value, kind))
