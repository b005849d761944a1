"""A build's records: the engine's manifest, and report.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder.clips import FramesKept
from builder.compile.engine import CompileReport
from builder.gate.kept_reference import polygraphy_command
from builder.gate.limits import GATES
from builder.gate.report import Report, joined
from builder.precision import islands, products
from builder.precision.calibration import Int8Plan
from builder.settings.config import BuildConfig, project_version
from runtime.engine.manifest import AND, Manifest, ModelRecord, describe_files
from runtime.engine.records import PreprocessingRecord


@dataclass(frozen=True)
class StagesDone:
    """Results of a build's stages.

    Attributes:
        compiled: compile report of each graph; empty for backend "onnx".
        reports: the gate's report for each frame count; empty where it did not run.
        figures: seconds, bytes and flops by name.
        kept: frames that the adaptive schedule keeps of the calibration clips, measured for that schedule or for an
            automatic frame budget.
    """

    config: BuildConfig
    compiled: Sequence[CompileReport]
    reports: dict[int, Report]
    figures: dict[str, float]
    kept: FramesKept | None = None
    int8: Int8Plan | None = None

    @property
    def verified(self) -> Report | None:
        """The gate's reports joined into one; None where it did not run."""
        return joined(self.reports) if self.config.frame_counts else self.reports.get(self.config.frames)


def describe(done: StagesDone, key: str, name: str, place: Path) -> Manifest:
    """The manifest of the staging folder `place`."""
    config = done.config
    checkpoint, frame = config.checkpoint, config.geometry
    height, width = frame.size
    report = done.verified
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
            preprocessing=PreprocessingRecord(**dataclasses.asdict(checkpoint.preprocessing)),
        ),
        method=config.earlytom.method,
        earlytom=config.earlytom.to_dict(),
        frames=config.frames,
        frames_per_stage=config.stages,
        tokens=config.tokens,
        tokens_per_frame=config.tokens_per_frame,
        tokens_full=config.layout.tokens_full,
        dim=frame.token_width,
        dtype=config.dtype,
        target=".".join(map(str, config.target)),
        backend=config.backend,
        backend_version=config.backend_version,
        compression=config.compression,
        plugins=tuple(record for one in done.compiled for record in one.plugins),
        files=describe_files(place),
        figures=done.figures,
        verification=None if report is None else report.to_dict(),
        islands=None if config.islands == islands.DEFAULT else config.islands.words,
        int8=None if done.int8 is None else products.words(done.int8.chosen),
        polygraphy=_polygraphy(done),
        frames_kept=done.kept.ranges if done.kept is not None and config.adaptive else None,
        batch=config.batch,
        frame_counts=config.frame_counts,
        chunk=config.chunk,
    )


def _polygraphy(done: StagesDone) -> str:
    """The Polygraphy command that repeats the gate's comparison; "" without a gate, for bf16, which ONNX Runtime cannot
    run on a CPU, and for several stages, which Polygraphy cannot run."""
    config = done.config
    if not done.reports or config.dtype == "bf16" or config.in_stages:
        return ""
    bias = GATES[config.precision].bias
    return AND.join(polygraphy_command(done.reports[one.frames].tolerance, bias, one.file) for one in config.each)


def write_report(path: Path, done: StagesDone, key_parts: dict[str, Any]) -> None:
    """Write report.json: the gate's checks, the compile report (a list of them for several graphs), the build's
    figures, the parts of its cache key and, where measured, the frames that the adaptive schedule keeps and the cost of
    int8."""
    config, report = done.config, done.verified
    compiled = [one.to_dict() for one in done.compiled]
    if config.frame_counts:
        compiled = [{"frames": n, **one} for n, one in zip(config.counts, compiled, strict=bool(compiled))]
    record = {
        "verification": None if report is None else report.to_dict(),
        "compile": compiled if len(compiled) > 1 else next(iter(compiled), None),
        "figures": done.figures,
        "key_parts": key_parts,
    }
    if done.kept is not None:
        record["frames_kept"] = done.kept.to_dict()
    if done.int8 is not None:
        record["int8"] = done.int8.to_dict()
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
