"""The command line of `python -m builder.build`: from words to a checked `BuildConfig`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.plugins import COMPRESSIONS, choose, kernel_target
from builder.precision import islands, products
from builder.settings.options import (
    AUTO,
    AUTO_SHARE,
    WORKSPACE_GIB,
    check_batch,
    check_clips,
    check_counts,
    check_one_video,
    check_rounds,
    check_shapes,
    parse_size,
    parse_target,
)
from earlytom.cells.config import CellsConfig
from earlytom.config import PRESETS, RELEASED_LAYERS, SCHEDULES, EarlyTomConfig, layers_for
from earlytom.errors import UserError
from earlytom.families import TITLES, Geometry
from earlytom.settings import NOT_BUILT, SETTINGS, MethodSettings
from earlytom.untouched import UntouchedConfig
from runtime import cli, trt
from runtime.choices import METHOD_OPTIONS, add_method_options, given_settings, in_options, number

if TYPE_CHECKING:
    from builder.settings.config import BuildConfig

EXAMPLES = """
examples:
  python -m builder.build --ratio 0.3 --fp16
      the bundled model, to see the whole path work
  python -m builder.build --model llava-hf/llava-onevision-qwen2-7b-ov-hf --preset videomme --ratio 0.2 --fp16
      a real checkpoint with released settings, for an A100
  python -m builder.build --model random:llava-onevision-qwen2-7b-ov --frames 32 --ratio 0.1 --dry-run
      what a build would keep and cost; nothing is built
  python -m builder.build --ratio 0.3 --fp16 --frames 8,16,32 --batch 4
      for a service: short clips cost less than long ones, and four of them run at once

The exit status is 0 when the engine is there, 2 when something asked for cannot be done (one line says what and how to
mend it), 130 after Ctrl-C. Nothing half-written stays behind.
"""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, BuildConfig, trt.BackendChoice]:
    """Parse and check: `read`, then `configured`.

    Returns:
        The options as given, the build they ask for, and why its backend was chosen.
    """
    options, choice = read(argv)
    return options, configured(options, choice), choice


def read(argv: Sequence[str] | None) -> tuple[argparse.Namespace, trt.BackendChoice]:
    """Parse, and refuse what can be refused without the model: reading one takes seconds.

    Returns:
        The options as given, and what they build with.
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
    except UnicodeEncodeError as error:  # ONNX takes no other names
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
    """What `BuildConfig` refuses, as far as it does not hang on the model."""
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
    """The build that options which `read` accepted ask for."""
    from builder.settings.config import BuildConfig
    from earlytom.families import geometry
    from runtime.checkpoint import describe

    target = parse_target(options.target)
    checkpoint = describe(options.model)
    if options.size is not None:
        checkpoint = checkpoint.sized(parse_size(options.size))
    kernel = kernel_target(target, options.hardware_compatible)
    frame = geometry(checkpoint.config)
    method = _method(options, frame)
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


def parser() -> argparse.ArgumentParser:
    """The options, with a help text that teaches."""
    p = cli.Parser(
        prog="python -m builder.build",
        description=f"Compile the vision part of a {TITLES} checkpoint, with EarlyTom token compression inside, "
        "into an engine folder for python -m runtime.ask.",
        epilog=EXAMPLES,
    )
    p.add_argument(
        "--model",
        metavar="SOURCE",
        help="a checkpoint folder, a hub id (ORG/NAME or ORG/NAME@REVISION), random:NAME for a published configuration "
        "with random weights; default: the small bundled model",
    )
    _method_options(p.add_argument_group("compression"))
    _engine_options(p.add_argument_group("engine"))
    _work_options(p.add_argument_group("work"))
    return p


def flags() -> dict[str, str]:
    """The options that set each value, as they are typed: "dtype" is set by "--fp16, --bf16, --fp32"."""
    found: dict[str, list[str]] = {}
    for action in parser()._actions:
        found.setdefault(action.dest, []).extend(action.option_strings[:1])
    settings = {name: option.flag for name, option in METHOD_OPTIONS.items()}
    return {name: ", ".join(words) for name, words in found.items()} | settings


def _method_options(group: Any) -> None:
    group.add_argument(
        "--method",
        type=_built,
        choices=tuple(SETTINGS),
        default=EarlyTomConfig.method,
        help="earlytom: the published method (default); cells: frames merged cell by cell and diverse tokens, more "
        "accurate with few tokens on the bundled model; the others, for comparison, merge no frames inside the encoder",
    )
    add_method_options(group, "retention_ratio")
    group.add_argument(
        "--frames",
        metavar="F[,F,...]",
        help="frames sampled from a clip (default: the model's own number); several numbers make one folder with an "
        "engine for each, of which the runtime takes the one that fits the clip",
    )
    group.add_argument(
        "--size",
        metavar="HxW",
        help="height and width of frames in pixels, of a model that takes any (default: the checkpoint's)",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help="released settings for a benchmark at this --ratio; --tau and --merge-layers given beside it win",
    )
    add_method_options(group, "merge_layers", "tau")
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="budget",
        help="budget: fixed frame counts, one engine with static shapes (default); adaptive: the video decides how "
        "many frames stay, a chain of engines cut after each merge layer",
    )
    add_method_options(group, "power", "rounds", "threshold")
    group.add_argument(
        METHOD_OPTIONS["frame_budget"].flag,
        metavar="SHARE|N,N,N|auto",
        help="frames kept at each merge layer, as a share or as one count per layer; auto: as many as the adaptive "
        f"schedule keeps at most in {AUTO_SHARE:.0%} of the --calibration clips (default: 0.75)".replace("%", "%%"),
    )


def _engine_options(group: Any) -> None:
    group.add_argument(
        "--batch",
        type=_whole,
        default=1,
        metavar="B",
        help="videos that the engine takes at once, each treated as if it were alone (default: 1)",
    )
    group.add_argument(
        "--chunk",
        type=_whole,
        metavar="C",
        help="an engine that starts on a clip before it ends: the layers up to the first merge run on C frames at a "
        "time, as they come; C divides --frames (default: clips come whole)",
    )
    precision = group.add_mutually_exclusive_group()
    for name, what in (
        ("fp16", "half precision, fp32 where it matters (default)"),
        ("bf16", "bfloat16, fp32 where it matters"),
        ("fp32", "single precision, TF32 off"),
    ):
        precision.add_argument(f"--{name}", dest="dtype", action="store_const", const=name, help=what)
    group.set_defaults(dtype="fp16")
    group.add_argument(
        "--int8",
        action="store_true",
        help="the products of attention's projections, of the MLPs and of the projector in int8, with scales from the "
        "--calibration clips; the rest as --fp16, --bf16 or --fp32 says (on a CPU only --fp32 is faster for it)",
    )
    group.add_argument(
        products.OPTION,
        metavar="NAME,...",
        help="what --int8 leaves wider, such as fc2:0-3,projector-out; none; auto: what the clips show to be too "
        "sensitive; 'list' measures each product and builds nothing (default: auto)",
    )
    group.add_argument(
        islands.OPTION,
        "--fp16-islands",
        metavar="NAME,...",
        help="what stays fp32 with --fp16 or --bf16, such as default,residual,mlp:20-25; 'list' shows what there is "
        "and what it costs, 'python -m builder.verify ENGINE --layers' where it is needed (default: default)",
    )
    group.add_argument(
        "--target", default="a100", metavar="GPU", help="a100, or a capability such as 8.9 (default: a100 = 8.0)"
    )
    group.add_argument(
        "--backend",
        choices=("auto", "tensorrt", "tensorrt-rtx", "onnx"),
        default="auto",
        help="auto: tensorrt where it and a GPU are, else tensorrt-rtx (compiles ahead of time, needs no GPU), else "
        "onnx (stops at the ONNX file)",
    )
    group.add_argument(
        "--compression",
        choices=COMPRESSIONS,
        default="auto",
        help="how the compression stage runs: as TensorRT plugins (tensorrt only, needs Triton to build) or as native "
        "operators of the graph; auto: plugin with tensorrt, else native",
    )
    group.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="tensorrt only: kernels for 8.0 and newer instead of this GPU's own, at some cost in speed",
    )
    group.add_argument(
        "--workspace",
        type=number,
        default=WORKSPACE_GIB,
        metavar="GIB",
        help=f"scratch memory limit in GiB (default: {WORKSPACE_GIB:g})",
    )


def _work_options(group: Any) -> None:
    group.add_argument(
        "--out", type=Path, default=Path("engines"), metavar="DIR", help="where engine folders go (default: engines/)"
    )
    group.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=[],
        metavar="VIDEO",
        help="videos like yours, whose frames the accuracy gate runs on (default: a drawn clip); with --int8 the last "
        "quarter of them, while its scales come from the others",
    )
    group.add_argument("--no-verify", dest="verify", action="store_false", help="publish without the accuracy gate")
    group.add_argument(
        "--verify-text",
        action=argparse.BooleanOptionalAction,
        help="run the gate's last step, which loads the decoder (default: where the decoder is small)",
    )
    group.add_argument("--force", action="store_true", help="build even if the same engine is there already")
    group.add_argument("--dry-run", action="store_true", help="print counts, flops, sizes and the key; build nothing")
    group.add_argument("--json", action="store_true", help="print nothing but the JSON line at the end")


def _built(method: str) -> str:
    """A method's name; ArgumentTypeError with the reason for one that runs in PyTorch alone."""
    if method in NOT_BUILT:
        raise argparse.ArgumentTypeError(f"{method} cannot be built into an engine: {NOT_BUILT[method]}")
    return method


def _has_kernels(method: MethodSettings) -> bool:
    """Whether one of the method's steps is a kernel of ours."""
    return isinstance(method, EarlyTomConfig) or (isinstance(method, CellsConfig) and method.rounds is None)


def _method(options: argparse.Namespace, frame: Geometry | None) -> MethodSettings:
    """The method's settings: a preset's, changed by what was given explicitly; `frame` is None while not known."""
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
            return EarlyTomConfig.preset(options.preset, options.ratio, **changes)
        if issubclass(kind, UntouchedConfig):
            return kind(options.ratio)
        return kind(**(defaults | changes))
    except UserError as error:  # it names the settings; on a command line they are options
        raise in_options(error) from error


def _refuse_merging(options: argparse.Namespace) -> None:
    """Raise UserError for options about frames that are merged."""
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


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error


def _version(backend: str) -> str:
    """Version of the library that makes the file the runtime will run."""
    if backend == "onnx":
        import onnx

        return onnx.__version__
    return ".".join(map(str, trt.version(trt.load(backend))))
