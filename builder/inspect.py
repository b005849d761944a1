"""Look into an engine folder without running it.

    python -m builder.inspect ENGINE
    python -m builder.inspect ENGINE --compare OTHER
    python -m builder.inspect ENGINE --html FILE

Shows the engine's settings and source, its tensors and counts, its layers (by kind, fused attention, the share of flops
in half precision, weights, the largest ones), the accuracy gate's measurements and the build's figures. `--compare`
lists the differences of two folders, and why the cache did not reuse one for the other. `--html` writes the page that a
build writes as report.html.

Everything is read from the folder's files: JSON, and for `--backend onnx` the graph, without its weights. No engine is
deserialised, so neither a GPU nor TensorRT nor ONNX Runtime is needed. The files' digests are checked first; an
incomplete folder ends in one line and status 2.

This module is the command; records, layers, comparisons and pages are made in `builder.inspection`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from builder.inspection import Record
from builder.inspection.comparison import compare
from builder.inspection.record import COUNTS, compile_reports, describe
from earlytom.errors import UserError
from runtime import cli

WIDTH = 60  # of a value in a table
# Fields of the manifest that are shown separately.
_APART = ("frames_kept", "schema", "name", "files", "figures", "verification", "polygraphy", "plugins", "programs")
_KERNEL = ("name", "version", "kernel", "tensors", "registers", "shared_bytes", "spill_bytes", "ptx_sha256")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options = parser().parse_args(argv)
    screen = cli.Screen(json_only=options.json)
    if options.html is not None and options.compare is not None:
        raise UserError("--html shows one engine: leave out --compare")
    record = describe(options.engine, options.frames)
    if options.html is not None:
        from builder.inspection.page import write

        path = write(options.engine, options.html, options.frames)
        screen.line(f"report: {path}")
        screen.result({"engine": record["folder"], "report": str(path)})
        return 0
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
    """The command line."""
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
    p.add_argument("--html", type=Path, metavar="FILE", help="write the report of the engine there, a page of its own")
    p.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return p


def show(screen: cli.Screen, record: Record) -> None:
    """Print a record of `describe`."""
    manifest = record["manifest"]
    screen.line(f"engine: {record['folder']}\n")
    screen.table(("what it is", ""), list(_about(manifest)))
    screen.line()
    shapes = [(t["name"], t["direction"], t["dtype"], " x ".join(map(str, t["shape"]))) for t in record["tensors"]]
    screen.table(("tensor", "", "dtype", "shape"), shapes)
    screen.line()
    for counts in record["counts"]:
        stages, tokens, whole_frame, full = (counts[name] for name in COUNTS)
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
    warnings = [text for one in compile_reports(record["compile"]) for text in one["warnings"]]
    for warning in dict.fromkeys(warnings):
        screen.line(f"warning of the compiler: {warning}")
    screen.line()
    screen.table(("file", "size"), [(name, decimal(file["bytes"])) for name, file in manifest["files"].items()])
    if programs := manifest.get("programs"):
        screen.line()
        sizes = [(name, decimal(program["bytes"])) for name, program in programs.items()]
        screen.table(("compiled program of the decoder", "size"), sizes)


def _about(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The manifest's other fields, nested ones by dotted path."""
    for name, value in values.items():
        if not prefix and name in (*_APART, *COUNTS):
            continue
        if isinstance(value, dict):
            yield from _about(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def show_layers(screen: cli.Screen, layers: Record | None) -> None:
    """Print the engine's layers."""
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
    """Print the accuracy gate's clips, checks and notes."""
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
    """(the check's frame count,) if there are several, else ()."""
    return (check["frames"],) if "frames" in check else ()


def show_comparison(screen: cli.Screen, record: Record) -> None:
    """Print a record of `compare`."""
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
        return text[:12]  # enough of a digest to compare
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _quantity(name: str, value: float) -> str:
    """A figure with the unit given by its name."""
    if name.endswith("_bytes"):
        return decimal(int(value))
    if name.startswith("flops_"):
        return f"{value / 1e9:.2f} GFLOP"
    return f"{value:.2f} s" if name.endswith("_seconds") else f"{value:.6g}"


if __name__ == "__main__":
    cli.stop_by_signal()
    sys.exit(cli.run(main, sys.argv[1:]))
