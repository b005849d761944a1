"""Measure what EarlyTom buys: `python -m runtime.bench`.

One process, one set of weights, one question about one video. The variants (`runtime.measure.variants`) take turns
request by request, after a warm-up that is not counted. Then, each apart: peak memory, throughput with several clients,
scaling over frames and over the retention ratio, the cost of the compression itself. Answers have a fixed length, so
that all variants decode equally many tokens. Ends with one JSON line.

Two more measure an engine through the `Pipeline`: `--service` what a service sees of it, watched and live videos and
many callers included (`runtime.measure.service`), `--soak N` its memory over N requests (`runtime.measure.soak`).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from earlytom.errors import UserError
from runtime import cli
from runtime.drawing.clips import draw_clip
from runtime.measure import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    asked = arguments.read(argv)
    import torch

    from runtime.measure import comparison, plot, report, service, soak

    screen = cli.Screen(json_only=asked.json)
    with _threads(asked.threads), tempfile.TemporaryDirectory() as folder:
        video = asked.video or draw_clip(Path(folder) / "drawn.mp4")
        try:
            if asked.soak is not None:
                screen.result(soak.measure(asked, video, screen))
                return 0
            if asked.service:
                screen.result(service.measure(asked, video, screen))
                return 0
            record = comparison.measure(asked, video, screen)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the GPU's memory is used up: lower --frames or --scale-frames, or measure fewer --variants at once"
            ) from error
    report.show(screen, record)
    if asked.plot is not None:
        for path in plot.draw(record, asked.plot):
            screen.line(f"plot: {path}")
    screen.result(record)
    return 0


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch on so many threads; as before at the end."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
