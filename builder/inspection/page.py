"""An engine's record as a self-contained HTML page: `report.html`, which a build writes into the engine's folder.

`leave` writes it there, `write` to any file. Its content comes from the folder's files and is escaped; it loads no
resources. It is not part of the engine: neither manifest nor key depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from builder.inspection import Record
from builder.inspection.clip import SavedClip, saved_clip
from builder.inspection.record import describe
from runtime.engine.layout import DTYPE_NAMES
from runtime.engine.manifest import Manifest
from runtime.files.partial import partial
from runtime.show import charts, colours, html
from runtime.show.frames import kept_frame
from runtime.show.html import Html, element
from runtime.show.png import data_url, thumbnail

REPORT_PAGE = "report.html"
_SIDE = 144  # largest side of a frame, pixels
_BYTES = dict(zip(DTYPE_NAMES, (2, 2, 4), strict=True))
_AT_LEAST = ("cosine", "overlap", "share")  # in names of checks whose limit is a minimum
_KINDS = 14  # rows of layers


def leave(folder: Path) -> Path:
    """Write the page of an engine's folder into it; returns the file."""
    return write(folder, folder / REPORT_PAGE)


def write(folder: Path, path: Path, frames: int | None = None) -> Path:
    """Write the page of an engine's folder to a file."""
    record = describe(folder, frames)
    clip = saved_clip(Path(record["folder"]), Manifest.read(Path(record["folder"]), verify_files=False))
    with partial(path) as unfinished:
        unfinished.write_text(page_of(record, clip), encoding="utf-8")
    return path


def page_of(record: Record, clip: SavedClip | None) -> str:
    """The page of a record of `describe`."""
    name = str(record["manifest"]["name"])
    sections = [_head(record), _costs(record), _pictures(clip, record), _gate(record), _layers(record), _rest(record)]
    css = colours.css() + files("builder.inspection").joinpath("report.css").read_text("utf-8")
    return html.page(f"Engine {name}", css, element("main", sections))


def _head(record: Record) -> Html:
    manifest, gate = record["manifest"], record["verification"]
    verdict, kind = (
        ("not verified", "soft") if gate is None else ("verified", "ok") if gate["passed"] else ("failed", "bad")
    )
    counts, figures = record["counts"][-1], manifest["figures"]
    size = sum(file["bytes"] for file in manifest["files"].values())
    seconds = sum(value for name, value in figures.items() if name.endswith("_seconds"))
    stages, kept = " \u2192 ".join(map(str, counts["frames_per_stage"])), manifest.get("frames_kept")
    if kept:
        stages = " \u2192 ".join(str(usual) for _, usual, _ in kept)
    most = "at most " if kept else ""
    tiles = [
        (f"{most}{counts['tokens']:,}", f"of {counts['tokens_full']:,} visual tokens"),
        (stages, "frames of a usual clip; the video decides" if kept else "frames"),
        (_precision(manifest), f"{manifest['backend']}, for {manifest['target']}"),
        (_bytes(size), f"in {len(manifest['files'])} files"),
        (f"{seconds:.0f} s", "to build"),
    ]
    return element(
        "header",
        element("h1", manifest["name"]),
        element(
            "p",
            f"{manifest['model']['source']}, method {manifest.get('method', 'earlytom')}{_mode(record)}",
            class_="soft",
        ),
        element("p", f"Built {manifest['created']} by version {manifest['project_version']}", class_="soft"),
        element("span", verdict, class_=f"verdict {kind}"),
        element("div", [element("div", element("b", a), element("span", b)) for a, b in tiles], class_="tiles"),
    )


def _precision(manifest: Record) -> str:
    return f"int8, {manifest['dtype']}" if manifest.get("int8") is not None else str(manifest["dtype"])


def _mode(record: Record) -> str:
    """Its frame counts, batch and chunk, as far as it has several."""
    manifest, counts = record["manifest"], [counts["frames"] for counts in record["counts"]]
    modes = [f"{' or '.join(map(str, counts))} frames"] if len(counts) > 1 else []
    if manifest.get("batch", 1) > 1:
        modes.append(f"{manifest['batch']} videos at once")
    if manifest.get("chunk"):
        modes.append(f"frames as they come, {manifest['chunk']} at a time")
    return "".join(f", {mode}" for mode in modes)


def _costs(record: Record) -> Html:
    """Flops and memory, full and compressed."""
    manifest, counts = record["manifest"], record["counts"][-1]
    figures = manifest["figures"]
    pairs = [
        charts.pair(title, full, kept, (_flops(full), _flops(kept, full)))
        for title, name in (("Vision encoder", "vision"), ("Prefill of the visual tokens", "prefill"))
        if (full := figures.get(f"flops_{name}_full")) and (kept := figures.get(f"flops_{name}"))
    ]
    each = manifest["dim"] * _BYTES[manifest["dtype"]]
    full, kept = (counts[name] for name in ("tokens_full", "tokens"))
    pairs.append(charts.pair("Visual tokens", full, kept, (f"{full:,}", f"{kept:,}")))
    pairs.append(charts.pair("Their memory", full, kept, (_bytes(full * each), _bytes(kept * each, full * each))))
    note = "Counted from shapes; the decoder's cache shrinks as the tokens do."
    if len(record["counts"]) > 1:
        note += f" At {counts['frames']} frames, the most that this engine takes."
    if manifest.get("frames_kept"):
        note += " With as many frames left as usual, and the most tokens."
    return _section("What a clip costs", element("div", pairs, class_="pairs"), element("p", note, class_="note"))


def _pictures(clip: SavedClip | None, record: Record) -> list[Html]:
    if clip is None:
        note = "The folder holds no clip: it was built with --no-verify, or by another version."
        return [_section("What was kept", element("p", note, class_="note"))]
    kept, frames = clip.kept, clip.frames
    figures = [
        kept_frame(data_url(thumbnail(frame, _SIDE)), kept, number, _caption(clip, number))
        for number, frame in enumerate(frames)
    ]
    clips = record["verification"]["clips"] if record["verification"] else []
    total = len(frames) * kept.grid[0] * kept.grid[1]
    note = (
        f"{kept.tokens} of {total} cells of {clips[0] if clips else 'the clip'} were kept; the others are dimmed. A "
        "token is shown where most of it comes from: frames that are alike were merged before tokens were chosen."
    )
    graph = charts.frames_graph(kept)
    about = "Above the frames of the clip, below those that were left; a line is as strong as its share."
    return [
        _section("What was kept", element("div", figures, class_="frames"), element("p", note, class_="note")),
        _section("Which frames became which", graph, element("p", about, class_="note")),
    ]


def _caption(clip: SavedClip, number: int) -> str:
    slots = clip.kept.became(number)
    into = f" \u2192 {', '.join(str(slot + 1) for slot in slots)}" if slots else ""
    return f"{number + 1}{into} \u00b7 {clip.kept.fate(number)}"


def _gate(record: Record) -> list[Html]:
    gate = record["verification"]
    if gate is None:
        note = "It was built with --no-verify: nothing says that it is the model it came from."
        return [_section("Accuracy gate", element("p", note, class_="note"))]
    several = any("frames" in check for check in gate["checks"])
    rows = []
    for check in gate["checks"]:
        used = _used(check)
        state = element("span", "ok" if check["passed"] else "failed", class_="ok" if check["passed"] else "bad")
        words = [*([check.get("frames", "")] if several else []), check["step"], check["what"]]
        figures = [f"{check['value']:.8g}", f"{check['limit']:.6g}"]
        rows.append([*words, *figures, charts.bar(used, "" if used <= 1 else "over"), state])
    columns = [*(["frames"] if several else []), "step", "what", "value", "limit", "of the limit", ""]
    notes = [element("p", note, class_="note") for note in (f"On {', '.join(gate['clips'])}.", *gate["notes"])]
    sections = [_section("Accuracy gate", _table(columns, rows, bars=("of the limit",)), notes)]
    drift = list(_drift(gate["checks"]))
    if drift:
        limit = next(1 - c["limit"] for c in gate["checks"] if c["what"].endswith(": cosine"))
        chart = charts.curve(drift, limit, "1 - cosine with the reference, by layer")
        about = (
            "1 - cosine of the hidden states with those of the fp32 reference, before each merge and at the tokens. "
            "After every layer: "
        )
        command = element("code", "python -m builder.verify ENGINE --layers")
        sections.append(_section("Drift by layer", chart, element("p", about, command, class_="note")))
    return sections


def _drift(checks: Sequence[Record]) -> Iterator[tuple[str, float]]:
    """Name and 1 - cosine of each compared tensor, the worst over frame counts; tokens last."""
    worst: dict[str, float] = {}
    for check in checks:
        name, _, what = check["what"].partition(": ")
        if what == "cosine":
            name = name.replace("hidden_", "layer ")
            worst[name] = max(worst.get(name, 0.0), 1 - check["value"])
    tokens = worst.pop("tokens", None)
    yield from worst.items()
    if tokens is not None:
        yield "tokens", tokens


def _used(check: Record) -> float:
    """The share of its limit that a check uses; above 1 it has failed."""
    value, limit = check["value"], check["limit"]
    if any(word in check["what"] for word in _AT_LEAST):
        value, limit = 1 - value, 1 - limit
    if limit == 0:
        return 0.0 if value <= 0 else 2.0
    return max(float(value / limit), 0.0)


def _layers(record: Record) -> Html:
    layers = record["layers"]
    if layers is None:
        return _section("Layers", element("p", "The build left no list of them.", class_="note"))
    most = max((row["flops"] for row in layers["kinds"]), default=0) or 1
    rows = [
        [
            row["kind"],
            row["work"],
            row["precision"],
            row["layers"],
            f"{row['flops'] / 1e9:.3f}",
            charts.bar(row["flops"] / most),
            f"{row['weight_bytes'] / 1e6:.2f}",
        ]
        for row in layers["kinds"][:_KINDS]
    ]
    left = len(layers["kinds"]) - len(rows)
    fused, unfused = layers["attention_fused"], len(layers["attention_unfused"])
    narrow = f", {layers['int8_share']:.2%} in int8" if layers["int8_share"] else ""
    note = (
        f"{layers['source']}: {layers['count']} layers, {_flops(layers['matrix_flops'])} of matrix products, "
        f"{layers['half_share']:.2%} of it in half precision{narrow}; attention: {fused} of {fused + unfused} fused."
        + (f" {left} more kinds multiply less." if left > 0 else "")
    )
    columns = ["kind", "work", "precision", "layers", "GFLOP", "", "weights, MB"]
    return _section("Layers by kind", _table(columns, rows, bars=("",)), element("p", note, class_="note"))


def _rest(record: Record) -> Html:
    manifest = record["manifest"]
    skipped = ("files", "figures", "verification", "plugins", "programs")
    settings = list(_flat({name: value for name, value in manifest.items() if name not in skipped}))
    tables: list[tuple[str, list[str], Iterable[Sequence[object]]]] = [
        ("Settings", ["field", "value"], settings),
        ("Figures of the build", ["figure", "value"], [(k, _quantity(k, v)) for k, v in manifest["figures"].items()]),
        ("Files", ["file", "size"], [(name, _bytes(file["bytes"])) for name, file in manifest["files"].items()]),
        (
            "Tensors",
            ["tensor", "", "dtype", "shape"],
            [(t["name"], t["direction"], t["dtype"], " \u00d7 ".join(map(str, t["shape"]))) for t in record["tensors"]],
        ),
    ]
    if manifest["plugins"]:
        names = ("name", "kernel", "tensors", "registers", "shared_bytes", "ptx_sha256")
        kernels = [[_text(kernel[name]) for name in names] for kernel in manifest["plugins"]]
        tables.append(("Plugins", [name.replace("_", " ") for name in names], kernels))
    folded = [
        element("details", element("summary", title), _table(columns, list(rows), bars=()))
        for title, columns, rows in tables
    ]
    return _section("Everything else", folded)


def _section(title: str, *children: object) -> Html:
    return element("section", element("h2", title), *children)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, bars: Sequence[str]) -> Html:
    """A table with columns of numbers right-aligned; columns named in `bars` have bars."""
    kinds = ["b" if name in bars else _kind([row[n] for row in rows]) for n, name in enumerate(columns)]
    head = [element("th", name, class_=kind or None) for name, kind in zip(columns, kinds, strict=True)]
    body = [
        element("tr", [element("td", cell, class_=kind or None) for cell, kind in zip(row, kinds, strict=True)])
        for row in rows
    ]
    wide = "columns" if len(columns) > 2 else None
    table = element("table", element("thead", element("tr", head)), element("tbody", body), class_=wide)
    return element("div", table, class_="scroll")


def _kind(cells: Sequence[object]) -> str:
    def figure(cell: object) -> bool:
        return isinstance(cell, int) or (isinstance(cell, str) and cell[:1].isdigit() and " " not in cell)

    return "n" if cells and all(map(figure, cells)) else "v"


def _flat(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "-" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)


def _quantity(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return _bytes(value)
    if name.startswith("flops_"):
        return _flops(value)
    return f"{value:.2f} s" if name.endswith("_seconds") else f"{value:.6g}"


def _flops(number: float, of: float | None = None) -> str:
    """`of`: a number in whose unit it is told."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if (of or number) >= size:
            return f"{number / size:.2f} {unit}FLOP"
    return f"{number:.0f} FLOP"


def _bytes(number: float, of: float | None = None) -> str:
    """`of`: a number in whose unit it is told."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if (of or number) >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} bytes"
