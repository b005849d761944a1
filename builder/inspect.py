"""Look into an engine folder without running it.

    python -m builder.inspect ENGINE
    python -m builder.inspect ENGINE --compare OTHER

Shows what was built from what, its tensors and counts, what the engine is made of (layers by kind, fused attention,
the share of the arithmetic in half precision, weights, the biggest layers), what the accuracy gate measured and what
the build cost. `--compare` lists the fields in which two folders differ, and tells from the parts of their cache keys
why one was built although the other was there.

Everything is read from what the builder left in the folder: JSON, and for `--backend onnx` the graph, without its
weights. Nothing is deserialised into an engine, so neither a GPU nor TensorRT nor ONNX Runtime is needed. The files
are compared with the manifest first. What is no whole engine folder ends in one line and status 2.

This module is the command: it puts a folder's record together and shows it. What adds up layers and what compares two
records is in `builder.inspection`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from builder.inspection import Record
from builder.inspection.comparison import compare
from builder.inspection.layers import MOST_BYTES, chain_layers, compiled_layers, graph_layers
from runtime import cli
from runtime.engine import layout
from runtime.engine.manifest import REBUILD, Manifest
from runtime.engine.records import cut
from runtime.errors import EngineError
from runtime.files.plain import read_json

WIDTH = 60  # of a value in a table
# Fields of the manifest that have a place of their own on the screen.
_COUNTS = ("frames_per_stage", "tokens", "tokens_per_frame", "tokens_full")
_APART = ("frames_kept", "schema", "name", "files", "figures", "verification", "polygraphy", "plugins", "programs")
_KERNEL = ("name", "version", "kernel", "tensors", "registers", "shared_bytes", "spill_bytes", "ptx_sha256")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options = parser().parse_args(argv)
    screen = cli.Screen(json_only=options.json)
    record = describe(options.engine, options.frames)
    if options.compare is not None:
        record = compare(record, describe(options.compare, options.frames))
    if options.json:
        screen.result(record)
    elif options.compare is not None:
        show_comparison(screen, record)
    else:
        show(screen, record)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = cli.Parser(
        prog="python -m builder.inspect",
        description="Show what an engine folder holds, what it was built from and what was verified; runs nothing.",
    )
    p.add_argument("engine", type=Path, metavar="ENGINE", help="engine folder, or a file in it")
    p.add_argument(
        "--compare",
        type=Path,
        metavar="OTHER",
        help="tell in which fields this engine folder differs, and why the one was built although the other was there",
    )
    p.add_argument(
        "--frames",
        type=int,
        metavar="F",
        help="show the layers for this one of the engine's frame counts, if it has several (default: the most)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return p


def describe(path: Path, frames: int | None = None) -> Record:
    """Everything that is known about an engine, in plain JSON types.

    Args:
        path: the engine's folder, or one of its files.
        frames: of which frame count "layers" is, where the engine has several; default the most.

    Returns:
        "folder"; "manifest" (`Manifest.to_dict`); "tensors": name, direction, dtype and shape of each, for every frame
        count; "counts": frames, frames per stage and tokens of every frame count; "layers": of one run, see
        `builder.inspection.layers`, None where a compiled engine came without a list; "verification": outcome, clips,
        notes and checks, None where the gate did not run; "compile": the compiler's report, of a chain or of several
        frame counts a list of them, None for ONNX alone; "key_parts": `BuildConfig.key_parts`, None where they were not
        recorded.

    Raises:
        EngineError: no engine folder, one that changed since it was built, files that another version wrote, or a frame
            count that the engine does not take.
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
    """What is not in the manifest; `one`: of the frame count whose layers are shown.

    A file that some other version wrote may raise anything that `describe` catches.
    """
    report: Record = {}
    if layout.REPORT_FILE in manifest.files:
        report = read_json(folder / layout.REPORT_FILE, REBUILD, MOST_BYTES)
    compiled = report.get("compile")
    for found in _reports(compiled):
        found["warnings"] = list(map(str, found["warnings"]))
        del found["layers"]  # they are in layers.json too
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
        "counts": [{name: getattr(manifest.at(n), name) for name in ("frames", *_COUNTS)} for n in manifest.counts],
        "layers": layers,
        "verification": _verification(manifest.verification),
        "compile": compiled,
        "key_parts": report.get("key_parts"),
    }


def _reports(compiled: Any) -> list[Record]:
    """The compiler's reports: one, of a chain one for each stage, one for each of several frame counts."""
    return compiled if isinstance(compiled, list) else [] if compiled is None else [compiled]


def _tensors(manifest: Manifest) -> list[Record]:
    videos = [manifest.batch] if manifest.batch > 1 else []
    frames = [manifest.frames, 3, *manifest.model.preprocessing.size]
    tokens, left = manifest.tokens, manifest.frames_per_stage[-1]
    rows = [
        (layout.FRAMES, "in", "uint8", frames),
        (layout.TOKENS, "out", manifest.dtype, [tokens, manifest.dim]),
        (layout.POSITIONS, "out", "int64", [tokens]),
        (layout.SOURCES, "out", "fp32", [left, manifest.frames]),
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


def show(screen: cli.Screen, record: Record) -> None:
    """A record of `describe` for people."""
    manifest = record["manifest"]
    screen.line(f"engine: {record['folder']}\n")
    screen.table(("what it is", ""), list(_about(manifest)))
    screen.line()
    shapes = [(t["name"], t["direction"], t["dtype"], " x ".join(map(str, t["shape"]))) for t in record["tensors"]]
    screen.table(("tensor", "", "dtype", "shape"), shapes)
    screen.line()
    for counts in record["counts"]:
        stages, tokens, whole_frame, full = (counts[name] for name in _COUNTS)
        most = ""
        if kept := manifest.get("frames_kept"):
            stages, most = [f"{usual} ({low} to {high})" for low, usual, high in kept], "at most "
        screen.line(
            f"frames: {' -> '.join(map(str, stages))}; tokens: {most}{tokens} of {full} ({tokens / full:.1%}), "
            f"{whole_frame} a whole frame"
        )
    screen.line()
    if manifest["plugins"]:
        cells = [[_text(kernel[name]) for name in _KERNEL] for kernel in manifest["plugins"]]
        screen.table(("plugin", *(name.replace("_", " ") for name in _KERNEL[1:])), cells)
        screen.line()
    show_layers(screen, record["layers"])
    show_verification(screen, record["verification"])
    screen.table(("figure", "value"), [(name, _quantity(name, v)) for name, v in manifest["figures"].items()])
    warnings = [text for one in _reports(record["compile"]) for text in one["warnings"]]
    for warning in dict.fromkeys(warnings):
        screen.line(f"warning of the compiler: {warning}")
    screen.line()
    screen.table(("file", "size"), [(name, decimal(file["bytes"])) for name, file in manifest["files"].items()])
    if programs := manifest.get("programs"):
        screen.line()
        sizes = [(name, decimal(program["bytes"])) for name, program in programs.items()]
        screen.table(("compiled program of the decoder", "size"), sizes)


def _about(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a manifest that nothing else shows, those of its parts by their path."""
    for name, value in values.items():
        if not prefix and name in (*_APART, *_COUNTS):
            continue
        if isinstance(value, dict):
            yield from _about(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def show_layers(screen: cli.Screen, layers: Record | None) -> None:
    """What the engine is made of."""
    if layers is None:
        screen.line("layers: the build left no list of them\n")
        return
    fused, unfused = layers["attention_fused"], layers["attention_unfused"]
    narrow = f", {layers['int8_share']:.2%} in int8" if layers["int8_share"] else ""
    shares = ", ".join(f"{share:.1%} {dtype}" for dtype, share in layers["weight_shares"].items())
    screen.line(
        f"layers ({layers['source']}): {layers['count']}; matrix products: {layers['matrix_flops'] / 1e9:.2f} GFLOP, "
        f"{layers['half_share']:.2%} in half precision{narrow}\n"
        f"fused attention: {fused} of {fused + len(unfused)} that can be"
        f"{', not ' if unfused else ''}{', '.join(unfused)}; weights: {decimal(layers['weight_bytes'])} ({shares})\n"
    )
    kinds = [(_text(row["kind"]), row["work"], row["layers"], *_cells(row)) for row in layers["kinds"]]
    screen.table(("kind", "work", "layers", "precision", "GFLOP", "weights MB"), kinds)
    screen.line()
    biggest = [(_text(row["name"]), row["kind"], *_cells(row)) for row in layers["biggest"]]
    screen.table(("biggest layers", "kind", "precision", "GFLOP", "weights MB"), biggest)
    screen.line()


def _cells(row: Record) -> tuple[str, str, str]:
    return row["precision"], f"{row['flops'] / 1e9:.3f}", f"{row['weight_bytes'] / 1e6:.3f}"


def show_verification(screen: cli.Screen, gate: Record | None) -> None:
    """What the accuracy gate ran on, and what it measured."""
    if gate is None:
        screen.line("verified: no (built with --no-verify)\n")
        return
    outcome = "passed" if gate["passed"] else "FAILED"
    screen.line(f"verified: the graph in ONNX Runtime {outcome}, on {', '.join(gate['clips'])}")
    rows = [
        (*_count(c), c["step"], c["what"], f"{c['value']:.8g}", f"{c['limit']:.6g}", "ok" if c["passed"] else "FAILED")
        for c in gate["checks"]
    ]
    several = ["frames"] * any(map(_count, gate["checks"]))
    screen.table((*several, "step", "what", "value", "limit", ""), rows)
    for note in gate["notes"]:
        screen.line(f"  {note}")
    screen.line()


def _count(check: Record) -> tuple[int, ...]:
    """Of which frame count a check is, where there are several."""
    return (check["frames"],) if "frames" in check else ()


def show_comparison(screen: cli.Screen, record: Record) -> None:
    """A record of `compare` for people."""
    screen.line(f"engine: {record['engine']}\nother:  {record['other']}\n")
    for reason in record["reasons"]:
        screen.line(reason)
    for title, name in (("part of the key", "key_parts"), ("field that differs", "differences")):
        rows = [(r["field"], _text(r["engine"]), _text(r["other"]), r.get("set_by", "")) for r in record[name]]
        if rows:
            screen.line()
            screen.table((title, "engine", "other", "set by" if name == "key_parts" else ""), rows)
    if not record["differences"]:
        screen.line("no field differs")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return f"({len(value)} fields)"
    if isinstance(value, float):
        return f"{value:.8g}"
    text = "-" if value is None else str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]  # digests are told apart by their beginnings
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _quantity(name: str, value: float) -> str:
    """A figure with the unit that its name tells."""
    if name.endswith("_bytes"):
        return decimal(int(value))
    if name.startswith("flops_"):
        return f"{value / 1e9:.2f} GFLOP"
    return f"{value:.2f} s" if name.endswith("_seconds") else f"{value:.6g}"


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
