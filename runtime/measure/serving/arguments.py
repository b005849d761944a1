"""The options of `python -m runtime.bench` that are about a server, and what can be refused before it is asked."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from urllib.parse import urlsplit

from earlytom.errors import UserError
from earlytom.numbers import real, whole
from runtime.choices import flag

_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts")
# `_OURS` would be ignored without --serve, `_OTHERS` with it.
_OURS = (
    *("request_rate", "burstiness", "seconds", "max_concurrency", "repeat", "goodput", "api_key_file", "pid", "seed"),
    "added",
)
_OTHERS = ("variants", "concurrency", "frames", "merge_layers", "scale_frames", "scale_ratios", "threads", "service")
OBJECTIVES = ("ttft", "tpot", "e2e")
_RATES, _REQUESTS, _TOKENS, _REPEAT = (1.0,), 100, 16, 0.5


def add(p: argparse.ArgumentParser) -> None:
    """Add the options, all None by default."""
    group = p.add_argument_group("instead of all that: a server that runs (python -m runtime.serve), from outside")
    group.add_argument("--serve", metavar="URL", help="ask the server at this address, as its clients do")
    group.add_argument(
        "--request-rate",
        type=rates,
        metavar="R,...",
        help="requests that arrive a second, one run for each; inf: all at once (default: 1)",
    )
    group.add_argument(
        "--burstiness", type=float, metavar="B", help="1: Poisson (default); below it bursts, above it evener"
    )
    group.add_argument("--seconds", type=float, metavar="S", help="of each run, in place of --requests (default: 100)")
    group.add_argument("--max-concurrency", type=int, metavar="N", help="requests under way (default: any number)")
    group.add_argument(
        "--repeat", type=float, metavar="P", help=f"share about videos sent before, 0 to 1 (default: {_REPEAT})"
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        type=objective,
        metavar="NAME:MS",
        help="objectives: ttft, tpot, e2e with milliseconds, as ttft:500 e2e:2000",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of arrivals and of what is asked (default: 0)")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="its first line is the key for the server")
    group.add_argument("--pid", type=int, metavar="N", help="with --soak: the server's process, to look at its memory")
    group.add_argument(
        "--added",
        action="store_true",
        default=None,
        help="instead: what the server adds to the same requests through a Pipeline of this process (--engine)",
    )


def check(options: argparse.Namespace) -> None:
    """Check the options and fill in defaults."""
    if options.serve is None:
        given = [flag(name) for name in _OURS if getattr(options, name) is not None]
        if given:
            raise UserError(f"{', '.join(given)} is about a server: give its address with --serve URL")
        return
    _check_fit(options)
    for name, least in (("max_concurrency", 1), ("pid", 1), ("seed", 0)):
        if (value := getattr(options, name)) is not None:
            whole(flag(name), value, least)
    for name in ("burstiness", "seconds"):
        if (value := getattr(options, name)) is not None:
            real(flag(name), value, 0, low_open=True)
    if options.repeat is not None:
        real("--repeat", options.repeat, 0, 1)
    names = [name for name, _ in options.goodput or ()]
    if len(set(names)) < len(names):
        raise UserError(f"--goodput names {', '.join(names)}: give each latency once")
    options.request_rate = options.request_rate or _RATES
    if options.seconds is not None and math.inf in options.request_rate:
        raise UserError("--seconds with --request-rate inf: all arrive at once, so give --requests")
    if options.requests is None and options.seconds is None:
        options.requests = _REQUESTS
    options.max_new_tokens = options.max_new_tokens or _TOKENS
    for name, default in (("burstiness", 1.0), ("seed", 0), ("repeat", _REPEAT)):
        if getattr(options, name) is None:
            setattr(options, name, default)


def _check_fit(options: argparse.Namespace) -> None:
    parts = urlsplit(options.serve)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--serve {options.serve!r} is no address: give one as http://127.0.0.1:8000")
    ignored = [
        flag(name) for name in _OTHERS if getattr(options, name) is not None and getattr(options, name) is not False
    ]
    if ignored:
        raise UserError(f"--serve measures a server from outside: leave out {', '.join(ignored)}")
    if options.requests is not None and options.seconds is not None:
        raise UserError("--requests and --seconds both say how long a run is: give one of them")
    if options.soak is not None and options.added:
        raise UserError("--soak and --added measure different things: give one of them")
    if options.pid is not None and options.soak is None:
        raise UserError("--pid is for --soak, which looks at the server's memory: give --soak N")
    if options.engine and not options.added:
        raise UserError("--engine is for --added; a server has its own engine: leave it out")
    if options.plot is not None and (options.soak is not None or options.added):
        raise UserError("--plot draws runs at given rates: leave it out")


def key_of(options: argparse.Namespace) -> str | None:
    """The server's API key, or None."""
    if options.api_key_file is None:
        return None
    lines = options.api_key_file.read_text(encoding="utf-8").split()
    if not lines:
        raise UserError(f"--api-key-file {options.api_key_file}: it is empty; its first line is the key")
    return str(lines[0])


def videos_of(options: argparse.Namespace) -> tuple[Path, ...]:
    """The files of --video, a file or a folder; none if not given."""
    if options.video is None:
        return ()
    if not options.video.is_dir():
        return (options.video,)
    found = sorted(path for path in options.video.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise UserError(f"--video {options.video}: no videos in this folder ({', '.join(_SUFFIXES)})")
    return tuple(found)


def rates(text: str) -> tuple[float, ...]:
    """Rates above 0, "inf" among them."""
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(rate > 0 for rate in found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected rates above 0, or inf, separated by commas")
    return found


def objective(text: str) -> tuple[str, float]:
    """A latency's name and its limit in seconds, from a word such as "ttft:500" (milliseconds)."""
    name, _, limit = text.partition(":")
    try:
        value = float(limit)
    except ValueError:
        value = math.nan
    if name not in OBJECTIVES or not 0 < value < math.inf:
        known = ", ".join(OBJECTIVES)
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {known} with milliseconds, as ttft:500")
    return name, value / 1000
