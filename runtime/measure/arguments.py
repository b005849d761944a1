"""The command line of `python -m runtime.bench`, and what can be refused before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.settings import FIELD
from runtime import cli
from runtime.choices import MIN_FRAMES, NARROW_DTYPES, add_options, flag, given_settings, method_option, option
from runtime.engine.folder import ENGINES, newest_engine
from runtime.engine.layout import DTYPE_NAMES
from runtime.engine.manifest import Manifest
from runtime.errors import VideoError
from runtime.measure.serving import arguments as serving
from runtime.show.figure import require_matplotlib

VARIANTS = ("full", "naive", "adaptive", "budget")  # see `runtime.measure.variants`
QUESTION = "What happens in this video?"
NONE = "none"
EXAMPLES = """
what is measured:
  full       transformers, sdpa, all tokens
  naive      EarlyTom as first released: attention formed in every layer, Python loops over frames
  adaptive   this project in PyTorch, with the decisions of the naive form
  budget     this project in PyTorch, fixed frame counts
  holitom, visionzip, ...  a method of the field (earlytom.methods) in PyTorch, corrected form
  --engine   an engine folder, with each backend that runs it here

examples:
  python -m runtime.bench
      the bundled model, about a minute on two cores
  python -m runtime.bench --model random:siglip-base-qwen2-0.5b --repeats 3 --requests 2 --max-new-tokens 4
      a mid-size model with random weights, minutes on two cores
  python -m runtime.bench --model random:llava-onevision-qwen2-7b-ov --device cuda --scale-frames 8,32,128 --plot plots
      full size; needs a GPU
  python -m runtime.bench --vision-only --engine engines/FP32 --engine engines/INT8
      the vision parts alone, in turns, without a decoder in memory
  python -m runtime.bench --engine engines/NAME --service
      what a service sees: watched and live videos, many callers
  python -m runtime.bench --engine engines/NAME --soak 10000
      whether memory stays steady over many requests, minutes on two cores
  python -m runtime.bench --serve http://127.0.0.1:8000 --request-rate 2,5,10 --goodput ttft:500 e2e:2000
      latency, throughput and goodput of a server that runs, as its clients see them
"""

# Options of the comparison only, None unless given.
_COMPARISON = ("frames", "merge_layers", "scale_frames", "scale_ratios", "plot")
N = TypeVar("N", int, float)
S = TypeVar("S", str, int, float)
_WHAT, _HOW, _ALONE, _OUTPUT = (
    "what is measured",
    "how",
    "instead of all that: one engine, as a service uses it",
    "output",
)


def names(text: str) -> tuple[str, ...]:
    """A list of variants."""
    found = _split(text, str)
    for name in found:
        if name == "fastv":
            raise argparse.ArgumentTypeError(
                "fastv acts inside the language model: python -m builder.evaluate --methods fastv measures it"
            )
        if name not in VARIANTS and name not in FIELD:
            of = f"{', '.join(VARIANTS)} (or none), nor of the field: {', '.join(sorted(FIELD))}"
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {of}")
    return found


def counts(text: str) -> tuple[int, ...]:
    """Numbers from 1 on."""
    return _numbers(text, int, lambda n: n >= 1, "whole numbers of at least 1")


def ratios(text: str) -> tuple[float, ...]:
    """Numbers in (0, 1]."""
    return _numbers(text, float, lambda n: 0 < n <= 1, "ratios in (0, 1]")


def _numbers(text: str, kind: type[N], good: Callable[[N], bool], expected: str) -> tuple[N, ...]:
    try:
        found = _split(text, kind)
        wrong = not all(map(good, found))
    except ValueError:
        found, wrong = (), True
    if wrong:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}, separated by commas, or none")
    return found


def _split(text: str, kind: type[S]) -> tuple[S, ...]:
    """Comma-separated values without duplicates, in order; none for "none"."""
    if text == NONE:
        return ()
    parts: Sequence[S] = [kind(part) for part in text.split(",")]
    return tuple(dict.fromkeys(parts))


@dataclass(frozen=True)
class BenchSettings:
    """The checked options by name, with all defaults that do not depend on the model.

    Attributes:
        model: None: the bundled one. video: None: a drawn clip. frames: None: the model's default. merge_layers: None:
            the tower's default.
        engine: folders; --service and --soak take one, by default the newest.
        device: "cpu" or "cuda". dtype: None: fp32, or the stored one if that does not fit into memory.
        soak: number of requests of a soak; None: another measurement.
    """

    model: str | None = option(
        None, "checkpoint folder, hub id or random:NAME (default: bundled)", "SOURCE", group=_WHAT
    )
    video: Path | None = option(
        None, "default: a clip that is drawn; with --serve: or a folder of videos", "FILE", group=_WHAT, type=Path
    )
    question: str = option(None, f"default: {QUESTION} (with --serve: those of the test clips)", "TEXT", group=_WHAT)
    frames: int | None = option(None, "default: as many as the model is meant to be shown", "F", group=_WHAT, type=int)
    ratio: float = method_option(_WHAT)
    merge_layers: tuple[int, ...] | None = method_option(_WHAT)
    tau: float = method_option(_WHAT)
    variants: tuple[str, ...] = option(
        None, f"default: {','.join(VARIANTS)}; or of the field", "LIST", group=_WHAT, type=names
    )
    engine: tuple[Path, ...] = option(
        (), "an engine folder; may be repeated", "DIR", group=_WHAT, type=Path, action="append"
    )
    device: str = option(None, "default: the GPU if there is one", group=_HOW, choices=("cpu", "cuda"))
    dtype: str | None = option(
        None,
        "of the model in PyTorch (default: bf16 on a GPU; on a CPU fp32, or what the checkpoint is stored in where "
        "fp32 does not fit into memory)",
        group=_HOW,
        choices=DTYPE_NAMES,
    )
    decoder_dtype: str | None = option(
        None,
        "the decoder's weights in int8, of all variants, on a CPU; the model is in bf16 then",
        group=_HOW,
        choices=NARROW_DTYPES,
    )
    threads: int | None = option(None, "on the CPU (default: PyTorch's)", "N", group=_HOW, type=int)
    warmup: int = option(2, "requests not counted (default: 2)", "N", group=_HOW, type=int)
    repeats: int = option(10, "requests of each variant (default: 10)", "N", group=_HOW, type=int)
    max_new_tokens: int = option(
        None, "of every answer, at least 2 (default: 16, with --soak 2)", "N", group=_HOW, type=int
    )
    concurrency: tuple[int, ...] = option(None, "clients, or none (default: 1,2,4,8)", "LIST", group=_HOW, type=counts)
    requests: int = option(None, "at each concurrency, at least (default: 8), or rate (100)", "N", group=_HOW, type=int)
    scale_frames: tuple[int, ...] = option(
        None, "or none (default: 8,16,32 with the bundled model)", "LIST", group=_HOW, type=counts
    )
    scale_ratios: tuple[float, ...] = option(
        None, "or none (default: 0.05,0.1,0.3,1 with the bundled model)", "LIST", group=_HOW, type=ratios
    )
    scale_repeats: int = option(3, "requests of each point (default: 3)", "N", group=_HOW, type=int)
    vision_only: bool = option(
        False,
        "the vision parts of the --engine folders alone, in turns: no model is loaded",
        group=_WHAT,
        action="store_true",
    )
    service: bool = option(
        False,
        "first token of fresh, watched and live videos, and many callers (default: the newest under engines/)",
        group=_ALONE,
        action="store_true",
    )
    soak: int | None = option(
        None, "memory over N requests (default: the newest under engines/)", "N", group=_ALONE, type=int
    )
    soak_clients: int = option(4, "that ask at a time (default: 4)", "N", group=_ALONE, type=int)
    plot: Path | None = option(None, "draw there, as PNG (needs matplotlib)", "DIR", group=_OUTPUT, type=Path)
    json: bool = option(False, "print the JSON line alone", group=_OUTPUT, action="store_true")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options after `check`."""
    options = parser().parse_args(argv)
    check(options)
    return options


def read(argv: Sequence[str] | None) -> BenchSettings:
    """`settings_of` the `parsed` options."""
    return settings_of(parsed(argv))


def settings_of(options: argparse.Namespace) -> BenchSettings:
    """The settings of a measurement in this process, after `place`."""
    place(options)
    given = vars(options) | {"engine": tuple(options.engine)}
    return BenchSettings(**{field.name: given[field.name] for field in fields(BenchSettings)})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(
        prog="python -m runtime.bench",
        description="Measure the time to the first token, stage by stage, of EarlyTom and of what it is compared with.",
        epilog=EXAMPLES,
    )
    *measured, plot, json = (field.name for field in fields(BenchSettings))
    add_options(p, BenchSettings, *measured)
    serving.add(p)
    add_options(p, BenchSettings, plot, json)
    return p


def check(options: argparse.Namespace) -> None:
    """All checks that need no model; fills in defaults that depend on other options, except those of `place`."""
    for name, least in (
        ("repeats", 1), ("warmup", 0), ("requests", 1), ("scale_repeats", 1), ("max_new_tokens", 2), ("threads", 1),
        ("frames", MIN_FRAMES), ("soak", 1), ("soak_clients", 1),
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"{flag(name)} must be at least {least}, got {value}")
    given = given_settings(options, "merge_layers", "tau")
    options.merge_layers, options.tau = given.get("merge_layers"), given.get("tau", EarlyTomConfig.tau)
    serving.check(options)
    if options.serve is not None:
        _check_video(options, folders=True)
        _check_plot(options)
        for folder in (options.engine or [newest_engine(ENGINES)]) if options.added else []:
            Manifest.read(folder, verify_files=False)
        return
    if options.requests is None:
        options.requests = 8
    if options.question is None:
        options.question = QUESTION
    if options.variants is None:
        options.variants = VARIANTS
    if options.concurrency is None:
        options.concurrency = (1, 2, 4, 8)
    if options.max_new_tokens is None:
        options.max_new_tokens = 16 if options.soak is None else 2
    if options.soak is not None and options.service:
        raise UserError("--soak and --service measure different things: give one of them")
    if (options.soak is not None or options.service) and len(options.engine) > 1:
        what = "--service" if options.service else "--soak"
        raise UserError(f"{what} measures one engine, got {len(options.engine)}: give --engine once")
    if options.soak is not None or options.service:
        ignored = [name for name in _COMPARISON if getattr(options, name) is not None]
        if ignored:
            flags = ", ".join(map(flag, ignored))
            what = "--service" if options.service else "--soak"
            raise UserError(f"{what} measures one engine, as it was built, and draws nothing: leave out {flags}")
    if options.vision_only:
        _check_vision_only(options)
    bundled = options.model in (None, "micro")
    if options.scale_frames is None:
        options.scale_frames = (8, 16, 32) if bundled else ()
    if options.scale_ratios is None:
        options.scale_ratios = (0.05, 0.1, 0.3, 1.0) if bundled else ()
    if min(options.scale_frames, default=MIN_FRAMES) < MIN_FRAMES:
        raise UserError(f"--scale-frames must each be at least {MIN_FRAMES}, got {min(options.scale_frames)}")
    if not options.variants and not options.engine:
        raise UserError(f"nothing to measure: give --variants (of {', '.join(VARIANTS)}) or --engine")
    _check_video(options)
    alone = options.soak is not None or options.service
    if not alone:
        method(options.ratio, options.merge_layers or (), options.tau)
    for folder in options.engine or ([newest_engine(ENGINES)] if alone else []):
        Manifest.read(folder, verify_files=False)
    _check_plot(options)


def _check_vision_only(options: argparse.Namespace) -> None:
    if not options.engine:
        raise UserError("--vision-only measures engines and none is named: give --engine, once for each")
    given = [name for name in ("plot", "merge_layers", "scale_frames", "scale_ratios") if getattr(options, name)]
    given += [name for name in ("service", "soak") if getattr(options, name)]
    if given:
        flags = ", ".join(map(flag, given))
        raise UserError(f"--vision-only measures engines as they were built, and nothing else: leave out {flags}")


def _check_video(options: argparse.Namespace, *, folders: bool = False) -> None:
    there = options.video is None or options.video.is_file() or (folders and options.video.is_dir())
    if not there:
        raise VideoError(f"video {str(options.video)!r} is not a file; give the path of a video, or leave --video out")


def _check_plot(options: argparse.Namespace) -> None:
    if options.plot is not None:
        require_matplotlib()
        options.plot.mkdir(parents=True, exist_ok=True)


def place(options: argparse.Namespace) -> None:
    """Fill in the device, for which PyTorch is imported, and the default dtype on a GPU or of an int8 decoder."""
    import torch

    from runtime.checkpoint.narrow import check_narrow
    from runtime.engine.dtypes import DTYPES

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no GPU that torch {torch.__version__} can use for --device cuda: use --device cpu")
    check_narrow(options.decoder_dtype, "torch", torch.device(options.device), DTYPES.get(options.dtype))
    if options.dtype is None and (options.device == "cuda" or options.decoder_dtype is not None):
        options.dtype = "bf16"  # on a CPU that depends on the model


def method(ratio: float, merge_layers: tuple[int, ...], tau: float) -> EarlyTomConfig:
    """EarlyTom's settings, with flags named in errors."""
    try:
        return EarlyTomConfig(retention_ratio=ratio, merge_layers=merge_layers, tau=tau, schedule="budget")
    except UserError as error:
        raise UserError(f"{error} (--ratio, --merge-layers, --tau)") from error
