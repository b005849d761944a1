"""All facts about an engine as one record in plain JSON types, for `python -m builder.inspect` and the report. Files
are read and nothing is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builder.inspection import Record
from builder.inspection.layers import MOST_BYTES, chain_layers, compiled_layers, graph_layers
from runtime.engine import layout
from runtime.engine.manifest import REBUILD, Manifest
from runtime.engine.records import cut
from runtime.errors import EngineError
from runtime.files.plain import read_json

COUNTS = ("frames_per_stage", "tokens", "tokens_per_frame", "tokens_full")  # of one frame count


def describe(path: Path, frames: int | None = None) -> Record:
    """The record of an engine.

    Args:
        path: the engine's folder, or one of its files.
        frames: the frame count of "layers", if the engine has several; default: the largest.

    Returns:
        "folder"; "manifest" (`Manifest.to_dict`); "tensors": name, direction, dtype and shape of each, for every frame
        count; "counts": frames, frames per stage and tokens of every frame count; "layers": see
        `builder.inspection.layers`, None if a compiled engine has no list; "verification": outcome, clips, notes and
        checks, None if the gate did not run; "compile": the compiler's report, a list of them for several graphs, None
        for backend "onnx"; "key_parts": `BuildConfig.key_parts`, None if not recorded.
    """
    folder = path.parent if path.is_file() else path
    if path.is_file() and not (folder / layout.MANIFEST_FILE).is_file():
        raise EngineError(f"{path} is no file of an engine folder: name one that python -m builder.build wrote")
    manifest = Manifest.read(folder)
    if path.is_file() and path.name not in (layout.MANIFEST_FILE, *manifest.files):
        raise EngineError(f"{path} is no file of the engine in {folder}: name the folder or its manifest.json")
    one = manifest.at(manifest.frames if frames is None else frames)
    try:
        about = _contents(folder, manifest, one)
        record = {"folder": str(folder), "manifest": manifest.to_dict(), **about}
        return dict(json.loads(json.dumps(record, allow_nan=False)))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {cut(error)}"
        raise EngineError(f"{folder} was not written by this version of the builder ({why}): {REBUILD}") from error


def _contents(folder: Path, manifest: Manifest, one: Manifest) -> Record:
    """The fields that are not in the manifest; `one`: the manifest for the frame count of "layers".

    Files of another version may raise any error that `describe` catches.
    """
    report: Record = {}
    if layout.REPORT_FILE in manifest.files:
        report = read_json(folder / layout.REPORT_FILE, REBUILD, MOST_BYTES)
    compiled = report.get("compile")
    for found in compile_reports(compiled):
        found["warnings"] = list(map(str, found["warnings"]))
        del found["layers"]  # also in layers.json
    layers = None
    if manifest.in_stages:
        layers = chain_layers(folder, manifest)
    elif manifest.backend == "onnx":
        layers = graph_layers(folder / one.file(layout.ONNX_FILE))
    elif one.file(layout.LAYERS_FILE) in manifest.files:
        layers = compiled_layers(folder / one.file(layout.LAYERS_FILE))
        if manifest.frame_counts is not None:
            layers["source"] += f", {one.frames} frames"
    return {
        "tensors": [tensor for frames in manifest.counts for tensor in _tensors(manifest.at(frames))],
        "counts": [{name: getattr(manifest.at(n), name) for name in ("frames", *COUNTS)} for n in manifest.counts],
        "layers": layers,
        "verification": _verification(manifest.verification),
        "compile": compiled,
        "key_parts": report.get("key_parts"),
    }


def compile_reports(compiled: Any) -> list[Record]:
    """The compiler's reports as a list: one for each graph."""
    return compiled if isinstance(compiled, list) else [] if compiled is None else [compiled]


def _tensors(manifest: Manifest) -> list[Record]:
    videos = [manifest.batch] if manifest.batch > 1 else []
    frames = [manifest.frames, 3, *manifest.model.preprocessing.size]
    tokens, left = manifest.tokens, manifest.frames_per_stage[-1]
    rows = [
        (layout.FRAMES, "in", "uint8", frames),
        (layout.TOKENS, "out", manifest.dtype, [tokens, manifest.dim]),
        (layout.POSITIONS, "out", "int64", [tokens]),
        (layout.SOURCES, "out", "fp32", [left, manifest.layout.steps]),
        (layout.PLACE, "out", "int64", [tokens]),
        (layout.BIAS, "out", "fp32", [tokens]),
    ]
    return [
        {"name": name, "direction": direction, "dtype": dtype, "shape": videos + shape}
        for name, direction, dtype, shape in rows
    ]


def _verification(gate: Record | None) -> Record | None:
    """The gate's outcome with its checks in one list."""
    if gate is None:
        return None
    checks = [
        {"step": step, "what": str(check["what"]), "value": float(check["value"]), "limit": float(check["limit"])}
        | {"passed": bool(check["passed"])}
        | ({"frames": int(check["frames"])} if "frames" in check else {})
        for step, found in gate.get("steps", {}).items()
        for check in found
    ]
    said = {name: list(map(str, gate.get(name, ()))) for name in ("clips", "notes")}
    return {"passed": gate["passed"], **said, "checks": checks}
