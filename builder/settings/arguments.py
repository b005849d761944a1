"""The command line of `python -m builder.build`: from arguments to a checked `BuildConfig`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from builder.plugins import choose, kernel_target
from builder.precision import islands, products
from builder.settings.options import (
    AUTO,
    check_batch,
    check_clips,
    check_counts,
    check_one_video,
    check_rounds,
    check_shapes,
    parse_size,
    parse_target,
)
from builder.settings.parser import parser
from earlytom.cells.config import CellsConfig
from earlytom.config import RELEASED_LAYERS, EarlyTomConfig, layers_for
from earlytom.errors import UserError
from earlytom.families import Family, Geometry
from earlytom.settings import SETTINGS, MethodSettings
from earlytom.untouched import UntouchedConfig
from runtime import trt
from runtime.choices import METHOD_OPTIONS, given_settings, in_options

if TYPE_CHECKING:
    from builder.settings.config import BuildConfig


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, BuildConfig, trt.BackendChoice]:
    """Parse and check: `read`, then `configured`.

    Returns:
        The options as given, the build's configuration, and the choice of its backend.
    """
    options, choice = read(argv)
    return options, configured(options, choice), choice


def read(argv: Sequence[str] | None) -> tuple[argparse.Namespace, trt.BackendChoice]:
    """Parse, with all checks that need no model, as reading one takes seconds.

    Returns:
        The options as given, and the choice of the backend.
    """
    options = parser().parse_args(argv)
    for clip in options.calibration:
        if not clip.is_file():
            what = "not a file" if clip.exists() else "no such file"
            raise UserError(f"--calibration {clip}: {what}; give video files that FFmpeg reads")
    if options.verify_text and not options.verify:
        raise UserError("--verify-text is a step of the gate, which --no-verify leaves out: give one of the two")
    try:
        str(options.out).encode()
    except UnicodeEncodeError as error:  # ONNX needs UTF-8 paths
        raise UserError(
            f"--out {str(options.out)!r} is not UTF-8: choose another folder, or set the locale with LC_ALL=C.UTF-8"
        ) from error
    if not 0 < options.workspace < math.inf:
        raise UserError(f"--workspace must be more than 0 GiB, got {options.workspace}")
    target = parse_target(options.target)
    if options.size is not None:
        parse_size(options.size)
    _check_shapes(options)
    check_one_video(options.method, batch=options.batch, chunk=options.chunk)
    if options.islands not in (None, islands.LIST):
        islands.check(options.islands)
    _check_int8(options)
    choice = trt.resolve_backend(options.backend)
    if options.hardware_compatible and choice.backend != "tensorrt":
        raise UserError(f"--hardware-compatible is for --backend tensorrt; the backend is {choice.backend}")
    kernel, method = kernel_target(target, options.hardware_compatible), _method(options, None)
    if isinstance(method, CellsConfig):
        check_rounds(method.schedule, method.rounds, choice.backend)
    choose(options.compression, choice.backend, kernel, options.schedule, has_kernels=_has_kernels(method))
    return options, choice


def _check_shapes(options: argparse.Namespace) -> None:
    """The checks of `BuildConfig` that do not depend on the model."""
    method = _method(options, None)
    counts = () if options.frames is None else _counts(options.frames, 0)
    if len(counts) > 1 and options.frame_budget == AUTO:
        raise UserError(
            f"--frame-budget {AUTO} gives a budget for one frame count, got --frames {options.frames}: give it a share "
            "such as 0.75, or --frames one number"
        )
    if options.islands is not None and options.dtype == "fp32":
        raise UserError(f"{islands.OPTION} is for --fp16 and --bf16: with --fp32 everything is fp32")
    check_counts(counts)
    check_batch(options.batch)
    check_shapes(
        method.schedule,
        method.frame_budget,
        counts[-1] if counts else None,
        counts if len(counts) > 1 else None,
        batch=options.batch,
        chunk=options.chunk,
    )


def _check_int8(options: argparse.Namespace) -> None:
    check_clips(options.int8, len(options.calibration))
    if options.int8_keep is None:
        return
    if not options.int8:
        raise UserError(f"{products.OPTION} is for --int8: add it, or leave this out")
    products.check(options.int8_keep)


def configured(options: argparse.Namespace, choice: trt.BackendChoice) -> BuildConfig:
    """The configuration of a build from options that `read` returned."""
    from builder.settings.config import BuildConfig
    from earlytom.families import family_of, geometry
    from runtime.checkpoint import describe

    target = parse_target(options.target)
    checkpoint = describe(options.model)
    if options.size is not None:
        checkpoint = checkpoint.sized(parse_size(options.size))
    kernel = kernel_target(target, options.hardware_compatible)
    frame = geometry(checkpoint.config)
    method = _method(options, frame, family_of(checkpoint.config))
    kernels = choose(options.compression, choice.backend, kernel, options.schedule, has_kernels=_has_kernels(method))
    counts = _counts(options.frames, checkpoint.frames)
    return BuildConfig(
        checkpoint=checkpoint,
        earlytom=method,
        frames=counts[-1],
        dtype=options.dtype,
        target=target,
        backend=choice.backend,
        backend_version=_version(choice.backend),
        hardware_compatible=options.hardware_compatible,
        workspace_gib=options.workspace,
        compression=kernels.compression,
        calibration=tuple(options.calibration),
        islands=islands.DEFAULT
        if options.islands in (None, islands.LIST)
        else islands.parse(options.islands, frame.depth),
        int8=products.choice(options.int8_keep, frame.depth) if options.int8 else None,
        batch=options.batch,
        frame_counts=counts if len(counts) > 1 else None,
        chunk=options.chunk,
    )


def _has_kernels(method: MethodSettings) -> bool:
    """Whether a step of the method has a plugin kernel."""
    return isinstance(method, EarlyTomConfig) or (isinstance(method, CellsConfig) and method.rounds is None)


def _method(options: argparse.Namespace, frame: Geometry | None, family: Family | None = None) -> MethodSettings:
    """The method's settings: defaults or a preset's, changed by explicit options; `frame` is None before the model is
    known."""
    kind = SETTINGS[options.method]
    own = {option.name: option.method for option in METHOD_OPTIONS.values() if option.method is not None}
    for name, method in (own | {"preset": EarlyTomConfig.method}).items():
        if getattr(options, name) is not None and method != options.method:
            raise UserError(f"--{name} is for --method {method}, not {options.method}: leave it out")
    if options.threshold is not None and options.schedule == "budget" and options.frame_budget != AUTO:
        raise UserError(
            "--threshold is for --schedule adaptive and --frame-budget auto: with fixed counts the frames that change "
            "most start groups; leave it out"
        )
    if issubclass(kind, UntouchedConfig):
        _refuse_merging(options)
    if options.frame_budget is not None and options.schedule == "adaptive":
        raise UserError("--frame-budget is for --schedule budget: in the adaptive one the video decides")
    changes: dict[str, Any] = {"schedule": options.schedule}
    changes |= given_settings(options, "merge_layers", "tau", "power", "rounds", "threshold")
    if options.frame_budget != AUTO:
        changes |= given_settings(options, "frame_budget")
    budget = changes.get("frame_budget")
    layers = layers_for(RELEASED_LAYERS) if frame is None else layers_for(frame.depth, frame.full)
    if frame is None and isinstance(budget, tuple):  # one count for each layer, of which a small tower has fewer
        layers = tuple(range(len(budget)))
    defaults: dict[str, Any] = {"retention_ratio": options.ratio, "merge_layers": layers}
    try:
        if options.preset is not None:
            return EarlyTomConfig.preset(
                options.preset, options.ratio, own=family.presets if family else None, **changes
            )
        if issubclass(kind, UntouchedConfig):
            return kind(options.ratio)
        return kind(**(defaults | changes))
    except UserError as error:  # it names the settings; on a command line they are options
        raise in_options(error) from error


def _refuse_merging(options: argparse.Namespace) -> None:
    """Raise UserError for options about merging."""
    given = {"--merge-layers": options.merge_layers, "--frame-budget": options.frame_budget}
    given["--schedule adaptive"] = None if options.schedule == "budget" else options.schedule
    for flag, value in given.items():
        if value is not None:
            raise UserError(f"--method {options.method} merges no frames: leave out {flag}")


def _counts(text: str | None, usual: int) -> tuple[int, ...]:
    """The frame counts, ascending."""
    try:
        counts = (usual,) if text is None else tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(f"--frames {text!r}: give a whole number, or several such as 8,16,32") from error
    if len(set(counts)) < len(counts):
        raise UserError(f"--frames {text!r} names a number twice: give each frame count once")
    return tuple(sorted(counts))


def _version(backend: str) -> str:
    """Version of the library that compiles the engine, or of onnx for backend "onnx"."""
    if backend == "onnx":
        import onnx

        return onnx.__version__
    return ".".join(map(str, trt.version(trt.load(backend))))
