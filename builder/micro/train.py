"""Train the bundled model: `python -m builder.micro.train [--out DIR]`. The stages are in `builder.micro.course`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from earlytom.errors import UserError
from earlytom.micro import PATH

if TYPE_CHECKING:
    import torch

EXAMPLES = """
examples:
  python -m builder.micro.train --scale 0.001 --out /tmp/micro
      see that every stage runs
  python -m builder.micro.train --out mine
      the whole training; after Ctrl-C the same command goes on where it stopped

The last line is JSON. The exit status is 0 when the checkpoint is there, 2 when something asked for cannot be done, 130
after Ctrl-C.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the options)")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="python -m builder.micro.train",
        description="Train the bundled model from nothing: its vision tower first, then the answers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=PATH,
        metavar="DIR",
        help="folder to write the checkpoint to (default: the bundled model's own, which it replaces)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("micro-training"),
        metavar="DIR",
        help="folder of the stages' states, to resume from (default: micro-training)",
    )
    parser.add_argument(
        "--device",
        help="cpu or cuda (default: the GPU if there is one)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="PART",
        help="part of every stage's steps to run, in (0, 1]; below 1 with --out (default: 1)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that draw clips (default: 1)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Check the arguments."""
    if not 0 < args.scale <= 1:
        raise UserError(f"--scale must be above 0 and at most 1, got {args.scale}")
    if args.scale < 1 and args.out.resolve() == PATH:
        raise UserError("--scale below 1 does not replace the bundled weights; give another folder with --out")
    if args.workers < 0:
        raise UserError(f"--workers must be 0 or more, got {args.workers}")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device to train on, checked."""
    import torch

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used here; use --device cpu") from error
    return device


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    try:
        args = parser().parse_args(argv)
        check(args)
        device = device_of(args)
        from builder.micro.card import write_card
        from builder.micro.course import Display, train
        from earlytom.micro.checkpoint import write_checkpoint

        args.work.mkdir(parents=True, exist_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)
        display = Display()
        with display.progress:
            model, about = train(args.work, device, args.scale, args.workers, display)
        write_checkpoint(args.out, model, about, trained=args.scale == 1)
        write_card(args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or args.work
        print(f"error: {where}: {error.strerror}; choose other folders with --out and --work", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {args.work}", file=sys.stderr)
        return 130
    print(json.dumps({"checkpoint": str(args.out), **about}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
