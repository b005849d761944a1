"""A whole measurement.

The stages, in the order of `measure`: build or open an engine, if asked for; ask the questions about every clip in
every setting; measure times; show and save the results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from builder.evaluation import plot, record, report
from builder.evaluation.arguments import EvaluationSettings, checked, coverage_job
from builder.evaluation.bench import Answers, EvaluationBench, EvaluationJob, run, task_checkpoint
from builder.evaluation.blind import Blind, questions_of
from builder.evaluation.coverage.command import cover
from builder.evaluation.engine import ENGINE, built_engine, check_engine
from builder.evaluation.methods import ADAPTIVE, BUDGET, CELLS
from builder.evaluation.options import AUTO, FULL, MAIN_RATIO
from builder.evaluation.results import Comparison, Guess, Result, comparisons, guess, results
from builder.evaluation.timing import Times, measure_times
from builder.evaluation.ways import field
from builder.evaluation.ways.picture import draw_field
from builder.gate.limits import GATES
from builder.micro.card import write_card
from runtime.checkpoint import MICRO, Checkpoint, describe
from runtime.engine.manifest import Manifest
from runtime.files.partial import partial
from runtime.trace import Trace

AIM = 0.96  # of the full tokens' accuracy at ratio 0.1: the paper's figure on its benchmarks


def measure(asked: EvaluationSettings, trace: Trace) -> dict[str, Any]:
    """Run the measurement; returns the record of the JSON line."""
    started = time.monotonic()
    checkpoint = task_checkpoint(asked.model)
    job = checked(asked, checkpoint)
    if not checkpoint.trained:
        trace.line("note: its weights are not trained, so every accuracy is that of nonsense; costs are real")
    manifest = None
    if asked.engine is not None:
        folder = engine_folder(asked.engine, asked.engines, job, trace)
        manifest = check_engine(folder, checkpoint)
        job = replace(job, engine=str(folder))
    bench = EvaluationBench(job)
    if asked.only_times:
        return measure_only_times(asked, bench, trace)
    settings = bench.settings
    many = "" if len(settings) == 1 else "s"
    trace.line(
        f"{asked.clips} clips of the {job.split} split, {len(settings)} setting{many}, {asked.workers} "
        f"process{'es' if asked.workers > 1 else ''}"
    )
    with progress(trace, "answers", asked.clips, bar=not asked.json_only) as advance:
        answers = run(job, asked.clips, asked.workers, advance, bench)
    times = timed(asked, bench, trace) if asked.timed_clips else None
    found, pairs = results(answers, settings, times), comparisons(answers, settings, job.seed)
    blind = without_video(answers, job, asked.clips, asked.text_clips) if asked.text_clips else None
    report.show_settings(trace, found, blind)
    trace.line(f"{report.percent(answers.objects.mean())} % of the full tokens show an object")
    report.show_comparisons(trace, found, pairs)
    report.show_field(trace, found, pairs)
    report.show_budgets(trace, found, pairs)
    report.show_kinds(trace, found, blind)
    engine = None if manifest is None else engine_record(manifest, answers, pairs, trace)
    whole = full_record(asked, checkpoint, job, answers, found, pairs, blind, engine)
    whole["seconds"] = time.monotonic() - started
    save(asked, whole, found, trace)
    return summary(whole, found)


def timed(asked: EvaluationSettings, bench: EvaluationBench, trace: Trace) -> list[Times]:
    """The times of every setting."""
    with progress(trace, "times", asked.timed_clips, bar=not asked.json_only) as advance:
        return measure_times(bench, range(asked.timed_clips), advance)


def measure_only_times(asked: EvaluationSettings, bench: EvaluationBench, trace: Trace) -> dict[str, Any]:
    """Times without answers; with --record they replace the record's."""
    rows = field.timed_rows([(one.method.name, one.ratio) for one in bench.settings], timed(asked, bench, trace))
    measured = {"clips": asked.timed_clips, "threads": torch.get_num_threads(), "rows": rows}
    report.show_times(trace, rows)
    if asked.json is not None:
        record.write(asked.json, {"times": measured})
    if asked.record:
        whole = record.read() | {"times": measured}
        record.write(record.PATH, whole)
        trace.line(f"record: {record.PATH}")
        save_field(asked, whole, trace)
    return {"times": measured}


def measure_coverage(asked: EvaluationSettings, trace: Trace) -> dict[str, Any]:
    """Coverage of the given videos; returns the record of the JSON line."""
    checkpoint = describe(asked.model)
    found = cover(coverage_job(asked, checkpoint), checkpoint, trace)
    if asked.json is not None:
        record.write(asked.json, found)
        trace.line(f"figures: {asked.json}")
    return found


def engine_folder(engine: str, engines: Path, job: EvaluationJob, trace: Trace) -> Path:
    """The folder `engine`; for `AUTO` one built, or found, under `engines`."""
    if engine != AUTO:
        return Path(engine)
    ratio = min(job.ratios, key=lambda ratio: abs(ratio - MAIN_RATIO))
    trace.line(f"engine: budget {ratio:g} in fp16 by python -m builder.build, about half a minute if it is new")
    folder = built_engine(job.source, job.config, ratio, engines)
    trace.line(f"engine: {folder}")
    return folder


@contextmanager
def progress(trace: Trace, what: str, total: int, *, bar: bool) -> Iterator[Callable[[int], None]]:
    """Shows a stage's progress: a bar if wanted and on a terminal, else a line every half minute."""
    started = shown = time.monotonic()
    if bar and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
            task = drawn.add_task(what, total=total)
            yield lambda done: drawn.update(task, completed=done)
    else:

        def line(done: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now >= shown + 30:
                shown = now
                left = (now - started) / done * (total - done)
                trace.line(f"  {what}: {done} of {total} clips, about {left / 60:.1f} min left")

        yield line
    trace.line(f"{what}: {total} clips in {time.monotonic() - started:.1f} s")


def without_video(answers: Answers, job: EvaluationJob, clips: int, text_clips: int) -> Guess:
    """The baseline without video on the same clips."""
    asked = [question for index in range(clips) for question in questions_of(job.split, index, job.seed, job.frames)]
    return guess(answers, Blind(text_clips, job.seed).right(asked))


def engine_record(manifest: Manifest, answers: Answers, pairs: Sequence[Comparison], trace: Trace) -> dict[str, Any]:
    """How the engine's answers compare with its twin's, also printed."""
    different, asked = int((~answers.same).sum()), len(answers.same)
    limit = GATES[manifest.precision].text
    paired = next(pair for pair in pairs if pair.name == ENGINE and pair.to != FULL)
    within = 1 - different / asked >= limit
    trace.line(
        f"engine {manifest.name}: {different} of {asked} questions answered differently than in PyTorch "
        f"({1 - different / asked:.2%} alike; the gate for {manifest.precision} asks for {limit:.0%}: "
        f"{'passed' if within else 'FAILED'}); accuracy {report.points(paired.difference)} points, p = {paired.p:.3f}"
    )
    return {
        "name": manifest.name,
        "dtype": manifest.dtype,
        "questions": asked,
        "answered_differently": different,
        "limit": limit,
        "within_gate": within,
        "difference": paired.to_dict()["difference"],
        "p": paired.p,
    }


def full_record(
    asked: EvaluationSettings,
    checkpoint: Checkpoint,
    job: EvaluationJob,
    answers: Answers,
    found: Sequence[Result],
    pairs: Sequence[Comparison],
    blind: Guess | None,
    engine: dict[str, Any] | None,
) -> dict[str, Any]:
    """All figures, in plain JSON types."""
    return {
        "model": checkpoint.source,
        "trained": checkpoint.trained,
        "weights": record.weights_digest() if checkpoint.source == MICRO else None,
        "split": job.split,
        "seed": job.seed,
        "clips": asked.clips,
        "frames": job.frames,
        "questions": len(answers.clip),
        "object_tokens": float(answers.objects.mean()),
        "settings": job.config.to_dict(),
        "cells": None if job.cells is None else job.cells.to_dict(),
        "told": {"bias": asked.bias, "positions": asked.positions},
        "faithful": asked.faithful,
        "ratios": list(job.ratios),
        "torch": torch.__version__,
        "no_video": None if blind is None else blind.to_dict(),
        "results": [result.to_dict() for result in found],
        "comparisons": [pair.to_dict() for pair in pairs],
        "engine": engine,
    }


def save(asked: EvaluationSettings, whole: dict[str, Any], found: Sequence[Result], trace: Trace) -> None:
    """Write the files asked for. With --record of a part, the plot is of the merged record."""
    if asked.json is not None:
        record.write(asked.json, whole)
        trace.line(f"figures: {asked.json}")
    if asked.record:
        if not asked.is_whole:
            whole = record.joined(record.read(), whole)
            found = [Result.from_dict(row) for row in whole["results"]]
        record.write(record.PATH, whole)
        write_card(record.PATH.parent)
        trace.line(f"record: {record.PATH}, and the model card beside it")
    save_field(asked, whole, trace)
    if asked.plot is not None:
        guessed = whole["no_video"]
        chance = None if guessed is None else guessed["accuracy"][0]
        plot.draw(found, asked.plot, caption=caption(whole), chance=chance)
        trace.line(f"plot: {asked.plot}")


def save_field(asked: EvaluationSettings, whole: dict[str, Any], trace: Trace) -> None:
    """Write the table of published methods and its plot, of a run or a record, if asked for."""
    found = [Result.from_dict(row) for row in whole["results"]]
    if "times" in whole:
        found = field.with_times(found, whole["times"]["rows"])
    if asked.table is not None:
        pairs = [Comparison.from_dict(row) for row in whole["comparisons"]]
        with partial(asked.table) as staging:
            staging.write_text(field.field_table(found, pairs), encoding="utf-8")
        trace.line(f"table: {asked.table}")
    if asked.table_plot is not None:
        draw_field(found, asked.table_plot, caption=caption(whole))
        trace.line(f"plot: {asked.table_plot}")


def caption(whole: dict[str, Any]) -> str:
    return f"{whole['questions']:,} questions about {whole['clips']:,} clips, 95 % intervals"


def summary(whole: dict[str, Any], found: Sequence[Result]) -> dict[str, Any]:
    """The JSON line: the run, and the figures at the main ratio."""
    ratio = report.main_ratio(found)
    shown = {
        "full": report.find(found, FULL, None),
        "budget": report.find(found, BUDGET, ratio),
        "adaptive": report.find(found, ADAPTIVE, ratio),
        "cells": report.find(found, CELLS, ratio),
        "best_control": report.best_control(found, ratio),
    }
    names = ("method", "tokens", "accuracy", "relative")
    figures = {key: {name: result.to_dict()[name] for name in names} for key, result in shown.items() if result}
    shares = {key: result.relative.value for key, result in shown.items() if result and result.relative}
    reached = {key: shares[key] >= AIM for key in ("budget", "adaptive", "cells") if key in shares}
    keys = ("model", "trained", "split", "seed", "clips", "questions", "engine", "seconds")
    return {key: whole[key] for key in keys} | {"ratio": ratio, "aim": AIM, "aim_reached": reached} | figures
