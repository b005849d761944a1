"""Build a vision engine from a checkpoint.

    python -m builder.build --ratio 0.3 --fp16

Refuses what makes no sense; reads the checkpoint's settings, decides what is built and its key; returns at once if that
engine is there already; else runs the stages (`builder.stages`) and publishes the folder in one step. What is not
verified is not published, unless --no-verify says so.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

from builder.plugins import choose, kernel_target
from builder.settings.arguments import configured, read
from builder.settings.options import AUTO
from runtime import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options, choice = read(argv)
    config = configured(options, choice)
    from builder import cache
    from builder.compile.engine import check_target
    from builder.precision import islands
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
    show_plan(screen, config)
    if config.backend != "onnx" and not (options.dry_run and config.backend == "tensorrt"):  # plans need no GPU
        check_target(config.backend, config.target, config.hardware_compatible)
    if options.dry_run:
        if config.dtype != "fp32":
            islands.show(screen, config)
        screen.line(f"key: {key}\nfolder: {folder}\nnothing was built (--dry-run)")
        screen.result(summary(config, key, folder, None, cached=False))
        return 0
    checks = {"verified": options.verify, "text": bool(options.verify_text)}
    if not options.force and (found := cache.find(folder, key, **checks)):
        screen.line(f"unchanged: {folder} was built {found.created} and is used as it is (--force builds it again)")
        if found.model.source != config.checkpoint.source:
            screen.line(f"note: it was built from {found.model.source}, where python -m runtime.ask looks for the same")
        screen.result(summary(config, key, folder, found, cached=True))
        return 0
    if folder.is_dir() and not options.force:
        screen.line(f"{folder} is damaged or, as far as it is asked for, not verified: it is built again")
    from builder.stages import build

    with cache.staging(folder, lambda: screen.line("another process is building this engine: waiting for it")) as place:
        if not options.force and (found := cache.find(folder, key, **checks)):
            screen.line(f"unchanged: {folder} was just built by another process")  # while this one waited
            screen.result(summary(config, key, folder, found, cached=True))
            return 0
        manifest = build(config, key, folder.name, place, options, screen, kept)
        cache.publish(place, folder)
    show_result(screen, manifest, folder)
    screen.result(summary(config, key, folder, manifest, cached=False))
    return 0


def _stop(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # a service manager's stop cleans up like Ctrl-C
    sys.exit(cli.run(main, sys.argv[1:]))
