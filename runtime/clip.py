"""Draws a synthetic video clip (`runtime.drawing.clips`), to use where no video is available.

    python -m runtime.clip OUT.mp4 [--seconds 6] [--fps 24] [--size 320x240] [--seed 0]

With `--test-clip N` it writes clip N of the bundled model's test set instead, four times as large, and prints questions
about it with their answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from runtime import cli
from runtime.drawing.clips import draw_clip, write_test_clip

EXAMPLES = """
examples:
  python -m runtime.clip clip.mp4
      three scenes, to try any model on
  python -m runtime.clip engines/demo.mp4 --test-clip 3
      a clip that the bundled model understands, with questions and their right answers

The exit status is 0 when the file is there, 2 when it cannot be written, 130 after Ctrl-C.
"""


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.lower().partition("x")
    if not separator or not width.isdecimal() or not height.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give WIDTHxHEIGHT, as in 320x240")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = cli.Parser(
        prog="python -m runtime.clip",
        description="Draw a video clip of three scenes, or one of the bundled model's world to ask about.",
        epilog=EXAMPLES,
    )
    result.add_argument("out", metavar="OUT.mp4", help="file to write; one that exists is replaced")
    result.add_argument("--seconds", type=float, default=6.0, metavar="S", help="length (default: 6)")
    result.add_argument("--fps", type=int, default=24, metavar="N", help="frames per second (default: 24)")
    result.add_argument("--size", type=_size, default=(240, 320), metavar="WxH", help="even sides (default: 320x240)")
    result.add_argument("--seed", type=int, default=0, metavar="N", help="other seeds draw other clips (default: 0)")
    result.add_argument(
        "--test-clip",
        type=int,
        metavar="N",
        help="write clip N of the bundled model's test set instead, and print its questions with their answers",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    args = parser().parse_args(argv)
    if args.test_clip is not None:
        path, asked = write_test_clip(args.out, args.test_clip)
        print(f"{path}: clip {args.test_clip} of the test set; one can ask, and right is:")
        for question in asked:
            print(f"  {question.text}  {question.answer}")
        return 0
    path = draw_clip(args.out, args.seconds, args.fps, args.size, args.seed)
    print(f"{path}: {args.seconds:g} s, {args.size[1]}x{args.size[0]} at {args.fps} frames per second")
    return 0


if __name__ == "__main__":
    cli.stop_by_signal()
    sys.exit(cli.run(main, sys.argv[1:]))
