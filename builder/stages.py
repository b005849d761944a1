"""The stages of a build: export to ONNX, compile, check the graph against the PyTorch reference, describe it all.

Compiling comes before checking: it is quick and the more likely to fail. What fails the gate has no manifest, and so is
no engine.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.clips import FramesKept, calibration_clips, frames_kept, gate_clips, scale_clips
from builder.compile.engine import CompileReport, compile_engine
from builder.export.chain import export_chain
from builder.export.chunks import export_chunks
from builder.export.shared_weights import SharedWeights
from builder.export.vision import ExportedGraph, export_onnx, vision_graph
from builder.gate import accuracy
from builder.gate.kept_reference import polygraphy_command
from builder.gate.limits import GATES
from builder.gate.stage import check_each
from builder.precision import int8_table, islands, products
from builder.precision.calibration import MOST_ROWS, Calibration, Int8Plan
from builder.settings.config import BuildConfig, project_version
from builder.settings.options import AUTO
from builder.show import progress_line, show_kept
from runtime.checkpoint import MICRO
from runtime.engine import layout
from runtime.engine.dtypes import DTYPES
from runtime.engine.manifest import AND, Manifest, ModelRecord, describe_files
from runtime.engine.records import PreprocessingRecord
from runtime.trace import Trace


class Stages:
    """Progress for who watches and seconds for the manifest: one line when a stage starts, one when it is done."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.seconds: dict[str, float] = {}

    def run(self, name: str, what: str, work: Any) -> Any:
        """Run `work()` as the stage `name`; returns its result."""
        self.trace.line(f"{name}: {what}")
        started = time.monotonic()
        with self.trace.working(f"{name}: {what}"):
            result = work()
        self.seconds[name] = time.monotonic() - started
        self.trace.line(f"{name}: done in {self.seconds[name]:.1f} s")
        return result

    def note(self, text: str) -> None:
        """A line inside the stage that runs."""
        self.trace.line(f"  {text}")


def build(
    config: BuildConfig,
    key: str,
    name: str,
    place: Path,
    trace: Trace,
    *,
    verify: bool = True,
    verify_text: bool | None = None,
    kept: FramesKept | None = None,
) -> Manifest:
    """Fill the staging folder `place`; returns the manifest, already written there.

    Args:
        verify: run the gate.
        verify_text: run its last step, which loads the decoder; by default where that is small.
        kept: what the frame budget was taken from, if it was measured.
    """
    stages, key_parts = Stages(trace), config.key_parts()
    # First, so that a clip that cannot be read costs nothing.
    clips = {
        one.frames: calibration_clips(one, place)
        for one in config.each
        if verify or config.adaptive or config.int8 is not None
    }
    checked = {one.frames: gate_clips(one, clips[one.frames], place) for one in config.each if verify}
    if config.adaptive:
        what = "how many frames each merge keeps"
        kept = stages.run("calibrate", what, lambda: calibrate(config, clips[config.frames]))
        show_kept(trace, config, kept)
    int8: Int8Plan | None = None
    if config.int8 is not None:
        if not config.calibration and config.checkpoint.source != MICRO:
            trace.line("note: int8 has its scales from one drawn clip: name clips like yours with --calibration")
        seen = scale_clips(config, clips[config.frames])
        int8 = stages.run("quantise", "scales of the products in int8", lambda: plan_int8(config, seen))
        int8_table.note(trace, config, int8)
    graphs: tuple[ExportedGraph, ...] = stages.run(
        "export",
        f"{config.checkpoint.name} to ONNX in {config.dtype}{'' if int8 is None else ' and int8'}",
        lambda: export_graphs(config, place, int8),
    )
    compiled: tuple[CompileReport, ...] = ()
    if config.backend != "onnx":
        target = ".".join(map(str, config.target))
        compiled = stages.run(
            "compile",
            f"{config.backend} {config.backend_version} for compute capability {target}",
            lambda: compile_graphs(config, graphs, place, kept, trace, int8),
        )
    peak = peak_bytes(compiled)  # now: the gate loads more than a build needs
    reports: dict[int, accuracy.Report] = {}
    if verify:
        paths = [graph.path for graph in graphs]
        reports = stages.run(
            "verify",
            "against the PyTorch reference",
            lambda: check_each(
                config, vision_graph(config, torch.float32), paths, checked, trace, with_text=verify_text
            ),
        )
        for report in reports.values():
            report.require()
    figures = {f"{stage}_seconds": seconds for stage, seconds in stages.seconds.items()} | {"build_peak_bytes": peak}
    counts = config.flops
    if config.adaptive and kept is not None:  # of the median clip
        usual = tuple(median for _, median, _ in kept.ranges)
        counts = config.flops_of(usual, config.tokens_of(usual[-1]))
    figures |= {f"flops_{what}": float(count) for what, count in counts.items()}
    verified = accuracy.joined(reports) if config.frame_counts else reports.get(config.frames)
    write_report(place / layout.REPORT_FILE, config, verified, compiled, figures, key_parts, kept, int8)
    manifest = describe(config, key, name, place, reports, compiled, figures, kept, int8)
    manifest.write(place)
    return manifest


def export_graphs(config: BuildConfig, place: Path, int8: Int8Plan | None = None) -> tuple[ExportedGraph, ...]:
    """The export stage: one graph, that of every frame count, or that of every stage."""
    if config.in_stages:
        return export_stages(config, place, int8)
    return (export(config, place, int8),) if config.frame_counts is None else export_counts(config, place, int8)


def export(config: BuildConfig, place: Path, int8: Int8Plan | None = None) -> ExportedGraph:
    """`vision.onnx` in `place`. The weights are freed before anything else starts."""
    graph, size = vision_graph(config, DTYPES[config.dtype], int8), config.checkpoint.preprocessing.size
    return export_onnx(graph, config.frames, size, place / layout.ONNX_FILE, batch=config.batch)


def export_counts(config: BuildConfig, place: Path, int8: Int8Plan | None = None) -> tuple[ExportedGraph, ...]:
    """`vision.f8.onnx`, `vision.f16.onnx`, ... in `place`, and their weights in one file."""
    graph, size = vision_graph(config, DTYPES[config.dtype], int8), config.checkpoint.preprocessing.size
    shared = SharedWeights(place / layout.DATA_FILE)
    return tuple(
        export_onnx(graph, one.frames, size, place / one.file(layout.ONNX_FILE), batch=one.batch, shared=shared)
        for one in config.each
    )


def export_stages(config: BuildConfig, place: Path, int8: Int8Plan | None = None) -> tuple[ExportedGraph, ...]:
    """`vision.0.onnx`, `vision.1.onnx`, ... in `place`: the adaptive schedule's chain, or what chunks run through."""
    graph, size = vision_graph(config, DTYPES[config.dtype], int8), config.checkpoint.preprocessing.size
    if config.chunk is not None:
        return export_chunks(graph, config.frames, config.chunk, size, place)
    return export_chain(graph, config.frames, size, place)


def calibrate(config: BuildConfig, clips: dict[str, Tensor]) -> FramesKept:
    """Frames that the adaptive schedule keeps of each clip, with the settings of `config`."""
    return frames_kept(vision_graph(config, torch.float32), clips)


def plan_int8(config: BuildConfig, clips: dict[str, Tensor]) -> Int8Plan:
    """How int8 is done: scales from the clips, and which products stay wider (as asked for, or as the clips say)."""
    found = calibration(config, clips)
    auto = config.int8 == (products.AUTO,)
    plan = found.search() if auto else found.plan(set(config.may_be_int8) - set(config.narrow()))
    return dataclasses.replace(plan, clips=tuple(clips))


def measure_int8(config: BuildConfig) -> Int8Plan:
    """`plan_int8` on the build's clips, without a build."""
    with tempfile.TemporaryDirectory() as folder:
        clips = calibration_clips(config.each[-1], Path(folder))
    return plan_int8(config, scale_clips(config, clips))


def calibration(config: BuildConfig, clips: dict[str, Tensor]) -> Calibration:
    """The products that int8 may have, measured on the clips, evenly of all their frames."""
    graph = vision_graph(config, torch.float32)
    frames = torch.cat(list(clips.values()))
    most = max(1, MOST_ROWS // config.geometry.patches)
    pixels = graph.pixels(frames[:: -(-len(frames) // most)])
    return Calibration(graph.vision, graph.projector, pixels, config.depth, config.may_be_int8)


def auto_budget(config: BuildConfig, trace: Trace) -> tuple[BuildConfig, FramesKept]:
    """`config` with the frame budget that the calibration clips suggest, and what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        clips = calibration_clips(config, Path(folder))
    kept = calibrate(config, clips)
    show_kept(trace, config, kept)
    if not config.calibration:
        trace.line(f"note: --frame-budget {AUTO} goes by clips like yours: name some with --calibration")
    budget = kept.budget()
    trace.line(f"frame budget: {' -> '.join(map(str, (config.frames, *budget)))} (--frame-budget {AUTO})")
    return dataclasses.replace(config, earlytom=config.earlytom.replace(frame_budget=budget)), kept


def compile_graphs(
    config: BuildConfig,
    graphs: Sequence[ExportedGraph],
    place: Path,
    kept: FramesKept | None,
    trace: Trace,
    int8: Int8Plan | None = None,
) -> tuple[CompileReport, ...]:
    """The compile stage: an engine and a layer list for each graph."""
    usual = None if kept is None else [median for _, median, _ in kept.ranges]
    shares = config.stage_half_shares if config.in_stages else tuple(one.half_share for one in config.each)
    narrow, folded = [0.0] * len(shares), (1, 1)
    if int8 is not None:
        folded = config.geometry.patches, config.model.vision_config.num_attention_heads
        every = (one.int8_share(int8.kept) for one in config.each)
        narrow = list(config.stage_int8_shares(int8.kept) if config.in_stages else every)
    reports = []
    for stage, (graph, part) in enumerate(zip(graphs, config.layout.files, strict=True)):
        engine, layers = map(part.file, (layout.ENGINE_FILE, layout.LAYERS_FILE))
        reports.append(
            compile_engine(
                graph.path,
                place / engine,
                flavour=config.backend,
                dtype=config.dtype,
                target=config.target,
                hardware_compatible=config.hardware_compatible,
                workspace_gib=config.workspace_gib,
                compression=config.compression,
                expected_share=(shares[stage] if config.dtype != "fp32" else 1.0) - narrow[stage],
                int8_share=narrow[stage],
                folded=folded,
                profile=(1, usual[stage], config.frames) if config.adaptive and usual else None,
                layers_path=place / layers,
                progress=progress_line(trace),
            )
        )
    return tuple(reports)


def describe(
    config: BuildConfig,
    key: str,
    name: str,
    place: Path,
    reports: dict[int, accuracy.Report],
    compiled: Sequence[CompileReport],
    figures: dict[str, float],
    kept: FramesKept | None = None,
    int8: Int8Plan | None = None,
) -> Manifest:
    """The manifest of what `place` holds. `reports`: of the gate for every frame count, none where it did not run."""
    checkpoint, frame = config.checkpoint, config.geometry
    height, width = frame.size
    preprocessing = checkpoint.preprocessing
    report = accuracy.joined(reports) if config.frame_counts else reports.get(config.frames)
    # ONNX Runtime cannot run bf16 graphs on a CPU, so there is no line that would work everywhere; nor does Polygraphy
    # run a chain.
    comparable = bool(reports) and config.dtype != "bf16" and not config.in_stages
    return Manifest(
        name=name,
        key=key,
        project_version=project_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=ModelRecord(
            source=checkpoint.source,
            family=checkpoint.family.name,
            digest=checkpoint.digest(),
            answers=checkpoint.answers_digest(),
            commit=checkpoint.commit,
            trained=checkpoint.trained,
            image_size=height if height == width else frame.size,
            patch_size=frame.patch,
            preprocessing=PreprocessingRecord(**dataclasses.asdict(preprocessing)),
        ),
        method=config.earlytom.method,
        earlytom=config.earlytom.to_dict(),
        frames=config.frames,
        frames_per_stage=config.stages,
        tokens=config.tokens,
        tokens_per_frame=config.tokens_per_frame,
        tokens_full=config.layout.tokens_full,
        dim=config.geometry.token_width,
        dtype=config.dtype,
        target=".".join(map(str, config.target)),
        backend=config.backend,
        backend_version=config.backend_version,
        compression=config.compression,
        plugins=tuple(record for one in compiled for record in one.plugins),
        files=describe_files(place),
        figures=figures,
        verification=None if report is None else report.to_dict(),
        islands=None if config.islands == islands.DEFAULT else config.islands.words,
        int8=None if int8 is None else products.words(int8.chosen),
        polygraphy=AND.join(
            polygraphy_command(reports[one.frames].tolerance, GATES[config.precision].bias, one.file)
            for one in config.each
        )
        if comparable
        else "",
        frames_kept=kept.ranges if kept is not None and config.adaptive else None,
        batch=config.batch,
        frame_counts=config.frame_counts,
        chunk=config.chunk,
    )


def write_report(
    path: Path,
    config: BuildConfig,
    report: accuracy.Report | None,
    compiled: Sequence[CompileReport],
    figures: dict[str, float],
    key_parts: dict[str, Any],
    kept: FramesKept | None = None,
    int8: Int8Plan | None = None,
) -> None:
    """report.json: the gate's checks, the compiler's report (of a chain or of several frame counts a list of them), the
    figures of the build, what its key is made of and, where that was measured, how many frames the adaptive schedule
    keeps and what int8 costs."""
    reports = [one.to_dict() for one in compiled]
    if config.frame_counts:
        reports = [{"frames": frames, **one} for frames, one in zip(config.counts, reports, strict=bool(compiled))]
    record = {
        "verification": None if report is None else report.to_dict(),
        "compile": reports if len(reports) > 1 else next(iter(reports), None),
        "figures": figures,
        "key_parts": key_parts,
    }
    if kept is not None:
        record["frames_kept"] = kept.to_dict()
    if int8 is not None:
        record["int8"] = int8.to_dict()
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def peak_bytes(compiled: Sequence[CompileReport]) -> float:
    """Peak resident memory so far, of this process or of the one that compiled, whichever is larger."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return float(max([own, *(one.peak_rss_bytes for one in compiled)]))
