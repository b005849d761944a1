"""Measure what EarlyTom buys: `python -m runtime.bench`.

One process, one set of weights, one question about one video. The variants (`runtime.measure.variants`) take turns
request by request, after a warm-up that is not counted. Then, each apart: peak memory, throughput with several clients,
scaling over frames and over the retention ratio, the cost of the compression itself. Answers have a fixed length, so
that all variants decode equally many tokens. Ends with one JSON line.

`--vision-only` times the vision parts of engines, without a decoder (`runtime.measure.vision.alone`).
Two more measure an engine through the `Pipeline`: `--service` what a service sees of it, watched and live videos and
many callers included (`runtime.measure.service`), `--soak N` its memory over N requests (`runtime.measure.soak`). With
`--serve URL` a server that runs is measured from outside (`runtime.measure.serving`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlytom.errors import UserError
from runtime import cli
from runtime.drawing.clips import draw_clip
from runtime.engine.folder import ENGINES, newest_engine
from runtime.measure import arguments
from runtime.measure.serving import arguments as serving

if TYPE_CHECKING:
    from runtime.measure.serving.plan import LoadPlan


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; every failure is raised (see `runtime.cli.run`)."""
    options = arguments.parsed(argv)
    if options.serve is not None:
        measure_server(options, cli.Screen(json_only=options.json))
        return 0
    asked = arguments.settings_of(options)
    import torch

    from runtime.measure import comparison, plot, report, service, soak
    from runtime.measure.vision import alone as vision_alone

    screen = cli.Screen(json_only=asked.json)
    with _threads(asked.threads), tempfile.TemporaryDirectory() as folder:
        video = asked.video or draw_clip(Path(folder) / "drawn.mp4")
        try:
            if asked.soak is not None:
                screen.result(soak.measure(asked, video, screen))
                return 0
            if asked.vision_only:
                found = vision_alone.measure(asked, video, screen)
                vision_alone.show(screen, found)
                screen.result(found)
                return 0
            if asked.service:
                screen.result(service.measure(asked, video, screen))
                return 0
            record = comparison.measure(comparison.prepare(asked, screen), video, screen)
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


def measure_server(options: argparse.Namespace, screen: cli.Screen) -> None:
    """What `--serve` does, with and without `--soak` and `--added`."""
    from runtime.measure.serving import plan, plot, report

    asked = plan.LoadPlan(
        url=options.serve,
        key=serving.key_of(options),
        videos=serving.videos_of(options),
        question=options.question,
        rates=options.request_rate,
        burstiness=options.burstiness,
        requests=options.requests,
        seconds=options.seconds,
        most=options.max_concurrency,
        repeated=options.repeat,
        objectives=dict(options.goodput or ()),
        max_tokens=options.max_new_tokens,
        soak=options.soak,
        clients=options.soak_clients,
        pid=options.pid,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.added:
            record = _added(options, asked, Path(folder))
        else:
            record = plan.measure(asked, Path(folder), screen.line)
    tables = (
        report.added_tables if options.added else report.load_tables if options.soak is None else report.soak_tables
    )
    for table in tables(record):
        screen.table(*table)
    if options.soak is not None:
        screen.line(report.soak_line(record))
    if options.plot is not None:
        for path in plot.draw(record, options.plot):
            screen.line(f"plot: {path}")
    screen.result(record)


def _added(options: argparse.Namespace, asked: LoadPlan, folder: Path) -> dict[str, Any]:
    arguments.place(options)
    from runtime.engine.dtypes import DTYPES
    from runtime.measure.serving import plan
    from runtime.measure.serving.added import added
    from runtime.pipeline import Pipeline

    engine = options.engine[0] if options.engine else newest_engine(ENGINES)
    pair = plan.questions(asked, folder)[0]
    how: dict[str, Any] = {
        "device": options.device,
        "dtype": DTYPES.get(options.dtype),
        "decoder_dtype": options.decoder_dtype,
    }
    with Pipeline.load(engine, options.model, **how) as pipeline:
        record = plan.machine("before") | added(
            pipeline,
            asked.url,
            asked.key,
            pair,
            folder,
            warmup=options.warmup,
            repeats=options.repeats,
            max_tokens=asked.max_tokens,
        )
    return record | {"engine": pipeline.manifest.name} | plan.machine("after")


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
    cli.stop_by_signal()
    sys.exit(cli.run(main, sys.argv[1:]))
