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
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from builder.layers import Layer, LayerSummary, LayerTensor, summarise
from runtime import cli, contract
from runtime.errors import EngineError
from runtime.manifest import REBUILD, Manifest

BIGGEST = 5
WIDTH = 60  # of a value in a table
# What to type, or to look at, for a part of the cache key that differs; "earlytom.tau" before "earlytom".
SET_BY = {
    "model": "--model (the weights in it)",
    "earlytom": "settings without an option",
    "earlytom.retention_ratio": "--ratio",
    "earlytom.merge_layers": "--merge-layers, --preset",
    "earlytom.tau": "--tau, --preset",
    "earlytom.schedule": "--schedule",
    "earlytom.frame_budget": "--frame-budget",
    "frames": "--frames",
    "dtype": "--fp16, --bf16, --fp32",
    "target": "--target",
    "compression": "--compression",
    "islands": "--islands",
    "backend": "--backend",
    "backend_version": "the installed library that compiles",
    "hardware_compatible": "--hardware-compatible",
    "workspace_gib": "--workspace",
    "calibration": "--calibration (the bytes of the clips)",
    "code": "this project's sources",
    "libraries": "installed libraries",
    "triton": "installed libraries",
}

_BYTES = {"fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
_ONNX_DTYPES = {"FLOAT16": "fp16", "BFLOAT16": "bf16", "FLOAT": "fp32", "DOUBLE": "fp64"}
_ONNX_WORK = {"Attention": "attention", "Conv": "convolution", "MatMul": "product", "Gemm": "product"}
# Fields of the manifest that have a place of their own on the screen.
_COUNTS = ("frames_per_stage", "tokens", "tokens_per_frame", "tokens_full")
_APART = ("frames_kept", "schema", "name", "files", "figures", "verification", "polygraphy", "plugins", *_COUNTS)
_KERNEL = ("name", "version", "kernel", "tensors", "registers", "shared_bytes", "spill_bytes", "ptx_sha256")

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options = parser().parse_args(argv)
    screen = cli.Screen(json_only=options.json)
    record = describe(options.engine)
    if options.compare is not None:
        record = compare(record, describe(options.compare))
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
    p.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return p


def describe(path: Path) -> Record:
    """Everything that is known about an engine, in plain JSON types.

    Args:
        path: the engine's folder, or one of its files.

    Returns:
        "folder"; "manifest" (`Manifest.to_dict`); "tensors": name, direction, dtype and shape of each; "layers": see
        `_added_up`, None where a compiled engine came without a list; "verification": outcome, clips, notes and checks,
        None where the gate did not run; "compile": the compiler's report, of a chain a list of them, None for ONNX
        alone; "key_parts": `BuildConfig.key_parts`, None where they were not recorded.

    Raises:
        EngineError: no engine folder, one that changed since it was built, or files that another version wrote.
    """
    folder = path.parent if path.is_file() else path
    manifest = Manifest.read(folder)
    if path.is_file() and path.name not in (contract.MANIFEST_FILE, *manifest.files):
        raise EngineError(f"{path} is no file of the engine in {folder}: name the folder or its manifest.json")
    try:
        record = {"folder": str(folder), "manifest": manifest.to_dict(), **_contents(folder, manifest)}
        return dict(json.loads(json.dumps(record, allow_nan=False)))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise EngineError(f"{folder} was not written by this version of the builder ({why}): {REBUILD}") from error


def _contents(folder: Path, manifest: Manifest) -> Record:
    """What is not in the manifest. A file that some other version wrote may raise anything that `describe` catches."""
    report: Record = {}
    if contract.REPORT_FILE in manifest.files:
        report = json.loads((folder / contract.REPORT_FILE).read_bytes())
    compiled = report.get("compile")
    for one in _reports(compiled):
        one["warnings"] = list(map(str, one["warnings"]))
        del one["layers"]  # they are in layers.json too
    layers = None
    if manifest.adaptive:
        layers = chain_layers(folder, manifest)
    elif manifest.backend == "onnx":
        layers = graph_layers(folder / contract.ONNX_FILE)
    elif contract.LAYERS_FILE in manifest.files:
        layers = compiled_layers(folder / contract.LAYERS_FILE)
    return {
        "tensors": _tensors(manifest),
        "layers": layers,
        "verification": _verification(manifest.verification),
        "compile": compiled,
        "key_parts": report.get("key_parts"),
    }


def _reports(compiled: Any) -> list[Record]:
    """The compiler's reports: one, of a chain one for each stage."""
    return compiled if isinstance(compiled, list) else [] if compiled is None else [compiled]


def _tensors(manifest: Manifest) -> list[Record]:
    frames = [manifest.frames, 3, *manifest.model.preprocessing.size]
    tokens = [manifest.tokens, manifest.dim]
    rows = [
        (contract.FRAMES, "in", "uint8", frames),
        (contract.TOKENS, "out", manifest.dtype, tokens),
        (contract.POSITIONS, "out", "int64", tokens[:1]),
    ]
    return [dict(zip(("name", "direction", "dtype", "shape"), row, strict=True)) for row in rows]


def _verification(gate: Record | None) -> Record | None:
    """The gate's outcome with its checks in one list."""
    if gate is None:
        return None
    checks = [
        {"step": step, "what": str(check["what"]), "value": float(check["value"]), "limit": float(check["limit"])}
        | {"passed": bool(check["passed"])}
        for step, found in gate.get("steps", {}).items()
        for check in found
    ]
    said = {name: list(map(str, gate.get(name, ()))) for name in ("clips", "notes")}
    return {"passed": gate["passed"], **said, "checks": checks}


# --------------------------------------------------------------------------------------------------------- layers


def compiled_layers(path: Path) -> Record:
    """What a compiled engine is made of, by the list that its build left."""
    return _added_up(*_listed(path))


def _listed(path: Path) -> tuple[str, list[Layer], LayerSummary]:
    document = json.loads(path.read_bytes())
    layers = []
    for values in document["layers"]:
        tensors = {name: tuple(LayerTensor(**t) for t in values[name]) for name in ("inputs", "constants", "outputs")}
        layers.append(Layer(**{**values, **tensors}))
    return document["source"], layers, LayerSummary.from_dict(document["summary"])


def chain_layers(folder: Path, manifest: Manifest) -> Record | None:
    """What the stages of a chain are made of, in one list; names begin with the stage, flops are of the median clip."""
    names = manifest.stage_files(contract.ONNX_FILE if manifest.backend == "onnx" else contract.LAYERS_FILE)
    if not all(name in manifest.files for name in names):
        return None
    source, every, unfused = "", [], []
    for stage, (name, (_, usual, _)) in enumerate(zip(names, manifest.frames_kept or (), strict=True)):
        if manifest.backend == "onnx":
            source, layers, summary = _graph(folder / name, usual)
        else:
            source, layers, summary = _listed(folder / name)
            layers = [_for_frames(layer, usual) for layer in layers]
        every += [_in_stage(layer, stage) for layer in layers]
        unfused += [f"{stage}: {node}" for node in summary.attention_unfused]
    summary = dataclasses.replace(summarise(every), attention_unfused=tuple(unfused))
    source = "the graphs" if manifest.backend == "onnx" else source
    return _added_up(f"{source} of {len(names)} stages", every, summary)


def _for_frames(layer: Layer, frames: int) -> Layer:
    """The list counts a dynamic number of frames as one."""
    dynamic = any(-1 in tensor.shape for tensor in (*layer.inputs, *layer.outputs))
    return dataclasses.replace(layer, flops=layer.flops * frames) if dynamic else layer


def _in_stage(layer: Layer, stage: int) -> Layer:
    """Stages have layers and weights of equal names, which are not the same."""
    constants = tuple(dataclasses.replace(tensor, name=f"{stage}: {tensor.name}") for tensor in layer.constants)
    return dataclasses.replace(layer, name=f"{stage}: {layer.name}", constants=constants)


def graph_layers(path: Path) -> Record:
    """What an ONNX graph is made of, its nodes being the layers; weights that lie beside it stay there.

    The functions that it calls are one layer each: their bodies multiply nothing larger than [F, F].
    """
    return _added_up(*_graph(path))


def _graph(path: Path, frames: int = -1) -> tuple[str, list[Layer], LayerSummary]:
    """The layers of a graph; `frames` in place of sizes that are dynamic."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # the protobuf library's own errors, which differ with its implementation
        raise ValueError(f"{path.name} is no ONNX graph, {error}") from error
    name_of = onnx.TensorProto.DataType.Name
    weights = {t.name: _tensor(t.name, tuple(t.dims), name_of(t.data_type)) for t in graph.initializer}
    known = dict(weights)
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value or frames for dim in kind.shape.dim)
        known[value.name] = _tensor(value.name, shape, name_of(kind.elem_type))
    layers = [_node_layer(node, known, set(weights)) for node in graph.node]
    return path.name, layers, summarise(layers)


def _tensor(name: str, shape: tuple[int, ...], dtype: str) -> LayerTensor:
    return LayerTensor(name, shape, _ONNX_DTYPES.get(dtype, dtype.lower()), "")


def _node_layer(node: Any, known: dict[str, LayerTensor], weights: set[str]) -> Layer:
    work = _ONNX_WORK.get(node.op_type, "other") if node.domain in ("", "ai.onnx") else "other"
    operands, outputs = (tuple(known[n] for n in names if n in known) for names in (node.input, node.output))
    touched = (*operands, *outputs) if work == "other" else operands[:2]
    return Layer(
        name=node.name or node.op_type,
        kind=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
        work=work,
        precision=max((t.dtype for t in touched if t.dtype in _BYTES), key=_BYTES.__getitem__, default=""),
        flops=0 if work == "other" else _flops(node.op_type, operands[0], operands[1], outputs[0]),
        tactic="",
        inputs=tuple(t for t in operands if t.name not in weights),
        constants=tuple(t for t in operands if t.name in weights),
        outputs=outputs,
        onnx=(node.name,),
    )


def _flops(operator: str, a: LayerTensor, b: LayerTensor, out: LayerTensor) -> int:
    """Two a multiply-add. Attention: a is Q [.., S, d], b is K [.., T, d]; two products."""
    if operator == "Attention":
        return 2 * abs(b.shape[-2]) * (_elements(a) + _elements(out))
    if operator == "Conv":
        return 2 * _elements(out) * (_elements(b) // abs(b.shape[0]))
    return 2 * _elements(out) * (_elements(a) // abs(out.shape[0]) if operator == "Gemm" else abs(a.shape[-1]))


def _elements(tensor: LayerTensor) -> int:
    return math.prod(map(abs, tensor.shape))


def _added_up(source: str, layers: Sequence[Layer], summary: LayerSummary) -> Record:
    """Layers added up: figures of the whole, groups of a kind and precision, and the layers with the most flops."""
    groups: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in layers:
        if layer.inputs or layer.constants or layer.outputs:  # the others only synchronise
            groups.setdefault((layer.kind, layer.work, layer.precision), []).append(layer)
    kinds = [
        {"kind": kind, "work": work, "precision": precision, "layers": len(members), **_cost(members)}
        for (kind, work, precision), members in groups.items()
    ]
    biggest = [{"name": x.name, "kind": x.kind, "precision": x.precision, **_cost([x])} for x in layers]
    for rows in (kinds, biggest):
        rows.sort(key=lambda row: (row["flops"], row["weight_bytes"], row.get("layers", 0)), reverse=True)
    return {
        "source": str(source),
        "count": int(summary.layers),
        "matrix_flops": int(summary.matrix_flops),
        "half_share": float(summary.half_share),
        "flop_shares": {dtype: float(share) for dtype, share in summary.flop_shares.items()},
        "weight_bytes": _cost(layers)["weight_bytes"],
        "weight_shares": {dtype: float(share) for dtype, share in summary.weight_shares.items()},
        "attention_fused": len(summary.attention_fused),
        "attention_unfused": list(map(str, summary.attention_unfused)),
        "kinds": kinds,
        "biggest": biggest[:BIGGEST],
    }


def _cost(layers: Iterable[Layer]) -> dict[str, int]:
    """Flops of the matrix products, and bytes of the weights by name: what several layers read counts once."""
    layers = list(layers)
    weights = {t.name: _elements(t) * _BYTES.get(t.dtype, 0) for layer in layers for t in layer.constants}
    return {"flops": sum(layer.flops for layer in layers), "weight_bytes": sum(weights.values())}


# --------------------------------------------------------------------------------------------------------- compare


def compare(one: Record, other: Record) -> Record:
    """Where two records of `describe` differ, and what that means for the cache.

    Returns:
        "engine" and "other": their folders; "same_key"; "reasons": sentences that say why the one was not taken for the
        other; "key_parts": the parts of the key that differ, with both values and "set_by"; "differences": the fields
        of the manifest and the figures of the layers that differ. What one of them lacks is None there.
    """
    same = one["manifest"]["key"] == other["manifest"]["key"]
    recorded = one["key_parts"] is not None and other["key_parts"] is not None
    parts = _differences(one["key_parts"], other["key_parts"]) if recorded and not same else []
    for part in parts:
        part["set_by"] = SET_BY.get(part["field"]) or SET_BY.get(part["field"].split(".")[0], part["field"])
    return {
        "engine": one["folder"],
        "other": other["folder"],
        "same_key": same,
        "reasons": _reuse(one, other) if same else _other_key(one, other, parts),
        "key_parts": parts,
        "differences": _differences(_comparable(one), _comparable(other)),
    }


def _comparable(record: Record) -> Record:
    layers = {k: v for k, v in (record["layers"] or {}).items() if k not in ("kinds", "biggest")}
    return {**record["manifest"], "layers": layers}


def _other_key(one: Record, other: Record, parts: list[Record]) -> list[str]:
    silent = [record["folder"] for record in (one, other) if record["key_parts"] is None]
    if silent:
        return [f"the keys differ; what that of {' and '.join(silent)} is made of was not recorded"]
    if not parts:
        return ["the keys differ, in nothing that is recorded: two versions of the builder made them"]
    causes = dict.fromkeys(part["set_by"] for part in parts)
    return [f"the keys differ, so neither is taken for the other. What differs comes from: {'; '.join(causes)}"]


def _reuse(one: Record, other: Record) -> list[str]:
    """Why an engine of the same key was not taken."""
    found = []
    for record in (one, other):
        manifest, folder = record["manifest"], record["folder"]
        gate = record["verification"]
        if gate is None or not gate["passed"]:
            found.append(f"{folder} was not verified: only a build with --no-verify takes it")
        elif all(check["step"] != "text" for check in gate["checks"]):
            found.append(f"{folder} was verified without the step text: a build with --verify-text does not take it")
        if Path(folder).resolve().name != manifest["name"]:
            found.append(f"{folder} was renamed: a build looks for {manifest['name']}")
    return ["the keys are equal: the same was asked for"] + (
        found or ["either is taken as it is; it was built again for --force, another --out, or damage that it mended"]
    )


def _differences(one: Any, other: Any, name: str = "") -> list[Record]:
    """{"field", "engine", "other"} of every field that differs; nested fields are named with dots."""
    one, other = _by_check(one), _by_check(other)
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [{"field": name, "engine": one, "other": other}]
    keys = dict.fromkeys([*one, *other])
    return [row for k in keys for row in _differences(one.get(k), other.get(k), f"{name}.{k}" if name else k)]


def _by_check(values: Any) -> Any:
    """The checks of the gate are a list: by what they check."""
    if isinstance(values, list) and values and all(isinstance(value, dict) and "what" in value for value in values):
        return {value["what"]: {k: v for k, v in value.items() if k != "what"} for value in values}
    return values


# --------------------------------------------------------------------------------------------------------- screen


def show(screen: cli.Screen, record: Record) -> None:
    """A record of `describe` for people."""
    manifest = record["manifest"]
    screen.line(f"engine: {record['folder']}\n")
    screen.table(("what it is", ""), list(_about(manifest)))
    screen.line()
    shapes = [(t["name"], t["direction"], t["dtype"], " x ".join(map(str, t["shape"]))) for t in record["tensors"]]
    screen.table(("tensor", "", "dtype", "shape"), shapes)
    stages, tokens, whole_frame, full = (manifest[name] for name in _COUNTS)
    most = ""
    if kept := manifest.get("frames_kept"):
        stages, most = [f"{usual} ({low} to {high})" for low, usual, high in kept], "at most "
    screen.line(
        f"\nframes: {' -> '.join(map(str, stages))}; tokens: {most}{tokens} of {full} ({tokens / full:.1%}), "
        f"{whole_frame} a whole frame\n"
    )
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


def _about(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a manifest that nothing else shows, those of its parts by their path."""
    for name, value in values.items():
        if not prefix and name in _APART:
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
    shares = ", ".join(f"{share:.1%} {dtype}" for dtype, share in layers["weight_shares"].items())
    screen.line(
        f"layers ({layers['source']}): {layers['count']}; matrix products: {layers['matrix_flops'] / 1e9:.2f} GFLOP, "
        f"{layers['half_share']:.2%} in half precision\nfused attention: {fused} of {fused + len(unfused)} that can be"
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
        (c["step"], c["what"], f"{c['value']:.8g}", f"{c['limit']:.6g}", "ok" if c["passed"] else "FAILED")
        for c in gate["checks"]
    ]
    screen.table(("step", "what", "value", "limit", ""), rows)
    for note in gate["notes"]:
        screen.line(f"  {note}")
    screen.line()


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
