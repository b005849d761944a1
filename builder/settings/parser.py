"""The argument parser of `python -m builder.build`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from builder.plugins import COMPRESSIONS
from builder.precision import islands, products
from builder.settings.options import (
    AUTO_SHARE,
    WORKSPACE_GIB,
)
from earlytom.config import PRESETS, SCHEDULES, EarlyTomConfig
from earlytom.families import TITLES
from earlytom.settings import NOT_BUILT, SETTINGS
from runtime import cli
from runtime.choices import METHOD_OPTIONS, add_method_options, number

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


def parser() -> argparse.ArgumentParser:
    """The command line."""
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
    """The flags that set each value, such as "--fp16, --bf16, --fp32" for "dtype"."""
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
    """A method's name; ArgumentTypeError with the reason for one that runs in PyTorch only."""
    if method in NOT_BUILT:
        raise argparse.ArgumentTypeError(f"{method} cannot be built into an engine: {NOT_BUILT[method]}")
    return method


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
