"""A build's output: its plan, its results, and the JSON line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from runtime.engine.manifest import Manifest

if TYPE_CHECKING:
    from builder.clips import FramesKept
    from builder.compile.engine import CompileProgress
    from builder.settings.config import BuildConfig
    from runtime.trace import Trace


def show_plan(trace: Trace, config: BuildConfig) -> None:
    """Print what will be kept, and its cost, from shapes alone."""
    layers = config.earlytom.merge_layers
    names = ["input", *(f"after layer {layer}" for layer in layers)]
    several = config.frame_counts is not None
    counts = [f"of {frames} frames" for frames in config.counts] if several else ["frames"]
    if config.adaptive:
        counts = ["frames (at most)"]
    trace.table(("stage", *counts), list(zip(names, *(one.stages for one in config.each), strict=True)))
    if config.chunk is not None:
        first = f"layer {layers[0]}" if layers else "the last layer"
        trace.line(f"frames come in chunks of {config.chunk}, on which the layers up to {first} run")
    for one in config.each:
        what = f"cost of a clip of {one.frames} frames" if several else "cost of a clip"
        trace.table((what, "full", "at most" if config.adaptive else "compressed", "share"), _costs(one))
    for one in config.each:
        sizes = one.expected_bytes
        about = ", ".join([f"{one.frames} frames"] * several + [f"{config.batch} videos at once"] * (config.batch > 1))
        trace.line(
            f"expected{f' of {about}' if about else ''}: weights {sizes['weights'] / 2**20:.1f} MiB, "
            f"input {sizes['input'] / 2**20:.1f} MiB, output {sizes['output'] / 2**20:.2f} MiB"
        )
    if several:
        trace.line("the ONNX files share their weights" + ("" if config.backend == "onnx" else ", the engines do not"))


def _costs(config: BuildConfig) -> list[tuple[object, ...]]:
    """Tokens and flops of vision part and prefill: full, compressed, share."""
    full = config.layout.tokens_full
    costs = [("tokens to the LLM", full, config.tokens)]
    costs += [(f"{what} GFLOP", config.flops[f"{what}_full"], config.flops[what]) for what in ("vision", "prefill")]
    return [
        (what, *((n if "tokens" in what else round(n / 1e9, 2)) for n in (before, after)), f"{after / before:.1%}")
        for what, before, after in costs
    ]


def show_kept(trace: Trace, config: BuildConfig, kept: FramesKept) -> None:
    """Print the numbers of frames that the adaptive schedule keeps of the calibration clips."""
    names = ["input", *(f"after layer {layer}" for layer in config.earlytom.merge_layers)]
    rows = [(name, *counts) for name, counts in zip(names, kept.ranges, strict=True)]
    trace.table((f"frames kept of {', '.join(kept.clips)}", "minimum", "median", "maximum"), rows)


def show_result(trace: Trace, manifest: Manifest, folder: Path) -> None:
    """Print what was built, and the command to ask it."""
    rows = [(name, decimal(record.bytes)) for name, record in manifest.files.items()]
    trace.table(("file", "size"), rows)
    if manifest.plugins:
        kernels = [(p.name, p.tensors, p.registers, p.shared_bytes, p.ptx_sha256[:12]) for p in manifest.plugins]
        trace.table(("plugin", "tensors", "registers", "shared bytes", "PTX sha256"), kernels)
    if manifest.verification is None:
        trace.line("not verified (--no-verify)")
    if manifest.frame_counts is not None:
        each = [manifest.at(frames) for frames in manifest.counts]
        kept = [(" -> ".join(map(str, one.frames_per_stage)), one.tokens, one.tokens_full) for one in each]
        trace.table(("frames", "tokens", "of"), kept)
    trace.line(f"engine: {folder}")
    trace.line(f'ask it: python -m runtime.ask --engine {folder} VIDEO "QUESTION"')


def summary(config: BuildConfig, key: str, folder: Path, manifest: Manifest | None, *, cached: bool) -> dict[str, Any]:
    """The JSON line. Its figures are those of the largest frame count; `counts` has those of all."""
    return {
        "folder": str(folder),
        "key": key,
        "built": manifest is not None and not cached,
        "cached": cached,
        "model": config.checkpoint.source,
        "backend": config.backend,
        "backend_version": config.backend_version,
        "compression": config.compression,
        "target": ".".join(map(str, config.target)),
        "dtype": config.dtype,
        "islands": [] if config.dtype == "fp32" else list(config.islands.words),
        "int8_keep": None if config.int8 is None else list(config.int8),
        "int8": None if manifest is None or manifest.int8 is None else list(manifest.int8),
        **_sizes(config),
        "frames_kept": None if manifest is None or manifest.frames_kept is None else list(manifest.frames_kept),
        "batch": config.batch,
        "chunk": config.chunk,
        "counts": [{"frames": one.frames, **_sizes(one)} for one in config.each],
        "verified": None if manifest is None or manifest.verification is None else manifest.verification["passed"],
        "figures": {} if manifest is None else manifest.figures,
    }


def _sizes(config: BuildConfig) -> dict[str, Any]:
    """The figures of one frame count."""
    return {
        "frames_per_stage": list(config.stages),
        "tokens": config.tokens,
        "tokens_full": config.layout.tokens_full,
        "flops": config.flops,
        "expected_bytes": config.expected_bytes,
    }


def progress_line(trace: Trace) -> Callable[[CompileProgress], None]:
    """A callback for the compiler: its phase as a line at most once in two seconds, and each step on a terminal."""
    shown = 0.0

    def show(progress: CompileProgress) -> None:
        nonlocal shown
        trace.step(progress.phase, progress.done, progress.steps)
        if progress.seconds >= shown + 2:
            shown = progress.seconds
            trace.line(f"  {progress.phase} ({progress.seconds:.0f} s)")

    return show
