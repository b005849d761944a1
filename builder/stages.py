"""The stages of a build: calibrate, export to ONNX, compile, verify against the PyTorch reference, write the manifest.

Compilation precedes verification: it is quicker and more likely to fail. A folder that fails the gate gets no manifest,
and so is no engine.
"""

from __future__ import annotations

import dataclasses
import resource
import tempfile
import time
from collections.abc import Sequence
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
from builder.gate.report import Report
from builder.gate.stage import check_each
from builder.precision import int8_table, products
from builder.precision.calibration import MOST_ROWS, Calibration, Int8Plan
from builder.record import StagesDone, describe, write_report
from builder.settings.config import BuildConfig
from builder.settings.options import AUTO
from builder.show import progress_line, show_kept
from runtime.checkpoint import MICRO
from runtime.engine import layout
from runtime.engine.dtypes import DTYPES
from runtime.engine.manifest import Manifest
from runtime.trace import Trace


class Stages:
    """Runs the stages: a progress line when one starts and ends, and its seconds for the manifest."""

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
        """A progress line inside the current stage."""
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
        verify, verify_text: as in `builder.build.build_engine`.
        kept: the measurement behind an automatic frame budget.
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
    what = f"{config.checkpoint.name} to ONNX in {config.dtype}{'' if int8 is None else ' and int8'}"
    graphs: tuple[ExportedGraph, ...] = stages.run("export", what, lambda: export_graphs(config, place, int8))
    compiled: tuple[CompileReport, ...] = ()
    if config.backend != "onnx":
        what = f"{config.backend} {config.backend_version} for compute capability {'.'.join(map(str, config.target))}"
        compiled = stages.run("compile", what, lambda: compile_graphs(config, graphs, place, kept, trace, int8))
    peak = peak_bytes(compiled)  # before the gate, which needs more memory than the build itself
    reports: dict[int, Report] = {}
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
    figures |= {f"flops_{what}": float(count) for what, count in flops(config, kept).items()}
    made = StagesDone(config, compiled, reports, figures, kept, int8)
    write_report(place / layout.REPORT_FILE, made, key_parts)
    manifest = describe(made, key, name, place)
    manifest.write(place)
    return manifest


def flops(config: BuildConfig, kept: FramesKept | None) -> dict[str, int]:
    """Flops of one clip by part; in the adaptive schedule those of the median frame counts."""
    if not config.adaptive or kept is None:
        return config.flops
    usual = tuple(median for _, median, _ in kept.ranges)
    return config.flops_of(usual, config.tokens_of(usual[-1]))


def export_graphs(config: BuildConfig, place: Path, int8: Int8Plan | None = None) -> tuple[ExportedGraph, ...]:
    """The export stage: a single graph, one for each frame count, or one for each stage."""
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
    """`vision.0.onnx`, `vision.1.onnx`, ... in `place`: the adaptive chain, or the two graphs of a chunked engine."""
    graph, size = vision_graph(config, DTYPES[config.dtype], int8), config.checkpoint.preprocessing.size
    if config.chunk is not None:
        return export_chunks(graph, config.frames, config.chunk, size, place)
    return export_chain(graph, config.frames, size, place)


def calibrate(config: BuildConfig, clips: dict[str, Tensor]) -> FramesKept:
    """How many frames the adaptive schedule keeps of each clip, with the settings of `config`."""
    return frames_kept(vision_graph(config, torch.float32), clips)


def plan_int8(config: BuildConfig, clips: dict[str, Tensor]) -> Int8Plan:
    """Quantisation scales from the clips, and the products kept wider (as asked for, or found on the clips)."""
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
    """Measure the products that may be int8 on frames taken evenly from all clips."""
    graph = vision_graph(config, torch.float32)
    frames = torch.cat(list(clips.values()))
    most = max(1, MOST_ROWS // config.geometry.patches)
    pixels = graph.pixels(frames[:: -(-len(frames) // most)])
    return Calibration(graph.vision, graph.projector, pixels, config.depth, config.may_be_int8)


def auto_budget(config: BuildConfig, trace: Trace) -> tuple[BuildConfig, FramesKept]:
    """`config` with a frame budget from the calibration clips, and the measurement behind it."""
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


def peak_bytes(compiled: Sequence[CompileReport]) -> float:
    """Peak resident memory so far in bytes: the larger of this process's and the compile processes'."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return float(max([own, *(one.peak_rss_bytes for one in compiled)]))
