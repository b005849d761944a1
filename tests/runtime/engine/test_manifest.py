"""The manifest: what is written is read back, and whatever changed in the folder is noticed and named."""

import errno
import functools
import json
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from earlytom.config import EarlyTomConfig
from runtime.engine import manifest as module
from runtime.engine.manifest import FileRecord, Manifest, ModelRecord, PluginRecord, describe_files
from runtime.engine.records import PreprocessingRecord
from runtime.errors import EngineError

CONTENTS = {"vision.onnx": b"graph" * 100, "vision.onnx.data": bytes(range(256)) * 50, "vision.engine": b"\0" * 3000}


def make(folder: Path, **changes: Any) -> Manifest:
    """A folder with files and the manifest that describes them (not written yet)."""
    folder.mkdir(exist_ok=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    model = ModelRecord(
        source="micro",
        family="llava_onevision",
        digest="ab" * 32,
        trained=False,
        image_size=128,
        patch_size=16,
        preprocessing=PreprocessingRecord(size=(128, 128), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    )
    config = EarlyTomConfig(retention_ratio=0.3, merge_layers=(1, 3, 5), schedule="budget")
    fields: dict[str, Any] = {
        "name": folder.name,
        "key": "0123456789abcdef",
        "project_version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "model": model,
        "earlytom": config.to_dict(),
        "frames": 16,
        "frames_per_stage": (16, 12, 9, 7),
        "tokens": 77,  # 7 frames of ceil(16 * 0.3 * 16 / 7) = 11
        "tokens_per_frame": 16,
        "tokens_full": 256,
        "dim": 64,
        "dtype": "fp16",
        "target": "8.0",
        "backend": "tensorrt-rtx",
        "backend_version": "1.7.1.116",
        "files": describe_files(folder),
        "compression": "native",
        "plugins": (),
        "figures": {"export_seconds": 1.5, "peak_bytes": 3_000_000_000},
        "verification": {"passed": True, "hidden": {"cosine": 0.9999, "layers": [1, 3, 5]}},
        "polygraphy": "polygraphy run vision.onnx --onnxrt",
    }
    return Manifest(**(fields | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "micro-80"
    make(place).write(place)
    return place


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as another program would, with a digest that fits."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    del values["manifest_sha256"]
    change(values)
    path.write_text(json.dumps({**values, "manifest_sha256": module._seal(values)}))


def refused(folder: Path, match: str) -> str:
    with pytest.raises(EngineError, match=match) as caught:
        Manifest.read(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "python -m builder.build" in message
    return message


# What is written is read


def test_read_returns_what_was_written(tmp_path: Path) -> None:
    written = make(tmp_path / "e")
    assert written.write(tmp_path / "e") == tmp_path / "e" / "manifest.json"
    assert Manifest.read(tmp_path / "e") == written
    assert Manifest.from_dict(written.to_dict()) == written


def test_read_returns_tuples_and_records(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest.frames_per_stage == (16, 12, 9, 7)
    assert manifest.model.preprocessing.size == (128, 128)
    assert manifest.files["vision.engine"] == FileRecord(3000, manifest.files["vision.engine"].sha256)
    assert EarlyTomConfig.from_dict(manifest.earlytom).merge_layers == (1, 3, 5)


def test_unverified_and_uncompressed_manifests_are_valid(tmp_path: Path) -> None:
    off = EarlyTomConfig(retention_ratio=1.0, merge_layers=(), schedule="budget")
    counts = {"earlytom": off.to_dict(), "frames_per_stage": (16,), "tokens": 256}
    manifest = make(tmp_path / "e", verification=None, polygraphy="", figures={}, backend="onnx", **counts)
    manifest.write(tmp_path / "e")
    assert Manifest.read(tmp_path / "e") == manifest


def several(folder: Path, **changes: Any) -> Manifest:
    """A folder for 8 and for 16 frames."""
    folder.mkdir(exist_ok=True)
    for name in ("vision.f8.engine", "vision.f16.engine"):
        (folder / name).write_bytes(name.encode())
    lines = [f"polygraphy run vision.f{frames}.onnx --onnxrt" for frames in (8, 16)]
    return make(folder, **({"frame_counts": (8, 16), "polygraphy": " && ".join(lines)} | changes))


def test_several_frame_counts_and_videos_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = several(tmp_path / "e", batch=4)
    written.write(tmp_path / "e")
    manifest = Manifest.read(tmp_path / "e")
    assert manifest == written
    assert (manifest.frames, manifest.counts, manifest.batch) == (16, (8, 16), 4)
    least = manifest.at(8)
    assert (least.frames, least.frames_per_stage, least.tokens, least.tokens_full) == (8, (8, 6, 4, 3), 39, 128)
    assert least.stage_files("vision.engine") == ("vision.f8.engine",)
    assert least.polygraphy == "polygraphy run vision.f8.onnx --onnxrt"
    assert manifest.at(16).tokens == manifest.tokens
    assert manifest.stage_files("vision.engine") == ("vision.f16.engine",)
    with pytest.raises(EngineError, match="takes 8 or 16 frames, not 12"):
        manifest.at(12)


def test_one_video_and_one_frame_count_are_not_written(tmp_path: Path) -> None:
    plain = make(tmp_path / "e")
    assert not {"batch", "frame_counts"} & plain.to_dict().keys()
    assert (plain.batch, plain.counts) == (1, (16,))
    assert plain.at(16) is plain
    assert plain.stage_files("vision.engine") == ("vision.engine",)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"frame_counts": (8, 12)}, "frames is 16, of frame_counts"),
        ({"frame_counts": (4, 8, 16)}, r"lists no vision\.f4\.engine"),
        ({"frame_counts": (16, 8)}, "ascending frame counts"),
        ({"batch": 0}, "batch: expected `int` >= 1, got 0"),
        ({"batch": True}, "batch: expected `int`, got `bool`"),
        ({"frame_counts": "8"}, r"frame_counts: expected `array \| null`, got `str`"),
        ({"tokens": 78}, "tokens is 78"),
    ],
)
def test_counts_that_disagree_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(EngineError, match=match):
        several(tmp_path / "e", **changes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda values: values.update(frame_counts=[16]), "null or several frame counts"),
        (lambda values: values["files"].pop("vision.f8.engine"), r"lists no vision\.f8\.engine"),
        (lambda values: values["earlytom"].update(frame_budget=[12, 9, 7]), "frame_budget .* fits one frame count"),
        (lambda values: values["earlytom"].update(schedule="adaptive"), "frames_per_stage is|takes one video"),
    ],
)
def test_files_that_disagree_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], match: str
) -> None:
    several(tmp_path / "e").write(tmp_path / "e")
    edit(tmp_path / "e", change)
    refused(tmp_path / "e", match)


PLUGIN = PluginRecord(
    name="earlytom::FramePlan",
    version="1",
    kernel="frame_plan_kernel",
    tensors="fp32 [16, 16] -> fp32 [12, 16], bool [16]",
    ptx_sha256="cd" * 32,
    grid=(1, 1, 1),
    threads=128,
    registers=40,
    shared_bytes=512,
    spill_bytes=0,
)


def with_plugins(folder: Path) -> Manifest:
    return make(folder, backend="tensorrt", compression="plugin", plugins=(PLUGIN, PLUGIN))


def test_plugins_are_recorded(tmp_path: Path) -> None:
    written = with_plugins(tmp_path / "e")
    written.write(tmp_path / "e")
    read = Manifest.read(tmp_path / "e")
    assert read == written
    assert read.plugins == (PLUGIN, PLUGIN)
    assert Manifest.from_dict(written.to_dict()) == written


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"backend": "tensorrt-rtx"}, "compression is plugin, tensorrt-rtx has none"),
        ({"compression": "native"}, "compression is native and plugins are listed"),
        ({"compression": "fast"}, r"compression: expected `str` matching regex .*native\|plugin.*, got 'fast'"),
        ({"plugins": 3}, "plugins: expected `array`, got `int`"),
        ({"plugins": [3]}, r"plugins\[0\]: expected `object`, got `int`"),
        ({"plugins": [{}]}, r"plugins\[0\]: object missing required field `name`"),
    ],
)
def test_plugins_that_make_no_sense(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    folder = tmp_path / "e"
    with_plugins(folder).write(folder)
    edit(folder, lambda values: values.update(change))
    refused(folder, match)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", ""),
        ("version", 1),
        ("kernel", None),
        ("tensors", 3),
        ("ptx_sha256", "cd" * 31),
        ("ptx_sha256", "xy" * 32),
        ("grid", [1, 1]),
        ("grid", [1, 1, 0]),
        ("grid", 1),
        ("threads", 0),
        ("registers", 40.0),
        ("shared_bytes", -1),
        ("spill_bytes", True),
    ],
)
def test_a_plugin_record_of_wrong_types(tmp_path: Path, name: str, value: Any) -> None:
    folder = tmp_path / "e"
    with_plugins(folder).write(folder)
    edit(folder, lambda values: values["plugins"][1].update({name: value}))
    refused(folder, rf"plugins\[1\]\.{name}(\[2\])?: expected")


def test_files_lists_external_data_and_not_the_manifest(folder: Path) -> None:
    assert sorted(describe_files(folder)) == sorted(CONTENTS)


def test_a_large_file_is_hashed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert make(tmp_path / "e").files == (monkeypatch.undo(), make(tmp_path / "e"))[1].files


# What changed since


@pytest.mark.parametrize("name", sorted(CONTENTS))
@pytest.mark.parametrize("position", [0, 200, -1])
def test_a_flipped_byte_names_the_file_and_the_remedy(folder: Path, name: str, position: int) -> None:
    content = bytearray((folder / name).read_bytes())
    content[position] ^= 1
    (folder / name).write_bytes(content)
    message = refused(folder, re.escape(name) + " changed since it was built")
    assert "--force" in message
    assert Manifest.read(folder, verify_files=False).name == folder.name  # negative control: nothing else is wrong


def test_a_flipped_byte_anywhere_in_the_manifest_is_noticed(folder: Path) -> None:
    path = folder / "manifest.json"
    good = path.read_bytes()
    values = json.loads(good)
    kept = 0
    for position in range(0, len(good), 3):
        content = bytearray(good)
        content[position] ^= 1
        path.write_bytes(content)
        try:
            same = json.loads(content) == values  # a space that became another kind of space
        except ValueError:
            same = False
        if same:
            kept += 1
            Manifest.read(folder)
        else:
            refused(folder, "manifest")
    assert kept < len(good) / 30  # negative control: hardly any flip is harmless


def test_a_file_of_another_size_is_named_without_reading_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(folder / "vision.engine", "ab") as file:
        file.write(b"more")
    monkeypatch.setattr(module, "_sha256", lambda path: pytest.fail("sizes are compared first"))
    refused(folder, r"vision\.engine has 3004 bytes, the manifest says 3000")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "vision.onnx.data").unlink()
    refused(folder, r"vision\.onnx\.data is missing")
    (folder / "vision.onnx.data").mkdir()
    refused(folder, r"vision\.onnx\.data is missing")


def test_a_file_that_is_not_listed_is_nobody_s_business(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    Manifest.read(folder)


# What is no engine folder


def test_no_folder_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nothing", "does not exist")
    refused(tmp_path / "file", "is not a folder")
    refused(tmp_path / "empty", r"has no manifest\.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"schema": 1, "x": NaN}', b"[" * 5000, b"\0" * 100])
def test_a_torn_manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    refused(folder, "not valid JSON")


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"schema": true}', '{"schema": "1"}', '{"schema": 1.0}'])
def test_json_that_is_no_manifest(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    refused(folder, "no schema version, expected 2")


def test_a_newer_and_an_older_schema(folder: Path) -> None:
    edit(folder, lambda values: values.update(schema=3, something_new=1))
    assert "update this project" in refused(folder, "schema 3, this version reads 2")
    edit(folder, lambda values: values.update(schema=1))
    assert "update this project" not in refused(folder, "schema 1, this version reads 2")


def test_keys_must_be_exactly_those_of_the_schema(folder: Path) -> None:
    good = (folder / "manifest.json").read_bytes()
    for name in json.loads(good).keys() - {"schema", "manifest_sha256"}:
        edit(folder, lambda values, name=name: values.pop(name))
        refused(folder, f"manifest: object missing required field `{name}`")
        (folder / "manifest.json").write_bytes(good)
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda values: values.update(zoom=1), "manifest: object contains unknown field `zoom`"),
        (lambda values: values["model"].update(zoom=1), r"manifest\.model: object contains unknown field `zoom`"),
        (lambda values: values["model"].pop("digest"), r"manifest\.model: object missing required field `digest`"),
        (
            lambda values: values["model"]["preprocessing"].pop("mean"),
            "preprocessing: object missing .* `mean`",
        ),
        (
            lambda values: values["files"]["vision.onnx"].pop("bytes"),
            "files.*: object missing required field `bytes`",
        ),
    ]
    for change, match in changes:
        edit(folder, change)
        refused(folder, match)
        (folder / "manifest.json").write_bytes(good)
    Manifest.read(folder)


WRONG: list[tuple[str, Any]] = [
    ("name", ""),
    ("name", 3),
    ("key", "xyz"),
    ("key", None),
    ("project_version", None),
    ("created", "yesterday"),
    ("created", 3),
    ("model", None),
    ("model", []),
    ("earlytom", None),
    ("frames", "16"),
    ("frames", True),
    ("frames", 16.0),
    ("frames", 0),
    ("frames_per_stage", 16),
    ("frames_per_stage", [16, 12, 9, 0]),
    ("tokens", None),
    ("dim", -1),
    ("dtype", "int8"),
    ("dtype", ["fp16"]),
    ("target", "sm80"),
    ("target", 8.0),
    ("backend", "openvino"),
    ("backend", None),
    ("backend_version", 1),
    ("files", []),
    ("files", {"vision.engine": 3}),
    ("figures", {"seconds": "1"}),
    ("figures", {"seconds": True}),
    ("figures", None),
    ("verification", {}),
    ("verification", {"passed": 1}),
    ("verification", []),
    ("polygraphy", None),
    ("model.digest", ""),
    ("model.trained", 0),
    ("model.image_size", None),
    ("model.patch_size", "14"),
    ("model.source", None),
    ("model.preprocessing.size", [128]),
    ("model.preprocessing.size", ["a", "b"]),
    ("model.preprocessing.size", [64, 64]),
    ("model.preprocessing.mean", [0.5, 0.5]),
    ("model.preprocessing.std", [0.5, 0.5, 0.0]),
    ("model.preprocessing.std", 0.5),
    ("model.preprocessing.std", [None] * 3),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_what_is_wrong_names_the_field(folder: Path, name: str, value: Any) -> None:
    *records, field = name.split(".")
    edit(folder, lambda values: functools.reduce(operator.getitem, records, values).update({field: value}))
    refused(folder, rf"{re.escape(name)}(\[.+\])?: expected" if records else name)


def test_frames_that_are_not_square(tmp_path: Path) -> None:
    preprocessing = PreprocessingRecord(size=(96, 128), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    square = make(tmp_path / "oblong")
    model = square.model.replace(image_size=(96, 128), preprocessing=preprocessing)
    written = square.replace(model=model)
    written.write(tmp_path / "oblong")
    assert Manifest.read(tmp_path / "oblong") == written
    for size in ((128, 96), (96, 96), (96,), (96, 0), 96):
        with pytest.raises(EngineError, match=r"model\.image_size|preprocessing\.size"):
            model.replace(image_size=size)


@pytest.mark.parametrize("record", [{"bytes": -1, "sha256": "ab" * 32}, {"bytes": 3, "sha256": "ab"}])
def test_a_wrong_file_record(folder: Path, record: dict[str, Any]) -> None:
    edit(folder, lambda values: values["files"].update({"vision.engine": record}))
    refused(folder, r"files\[\.\.\.\]\.(bytes|sha256): expected")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames_per_stage", [16, 12, 9, 8]),
        ("tokens", 78),
        ("tokens_full", 255),
        ("frames", 15),
        ("tokens_per_frame", 17),
    ],
)
def test_counts_that_contradict_the_settings(folder: Path, name: str, value: Any) -> None:
    edit(folder, lambda values: values.update({name: value}))
    refused(folder, "contradicts itself")


def test_settings_that_make_no_sense(folder: Path) -> None:
    edit(folder, lambda values: values["earlytom"].update(retention_ratio=1.5))
    refused(folder, "settings that make no sense")
    edit(folder, lambda values: values["earlytom"].update(retention_ratio=0.3, zoom=1))
    refused(folder, "zoom")


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\nb", "a\0b", "manifest.json"],
)
def test_files_outside_the_folder_are_never_opened(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"bytes": 1, "sha256": "ab" * 32}
    edit(folder, lambda values: values["files"].update({name: record}))
    monkeypatch.setattr(module, "_sha256", lambda path: pytest.fail(f"{path} was read"))
    refused(folder, "no plain file name")


def test_a_compiled_engine_must_be_listed(folder: Path) -> None:
    edit(folder, lambda values: values["files"].pop("vision.engine"))
    refused(folder, r"lists no vision\.engine, which tensorrt-rtx needs")


def test_a_builder_cannot_make_a_manifest_that_would_be_refused(tmp_path: Path) -> None:
    for changes in (
        {"tokens": 78},
        {"key": "?"},
        {"figures": {"seconds": float("nan")}},
        {"verification": {"passed": 1}},
    ):
        with pytest.raises(EngineError):
            make(tmp_path / "e", **changes)
    with pytest.raises(EngineError, match="JSON"):
        make(tmp_path / "e", verification={"passed": True, "cosine": float("nan")})


# Writing


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_manifest_and_nothing_else(
    folder: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(os, failing, no_space)
    with pytest.raises(OSError, match="No space"):
        Manifest.read(folder).replace(polygraphy="other").write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_writing_again_replaces_the_manifest(folder: Path) -> None:
    changed = Manifest.read(folder).replace(polygraphy="other")
    changed.write(folder)
    assert Manifest.read(folder) == changed
    assert sorted(path.name for path in folder.iterdir()) == sorted([*CONTENTS, "manifest.json"])


def test_a_frame_count_that_is_none_is_not_offered_to_build(engine: Path) -> None:
    manifest = Manifest.read(engine)
    other = manifest.frames + 1
    with pytest.raises(EngineError, match=rf"not {other}: leave the number out.*--frames {manifest.frames},{other}"):
        manifest.at(other)
    for nonsense in (0, -1, "x"):
        with pytest.raises(EngineError, match=rf"not {nonsense}: leave the number out$"):
            manifest.at(nonsense)  # type: ignore[arg-type]
