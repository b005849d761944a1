"""The verify stage of a build: the gate (`builder.gate.accuracy`) for every frame count, on real frames.

It leaves the reference of each frame count in the folder, in Polygraphy's format. It only measures; the caller decides
whether the build goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from builder.export.vision import VisionGraph
from builder.gate import accuracy
from builder.gate.batches import fill
from builder.gate.kept_reference import save_reference
from builder.gate.next_tokens import SMALL_DECODER, NextTokens, decoder_parameters
from builder.gate.report import Report
from builder.settings.config import BuildConfig
from runtime.engine import layout
from runtime.trace import Trace


def check_each(
    config: BuildConfig,
    reference: VisionGraph,
    paths: Sequence[Path],
    clips: Mapping[int, dict[str, Tensor]],
    trace: Trace,
    *,
    with_text: bool | None = None,
) -> dict[int, Report]:
    """Run the gate for every frame count; returns a report of each.

    Args:
        reference: the vision part in fp32.
        paths: the graph of each frame count, or those of the chain.
        clips: of each frame count, by name.
        with_text: whether to run the last step, which loads the decoder; default: if the decoder is small.
    """
    if with_text is None:
        with_text = decoder_parameters(config.model.text_config) <= SMALL_DECODER
    text = NextTokens(config.checkpoint) if with_text else None
    graphs: Sequence[Path | Sequence[Path]] = [paths] if config.in_stages else paths
    reports = {}
    for one, graph in zip(config.each, graphs, strict=True):
        if config.frame_counts is not None:
            trace.line(f"  {one.frames} frames:")
        reports[one.frames] = check(one, reference, graph, clips[one.frames], text, trace)
    return reports


def check(
    config: BuildConfig,
    reference: VisionGraph,
    graph: Path | Sequence[Path],
    clips: Mapping[str, Tensor],
    text: NextTokens | None,
    trace: Trace,
) -> Report:
    """Run the gate for one frame count, show its measurements and save the reference beside the graph (or graphs)."""
    clips = fill(clips, config.batch)
    report, wanted = accuracy.verify(
        graph,
        reference,
        clips,
        config.dtype,
        precision=config.precision,
        batch=config.batch,
        text=text,
        text_with_equal_decisions=not config.checkpoint.trained,
        say=lambda note: trace.line(f"  {note}"),
    )
    place = (graph if isinstance(graph, Path) else graph[0]).parent
    inputs, outputs = (
        place / config.file(name) for name in (layout.REFERENCE_INPUTS_FILE, layout.REFERENCE_OUTPUTS_FILE)
    )
    save_reference(inputs, outputs, list(clips.values()), wanted, config.batch)
    trace.table(
        ("step", "what", "value", "limit", ""),
        [
            (line.step, line.what, f"{line.value:.8g}", f"{line.limit:.6g}", "ok" if line.passed else "FAILED")
            for line in report.checks
        ],
    )
    for note in report.notes:
        trace.line(f"  {note}")
    return report
