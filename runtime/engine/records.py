"""The parts of a manifest. Each record checks itself when it is made, whether by a builder or from a file.

msgspec checks each field against its type, without conversion; `__post_init__` checks fields against each other. A
wrong value is an `EngineError` that names the path to it. `runtime.engine.manifest` puts the records together.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import PurePosixPath
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from earlytom.families import FrameSampling
from earlytom.numbers import shown
from runtime.engine.layout import MANIFEST_FILE
from runtime.errors import EngineError

REBUILD = "rebuild it with python -m builder.build --force"
MOST_FRAMES = 100_000  # more than any video has, and few enough to derive all counts quickly
MOST_COUNTS = 256  # frame counts of one engine
_WORDS = 200  # characters kept of another library's message

_TEXT = r"\A[^\0]+\Z"

Name = Annotated[str, Meta(max_length=255, pattern=_TEXT)]
Text = Annotated[str, Meta(max_length=4096, pattern=_TEXT)]  # a name or a path
Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]+\Z")]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=1, le=2**53)]
Size = Annotated[int, Meta(ge=0, le=2**53)]
# (height, width), in a union with `Count`. No `tuple[Count, Count]`: msgspec 0.22 crashes on a union of a bounded
# number and a tuple of fixed length.
Sides = Annotated[tuple[Count, ...], Meta(min_length=2, max_length=2)]
Real = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]  # finite
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A struct that checks its fields' types (lists become tuples). A field with its default value is not written."""

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            try:
                msgspec.structs.force_setattr(self, field.name, msgspec.convert(value, field.type))
            except msgspec.ValidationError as error:
                where = type(self).__name__.removesuffix("Record").lower()
                raise refusal(f"{where}.{field.name}", error, value) from error

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return msgspec.structs.replace(self, **changes)


class FileRecord(Record, frozen=True):
    """Size in bytes and SHA-256 (hex) of one file of the folder."""

    bytes: Size
    sha256: Sha256


class PreprocessingRecord(Record, frozen=True):
    """How frames become pixels: `size` (H, W) to resize to; `mean` and `std` (RGB) of the engine's normalisation; how
    frames are sampled, see `runtime.video.sample_indices` ("ends" is not written)."""

    size: tuple[Count, Count]
    mean: tuple[Real, Real, Real]
    std: tuple[Positive, Positive, Positive]
    sampling: FrameSampling = "ends"


class ModelRecord(Record, frozen=True):
    """The model the engine was built from.

    `digest` identifies the weights in the engine; `trained` is False for random weights. `answers` identifies all else
    that answers depend on (decoder, tokenizer, templates); `commit` is that of a hub repository. Manifests of earlier
    versions have neither, and None is not written. `image_size` is the side of a square frame in pixels, or (height,
    width).
    """

    source: Text
    family: Text
    digest: Text
    trained: bool
    image_size: Count | Sides
    patch_size: Count
    preprocessing: PreprocessingRecord
    answers: Hex | None = None
    commit: Hex | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        side = self.image_size
        size = (side, side) if isinstance(side, int) else side
        if side == (size[0], size[0]):
            raise EngineError(f"model.image_size: expected the side of a square alone, got {shown(side)}: {REBUILD}")
        if (got := self.preprocessing.size) != size:
            raise EngineError(f"model.preprocessing.size: expected {shown(size)}, got {shown(got)}: {REBUILD}")


class PluginRecord(Record, frozen=True):
    """One kernel that a TensorRT plugin put into the engine.

    Attributes:
        name, version: of the plugin in TensorRT's registry, such as "earlytom::FramePlan" and "1".
        kernel: its entry function.
        tensors: types and shapes of its inputs and outputs, such as "fp32 [32, 32] -> fp32 [24, 32], bool [32]".
        ptx_sha256: digest of the embedded PTX.
        grid, threads: blocks in x, y and z, and threads per block.
        registers: per thread; `shared_bytes`: shared memory per block; `spill_bytes`: of registers, to local memory.
    """

    name: Text
    version: Text
    kernel: Text
    tensors: Text
    ptx_sha256: Sha256
    grid: tuple[Count, Count, Count]
    threads: Count
    registers: Count
    shared_bytes: Size
    spill_bytes: Size


class ProgramRecord(Record, frozen=True):
    """One compiled program that a runtime added to the folder: what made it, and size and SHA-256 of its file."""

    bytes: Size
    sha256: Sha256
    identity: dict[Text, Text | Size]


def refusal(where: str, error: msgspec.ValidationError, value: Any) -> EngineError:
    """msgspec's complaint about `value`, called `where`, in one line: the path, what was expected and what was got."""
    if isinstance(error.__cause__, EngineError):  # raised by a nested record's own check
        return error.__cause__
    what, _, path = str(error).partition(" - at `$")
    if " got " not in what and "field" not in what and "..." not in path:  # msgspec names types, not values
        for step in re.findall(r"\w+", path):
            value = value[int(step) if isinstance(value, list | tuple) else step]
        what += f", got {shown(value)}"
    return EngineError(f"{where}{path.rstrip('`')}: {cut(what[0].lower() + what[1:])}: {REBUILD}")


def cut(text: object) -> str:
    """Another library's message for one of ours: one line of at most `_WORDS` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= _WORDS else line[: _WORDS - 3] + "..."


def one_of(*names: str) -> Meta:
    """The constraint of a field that is one of `names`."""
    return Meta(pattern=rf"\A(?:{'|'.join(map(re.escape, names))})\Z")


def is_file_name(name: str) -> bool:
    """A file directly in the folder: no separators of any system, no "..", no drive, no control characters."""
    if not name.isprintable() or any(c in name for c in "/\\:") or not 0 < len(name.encode()) <= 255:
        return False
    return PurePosixPath(name).name == name and name not in ("..", MANIFEST_FILE)


def plain(name: str, value: Any) -> Any:
    """A copy of `value` in plain JSON types (tuples become lists), so that what is read equals what was written."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise EngineError(f"manifest field {name} cannot be written as JSON ({cut(error)})") from error
