"""Build a vision engine from a checkpoint.

    python -m builder.build --ratio 0.3 --fp16

or, from Python,

    from builder.build import build_engine
    folder = build_engine(config, Path("engines"))     # a `builder.settings.config.BuildConfig`

The command checks its options, reads the checkpoint's settings and derives the cache key. If an engine with that key is
in the folder already, it is used; else the stages (`builder.stages`) run and the folder is published atomically. An
unverified engine is published only with --no-verify.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.plugins import choose, kernel_target
from builder.settings.arguments import configured, read
from builder.settings.options import AUTO
from builder.trace import told
from runtime import cli
from runtime.trace import Trace

if TYPE_CHECKING:
    from builder.clips import FramesKept
    from builder.settings.config import BuildConfig
    from runtime.engine.manifest import Manifest


@dataclass(frozen=True)
class Built:
    """An engine folder, built now or (`cached`) before."""

    folder: Path
    manifest: Manifest
    cached: bool


def build_engine(
    config: BuildConfig,
    out: Path,
    *,
    verify: bool = True,
    verify_text: bool | None = None,
    force: bool = False,
    say: Callable[[str], object] = print,
) -> Path:
    """The engine folder under `out` for `config`: found there, or built and published atomically.

    Args:
        verify: run the accuracy gate; a cached engine that was built without it is built again.
        verify_text: run the gate's last step, which loads the decoder; default: where the decoder is small.
        force: build even if the engine is there.
        say: called with each line of progress.

    Raises:
        UserError: the model cannot answer questions, the target cannot be built for here, the graph does not pass the
            gate, or `out` cannot be written. Nothing half-written stays behind, not even after Ctrl-C.
    """
    from builder.source import check_answers

    check_answers(config.checkpoint)
    if config.backend != "onnx":
        from builder.compile.engine import check_target

        check_target(config.backend, config.target, config.hardware_compatible)
    return obtain(config, out, told(say), verify=verify, verify_text=verify_text, force=force).folder


def obtain(
    config: BuildConfig,
    out: Path,
    trace: Trace,
    *,
    verify: bool,
    verify_text: bool | None,
    force: bool,
    kept: FramesKept | None = None,
) -> Built:
    """`build_engine` for a checked config; `kept` as in `builder.stages.build`."""
    from builder import cache

    key = config.key()
    folder = out / config.name(key)
    checks = {"verified": verify, "text": bool(verify_text)}
    if not force and (found := cache.find(folder, key, **checks)):
        trace.line(f"unchanged: {folder} was built {found.created} and is used as it is (--force builds it again)")
        if found.model.source != config.checkpoint.source:
            trace.line(f"note: it was built from {found.model.source}, where python -m runtime.ask looks for the same")
        return Built(folder, found, cached=True)
    if folder.is_dir() and not force:
        trace.line(f"{folder} is damaged or, as far as it is asked for, not verified: it is built again")
    from builder.inspection.page import REPORT_PAGE, leave
    from builder.stages import build

    with cache.staging(folder, lambda: trace.line("another process is building this engine: waiting for it")) as place:
        if not force and (found := cache.find(folder, key, **checks)):
            trace.line(f"unchanged: {folder} was just built by another process")  # while this one waited
            return Built(folder, found, cached=True)
        manifest = build(config, key, folder.name, place, trace, verify=verify, verify_text=verify_text, kept=kept)
        cache.publish(place, folder)
        try:
            leave(folder)
        except OSError as error:  # not fatal: the engine is published, and the page can be made later
            trace.line(
                f"note: there is no {REPORT_PAGE} ({error.strerror}): python -m builder.inspect {folder} --html FILE"
            )
    return Built(folder, manifest, cached=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options, choice = read(argv)
    config = configured(options, choice)
    from builder.compile.engine import check_target
    from builder.precision import int8_table, islands, products
    from builder.show import show_plan, show_result, summary
    from builder.source import check_answers

    screen = cli.Screen(json_only=options.json)
    check_answers(config.checkpoint)
    if config.checkpoint.source == "micro":
        screen.line("model: the bundled one (choose another with --model)")
    if not config.checkpoint.trained:
        screen.line("note: its weights are not trained, so answers will be nonsense; counts and speed are real")
    if config.checkpoint.generation_note is not None:
        screen.line(f"note: {config.checkpoint.generation_note}")
    screen.line(f"backend: {config.backend} ({choice.reason})")
    if config.backend != "onnx":
        target = kernel_target(config.target, config.hardware_compatible)
        reason = choose(options.compression, config.backend, target, options.schedule).reason
        screen.line(f"compression: {config.compression} ({reason})")
    kept = None
    if options.frame_budget == AUTO:
        from builder.stages import auto_budget

        config, kept = auto_budget(config, screen)
    key = config.key()
    folder = options.out / config.name(key)
    if options.islands == islands.LIST:
        islands.show(screen, config)
        screen.result(islands.record(config))
        return 0
    if options.int8_keep == products.LIST:
        from builder.stages import measure_int8

        plan = measure_int8(config)
        int8_table.show(screen, config, plan)
        screen.result(plan.to_dict())
        return 0
    show_plan(screen, config)
    if config.backend != "onnx" and not (options.dry_run and config.backend == "tensorrt"):  # a dry run needs no GPU
        check_target(config.backend, config.target, config.hardware_compatible)
    if options.dry_run:
        if config.dtype != "fp32":
            islands.show(screen, config)
        screen.line(f"key: {key}\nfolder: {folder}\nnothing was built (--dry-run)")
        screen.result(summary(config, key, folder, None, cached=False))
        return 0
    built = obtain(
        config,
        options.out,
        screen,
        verify=options.verify,
        verify_text=options.verify_text,
        force=options.force,
        kept=kept,
    )
    if not built.cached:
        show_result(screen, built.manifest, built.folder)
    screen.result(summary(config, key, built.folder, built.manifest, cached=built.cached))
    return 0


if __name__ == "__main__":
    cli.stop_by_signal()  # a service manager's stop cleans up like Ctrl-C
    sys.exit(cli.run(main, sys.argv[1:]))
