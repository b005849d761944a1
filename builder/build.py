"""Build a vision engine from a checkpoint.

    python -m builder.build --ratio 0.3 --fp16

The stages, in the order in which `main` runs them: read the checkpoint's settings, decide what is built and its key;
return at once if that engine is there already; else export to ONNX, compile, check the graph against the PyTorch
reference (compiling first: it is quick and the more likely to fail), and publish the folder in one step. What is not
verified is not published, unless --no-verify says so.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor

from builder import cache, verify
from builder.arguments import parse
from builder.compile import CompileReport, Progress, check_target, compile_engine
from builder.config import BuildConfig, project_version
from builder.export import ExportedGraph, VisionGraph, export_onnx
from builder.next_tokens import SMALL_DECODER, NextTokens, decoder_parameters
from builder.precision import set_precision
from runtime import cli, contract
from runtime.checkpoint import load_vision
from runtime.clip import draw_clip
from runtime.manifest import Manifest, ModelRecord, PreprocessingRecord, describe_files
from runtime.video import load_clip


class Stages:
    """Progress on screen and seconds for the manifest: one line when a stage starts, one when it is done."""

    def __init__(self, screen: cli.Screen) -> None:
        self.screen = screen
        self.seconds: dict[str, float] = {}

    def run(self, name: str, what: str, work: Any) -> Any:
        """Run `work()` as the stage `name`; returns its result."""
        self.screen.line(f"{name}: {what}")
        started = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - started
        self.screen.line(f"{name}: done in {self.seconds[name]:.1f} s")
        return result

    def note(self, text: str) -> None:
        """A line inside the stage that runs."""
        self.screen.line(f"  {text}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options, config, choice = parse(argv)
    screen = cli.Screen(json_only=options.json)
    if config.checkpoint.source == "micro":
        screen.line("model: the bundled one (choose another with --model)")
    if not config.checkpoint.trained:
        screen.line("note: its weights are not trained, so answers will be nonsense; counts and speed are real")
    screen.line(f"backend: {config.backend} ({choice.reason})")
    key = config.key()
    folder = options.out / config.name(key)
    show_plan(screen, config)
    if options.dry_run:
        screen.line(f"key: {key}\nfolder: {folder}\nnothing was built (--dry-run)")
        screen.result(summary(config, key, folder, None, cached=False))
        return 0
    if config.backend != "onnx":
        check_target(config.backend, config.target, config.hardware_compatible)
    if not options.force and (found := cache.find(folder, key, verified=options.verify)):
        screen.line(f"unchanged: {folder} was built {found.created} and is used as it is (--force builds it again)")
        screen.result(summary(config, key, folder, found, cached=True))
        return 0
    if folder.is_dir() and not options.force:
        screen.line(f"{folder} is damaged or was not verified: it is built again")
    with cache.staging(folder, lambda: screen.line("another process is building this engine: waiting for it")) as place:
        if not options.force and (found := cache.find(folder, key, verified=options.verify)):
            screen.line(f"unchanged: {folder} was just built by another process")  # while this one waited
            screen.result(summary(config, key, folder, found, cached=True))
            return 0
        manifest = build(config, key, folder.name, place, options, screen)
        cache.publish(place, folder)
    show_result(screen, manifest, folder)
    screen.result(summary(config, key, folder, manifest, cached=False))
    return 0


def build(
    config: BuildConfig, key: str, name: str, place: Path, options: argparse.Namespace, screen: cli.Screen
) -> Manifest:
    """Fill the staging folder `place`; returns the manifest, already written there."""
    stages = Stages(screen)
    # First, so that a clip that cannot be read costs nothing.
    clips = calibration_clips(config, place) if options.verify else {}
    graph: ExportedGraph = stages.run(
        "export", f"{config.checkpoint.name} to ONNX in {config.dtype}", lambda: export(config, place)
    )
    compiled: CompileReport | None = None
    if config.backend != "onnx":
        target = ".".join(map(str, config.target))
        compiled = stages.run(
            "compile",
            f"{config.backend} {config.backend_version} for compute capability {target}",
            lambda: compile_engine(
                graph.path,
                place / contract.ENGINE_FILE,
                flavour=config.backend,
                dtype=config.dtype,
                target=config.target,
                hardware_compatible=config.hardware_compatible,
                workspace_gib=config.workspace_gib,
                layers_path=place / contract.LAYERS_FILE,
                progress=progress_line(screen),
            ),
        )
    peak = peak_bytes(compiled)  # now: the gate loads more than a build needs
    report: verify.Report | None = None
    if options.verify:
        report = stages.run(
            "verify", "against the PyTorch reference", lambda: check(config, graph.path, clips, options, stages)
        )
        report.require()
    figures = {f"{stage}_seconds": seconds for stage, seconds in stages.seconds.items()} | {"build_peak_bytes": peak}
    figures |= {f"flops_{what}": float(count) for what, count in config.flops.items()}
    write_report(place / contract.REPORT_FILE, report, compiled, figures)
    manifest = describe(config, key, name, place, report, figures)
    manifest.write(place)
    return manifest


def vision_graph(config: BuildConfig, dtype: torch.dtype) -> VisionGraph:
    """The vision part of the checkpoint with EarlyTom inside, in `dtype` (layer norms in fp32).

    Weights are read in fp32, so that layer norms keep theirs and one that `dtype` cannot hold is noticed.
    """
    part = load_vision(config.checkpoint, torch.float32)
    preprocessing = config.checkpoint.preprocessing
    return VisionGraph(
        set_precision(part.vision_tower, dtype),
        set_precision(part.projector, dtype),
        config.earlytom,
        mean=preprocessing.mean,
        std=preprocessing.std,
        depth=config.depth,
    )


def export(config: BuildConfig, place: Path) -> ExportedGraph:
    """The export stage: `vision.onnx` in `place`. The weights are freed before anything else starts."""
    graph = vision_graph(config, contract.DTYPES[config.dtype])
    return export_onnx(graph, config.frames, config.checkpoint.preprocessing.size, place / contract.ONNX_FILE)


def check(
    config: BuildConfig, onnx_path: Path, clips: dict[str, Tensor], options: argparse.Namespace, stages: Stages
) -> verify.Report:
    """The verify stage: the gate on real frames; leaves the reference in Polygraphy's format beside the graph."""
    reference = vision_graph(config, torch.float32)
    with_text = options.verify_text
    if with_text is None:
        with_text = decoder_parameters(config.model.text_config) <= SMALL_DECODER
    report, wanted = verify.verify(
        onnx_path,
        reference,
        clips,
        config.dtype,
        text=NextTokens(config.checkpoint) if with_text else None,
        text_with_equal_decisions=not config.checkpoint.trained,
        say=stages.note,
    )
    verify.save_reference(onnx_path.parent, next(iter(clips.values())), wanted)
    stages.screen.table(
        ("step", "what", "value", "limit", ""),
        [
            (line.step, line.what, f"{line.value:.8g}", f"{line.limit:.6g}", "ok" if line.passed else "FAILED")
            for line in report.checks
        ],
    )
    for note in report.notes:
        stages.note(note)
    return report


def calibration_clips(config: BuildConfig, place: Path) -> dict[str, Tensor]:
    """Real frames for the gate: of the clips given, else of a clip drawn, encoded and decoded for it."""
    size = config.checkpoint.preprocessing.size
    if config.calibration:
        names = [path.name for path in config.calibration]
        labels = names if len(set(names)) == len(names) else [str(path) for path in config.calibration]
        loaded = (load_clip(path, config.frames, size).frames for path in config.calibration)
        return dict(zip(labels, loaded, strict=True))
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = draw_clip(Path(folder) / "drawn.mp4")
        return {"drawn clip": load_clip(path, config.frames, size).frames}


def describe(
    config: BuildConfig,
    key: str,
    name: str,
    place: Path,
    report: verify.Report | None,
    figures: dict[str, float],
) -> Manifest:
    """The manifest of what `place` holds."""
    checkpoint, vision = config.checkpoint, config.model.vision_config
    preprocessing = checkpoint.preprocessing
    return Manifest(
        name=name,
        key=key,
        project_version=project_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=ModelRecord(
            source=checkpoint.source,
            family=config.model.model_type,
            digest=checkpoint.digest(),
            trained=checkpoint.trained,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            preprocessing=PreprocessingRecord(preprocessing.size, preprocessing.mean, preprocessing.std),
        ),
        earlytom=config.earlytom.to_dict(),
        frames=config.frames,
        frames_per_stage=config.stages,
        tokens=config.tokens,
        tokens_per_frame=config.tokens_per_frame,
        tokens_full=config.frames * config.tokens_per_frame,
        dim=config.model.text_config.hidden_size,
        dtype=config.dtype,
        target=".".join(map(str, config.target)),
        backend=config.backend,
        backend_version=config.backend_version,
        files=describe_files(place),
        figures=figures,
        verification=None if report is None else report.to_dict(),
        # ONNX Runtime cannot run bf16 graphs on a CPU, so there is no line that would work everywhere.
        polygraphy="" if report is None or config.dtype == "bf16" else verify.polygraphy_command(report.tolerance),
    )


def write_report(
    path: Path, report: verify.Report | None, compiled: CompileReport | None, figures: dict[str, float]
) -> None:
    """report.json: the gate's checks, the compiler's report and the figures of the build."""
    record = {
        "verification": None if report is None else report.to_dict(),
        "compile": None if compiled is None else compiled.to_dict(),
        "figures": figures,
    }
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def peak_bytes(compiled: CompileReport | None) -> float:
    """Peak resident memory so far, of this process or of the one that compiled, whichever is larger."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return float(max(own, compiled.peak_rss_bytes if compiled else 0))


def show_plan(screen: cli.Screen, config: BuildConfig) -> None:
    """What will be kept and what it will cost, from shapes alone."""
    layers = config.earlytom.merge_layers
    names = ["input", *(f"after layer {layer}" for layer in layers)]
    screen.table(("stage", "frames"), list(zip(names, config.stages, strict=True)))
    full = config.frames * config.tokens_per_frame
    costs = [("tokens to the LLM", full, config.tokens)]
    costs += [(f"{what} GFLOP", config.flops[f"{what}_full"], config.flops[what]) for what in ("vision", "prefill")]
    shown = [
        (what, *(n if "tokens" in what else round(n / 1e9, 2) for n in (before, after)), f"{after / before:.1%}")
        for what, before, after in costs
    ]
    screen.table(("cost of a clip", "full", "compressed", "share"), shown)
    sizes = config.expected_bytes
    screen.line(
        f"expected: weights {sizes['weights'] / 2**20:.1f} MiB, input {sizes['input'] / 2**20:.1f} MiB, "
        f"output {sizes['output'] / 2**20:.2f} MiB"
    )


def show_result(screen: cli.Screen, manifest: Manifest, folder: Path) -> None:
    """What was built, and what to type next."""
    rows = [(name, decimal(record.bytes)) for name, record in manifest.files.items()]
    screen.table(("file", "size"), rows)
    if manifest.verification is None:
        screen.line("not verified (--no-verify)")
    screen.line(f"engine: {folder}")
    screen.line(f'ask it: python -m runtime.ask --engine {folder} VIDEO "QUESTION"')


def summary(config: BuildConfig, key: str, folder: Path, manifest: Manifest | None, *, cached: bool) -> dict[str, Any]:
    """The JSON line."""
    return {
        "folder": str(folder),
        "key": key,
        "built": manifest is not None and not cached,
        "cached": cached,
        "model": config.checkpoint.source,
        "backend": config.backend,
        "backend_version": config.backend_version,
        "target": ".".join(map(str, config.target)),
        "dtype": config.dtype,
        "frames_per_stage": list(config.stages),
        "tokens": config.tokens,
        "tokens_full": config.frames * config.tokens_per_frame,
        "flops": config.flops,
        "expected_bytes": config.expected_bytes,
        "verified": None if manifest is None or manifest.verification is None else manifest.verification["passed"],
        "figures": {} if manifest is None else manifest.figures,
    }


def progress_line(screen: cli.Screen) -> Any:
    """A callback for the compiler: its phase, at most once in two seconds."""
    shown = 0.0

    def show(progress: Progress) -> None:
        nonlocal shown
        if progress.seconds >= shown + 2:
            shown = progress.seconds
            screen.line(f"  {progress.phase} ({progress.seconds:.0f} s)")

    return show


def _stop(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # a service manager's stop cleans up like Ctrl-C
    sys.exit(cli.run(main, sys.argv[1:]))
