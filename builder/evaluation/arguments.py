"""The command line of `python -m builder.evaluate`: from arguments to a checked `EvaluationJob`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.evaluation.options import AUTO, CLIPS, MAIN_RATIO, RATIOS
from builder.evaluation.ways.settings import cells_of, merging_of, settings_of
from builder.settings.options import MAX_FRAMES
from earlytom.errors import UserError
from earlytom.micro.data.scene import FRAMES
from earlytom.numbers import whole
from runtime import cli
from runtime.choices import GREEDY, MIN_FRAMES, add_options, flag, method_option, option
from runtime.engine.manifest import Manifest
from runtime.show.figure import require_matplotlib

if TYPE_CHECKING:
    from builder.evaluation.bench import EvaluationJob
    from builder.evaluation.coverage.command import CoverageJob
    from runtime.checkpoint import Checkpoint

EXAMPLES = """
examples:
  python -m builder.evaluate --plot accuracy.png --json accuracy.json
      the whole table of the bundled model: 2,000 clips of the test split
  python -m builder.evaluate --split validation --clips 300 --methods budget controls --ratios 0.1 --tau 0.7
      choose a setting, on clips that the table is not made of
  python -m builder.evaluate --methods cells-rounds budget budgets --ratios 0.05 0.1 --budgets 2,4,6:8,6,4 1,3,5:8,6,4
      both methods with more frames merged, and earlier
  python -m builder.evaluate --frames 32 --methods budgets --budgets 0,3:16,12 --ratios 0.05
      clips twice as long, all frames for the arithmetic of half of them
  python -m builder.evaluate --methods budget --ratios 0.1 --engine auto
      builds an engine of that setting and asks it the same questions, in ONNX Runtime
  python -m builder.evaluate --methods compared cells-rounds budget --ratios 0.1 --clips 100
      the field's methods beside these two, on the same clips
  python -m builder.evaluate --coverage holiday.mp4 street.mp4 --model ORG/NAME --frames 32 --plot coverage.png
      what both methods lose of your own videos, in the features of your own model: no questions, no decoder

methods (--methods takes names and groups):
  reference  full; of clips of more than 16 frames also fewer-frames, all tokens of 16 of them
  earlytom   budget, adaptive, budget-bias (the decoder is told how many tokens each one stands for)
  cells      cells-rounds, cells-greedy (tokens taken one after the other), cells-plain (the decoder is told nothing),
             cells-adaptive (each clip has as many groups of frames as it needs)
  parts      merging, merging-adaptive (all tokens of the merged frames), selection (no frame is merged), diverse
             (merging of budget, selection of cells), selection-diverse (that selection alone)
  layers     budget with other merge layers; at ratio 0.10
  budgets    cells and budget with the merge layers and frames of --budgets; at ratios 0.05 and 0.10
  compared   the field's methods, by the names of earlytom/methods, in their corrected form; at ratios 0.05, 0.1, 0.2:
             holitom, holitom-inner, fastv, visionzip, fastvid, flashvid, unicomp, unified, evs, vidcom2, tome,
             tome-tower, tempme, vqtoken, vqtoken-adaptive, bvllm-style, dycoke, dycoke-least; not among all, as they
             take as long again
  controls   random, frames, top-k, pooling, pooling-space: as many tokens as budget has, chosen otherwise

The exit status is 0 when everything was measured, 2 when something asked for cannot be done, 130 after Ctrl-C.
"""


_METHODS, _ENGINE, _OUTPUT = "the methods' settings", "engine", "work and output"
_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class EvaluationSettings:
    """The checked options by name; None if not given.

    Ratios, methods' settings and budgets are as typed. `json_only`: print only the JSON line.
    """

    model: str | None = option(None, "a model trained on the task (default: the bundled one)", "SOURCE")
    clips: int = option(CLIPS, f"default: {CLIPS}", "N", type=int)
    split: str = option(
        "test",
        "test: the figures to report (default); validation: the clips to choose settings by",
        choices=("test", "validation"),
    )
    frames: int | None = option(
        None,
        f"frames of a clip (default: {FRAMES}; more: it is longer, what is brief in it as brief), or of a video "
        "of --coverage (default: as many as the model is meant for)",
        "N",
        type=int,
    )
    seed: int = option(0, "other clips, other random tokens (default: 0)", "N", type=int)
    methods: tuple[str, ...] = option(("all",), "what to measure (default: all)", "NAME", nargs="+")
    ratios: tuple[float, ...] = option(
        None,
        f"shares of the visual tokens KEPT, in (0, 1] (default: {' '.join(map(str, RATIOS))}; coverage: {MAIN_RATIO})",
        "R",
        nargs="+",
        type=float,
    )
    tau: float | None = method_option(_METHODS)
    merge_layers: str | None = method_option(_METHODS)
    frame_budget: str | None = method_option(_METHODS)
    power: float | None = method_option(_METHODS)
    rounds: str | None = method_option(_METHODS)
    threshold: float | None = method_option(_METHODS)
    budgets: tuple[str, ...] = option(
        (),
        "merge layers and frames (counts, or a share) to measure both methods with, too",
        "L,L:N,N",
        group=_METHODS,
        nargs="+",
    )
    bias: bool | None = option(
        None,
        "tell the decoder of every method how many tokens each one stands for (default: as the method is meant)",
        group=_METHODS,
        action=argparse.BooleanOptionalAction,
    )
    positions: str | None = option(
        None,
        "where the decoder of every method takes tokens to be (default: as the method is meant)",
        group=_METHODS,
        choices=("original", "consecutive"),
    )
    faithful: bool = option(
        False,
        "the field's methods in their released form, quirks included, instead of the corrected one: never both in "
        "one table, and never in a record",
        group=_METHODS,
        action="store_true",
    )
    coverage: tuple[Path, ...] = option(
        (),
        "measure how well the tokens that are kept of these videos stand for all of them, instead of the task",
        "VIDEO",
        group="coverage of your own videos",
        nargs="+",
        type=Path,
    )
    engine: str | None = option(
        None,
        "measure this engine folder too, in ONNX Runtime, and compare its answers with PyTorch's at its setting; "
        f"{AUTO} builds one in fp16 at the ratio nearest to {MAIN_RATIO}, or finds it built",
        "DIR|auto",
        group=_ENGINE,
    )
    engines: Path = option(Path("engines"), f"where {AUTO} builds (default: engines/)", "DIR", group=_ENGINE, type=Path)
    workers: int = option(_CORES, f"processes (default: one a core, here {_CORES})", "N", group=_OUTPUT, type=int)
    timed_clips: int = option(8, "clips to measure times on, 0 for none (default: 8)", "N", group=_OUTPUT, type=int)
    text_clips: int = option(
        20_000,
        "training clips to learn guessing without video from, 0 leaves that row out (default: 20000)",
        "N",
        group=_OUTPUT,
        type=int,
    )
    only_times: bool = option(
        False,
        "ask no questions, and measure times alone: with --record they become the record's, all of one run",
        group=_OUTPUT,
        action="store_true",
    )
    table: Path | None = option(
        None,
        "write the field's methods beside ours and the controls: accuracy, costs, times, what papers claim; with "
        "--record that of the whole record",
        "FILE.md",
        group=_OUTPUT,
        type=Path,
    )
    table_plot: Path | None = option(
        None, "draw that table: accuracy against time to the first token", "FILE.png", group=_OUTPUT, type=Path
    )
    plot: Path | None = option(None, "draw accuracy against tokens, or coverage", "FILE.png", group=_OUTPUT, type=Path)
    json: Path | None = option(
        None,
        "with FILE: write every figure there; alone: print nothing but the JSON line at the end",
        "FILE",
        group=_OUTPUT,
        nargs="?",
        const="-",
    )
    record: bool = option(
        False,
        "make this the bundled model's record, which the tests hold it to; a part of the table is put into it",
        group=_OUTPUT,
        action="store_true",
    )
    json_only: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the whole default table is measured."""
        return set(self.methods) == {"all"} and set(RATIOS) <= set(self.ratios)


def read(argv: Sequence[str] | None) -> EvaluationSettings:
    """Parse, with all checks that need no model, as loading one takes seconds."""
    given = vars(parser().parse_args(argv))
    json = given.pop("json")
    given["ratios"] = given["ratios"] or ((MAIN_RATIO,) if given["coverage"] else RATIOS)
    given |= {name: tuple(given[name]) for name in ("methods", "ratios", "budgets", "coverage")}
    found = EvaluationSettings(**given, json=None if json in (None, "-") else Path(json), json_only=json == "-")
    check(found)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(
        prog="python -m builder.evaluate",
        description="Ask the bundled task's questions about video clips with full, compressed and otherwise reduced "
        "visual tokens, and show accuracy with 95 % intervals beside what each way costs.",
        epilog=EXAMPLES,
    )
    add_options(p, EvaluationSettings)
    return p


def check(asked: EvaluationSettings) -> None:
    """All checks that need no model."""
    for name, least in (("clips", 1), ("workers", 1), ("timed_clips", 0), ("text_clips", 0), ("seed", 0)):
        if (value := getattr(asked, name)) < least:
            raise UserError(f"{flag(name)} must be at least {least}, got {value}")
    for ratio in asked.ratios:
        if not 0 < ratio <= 1:
            raise UserError(f"--ratios must be in (0, 1], got {ratio}")
    if asked.coverage:
        check_coverage(asked)
    elif asked.frames is not None:
        whole("--frames", asked.frames, FRAMES, MAX_FRAMES)
        if asked.frames > FRAMES and (asked.engine is not None or asked.record):
            raise UserError(f"--frames {asked.frames} goes without --engine and --record: both are of {FRAMES} frames")
    if asked.rounds == GREEDY:
        raise UserError("--rounds greedy is a way of its own: leave it out, and measure cells-greedy (--methods)")
    cells_of(asked, settings_of(asked, None, asked.frames))
    for words in asked.budgets:
        merging_of(words, asked.frames)
    if asked.only_times and (not asked.timed_clips or asked.engine is not None):
        raise UserError("--only-times needs clips to measure on (--timed-clips), and no --engine")
    if (asked.table or asked.table_plot) and asked.only_times and not asked.record:
        raise UserError("--table and --table-plot need accuracies: leave out --only-times, or give --record")
    for path in (asked.plot, asked.table, asked.table_plot, asked.json):
        # a device or a pipe would be replaced by the finished file, even /dev/null by root
        if path is not None and ((path.exists() and not path.is_file()) or not path.parent.is_dir()):
            there = "it is a folder" if path.is_dir() else "it is a device or a pipe"
            what = there if path.exists() else "its folder does not exist"
            raise UserError(f"cannot write {path}: {what}; give the path of a file")
    if asked.plot is not None or asked.table_plot is not None:
        require_matplotlib()
    if asked.engine not in (None, AUTO):
        Manifest.read(Path(asked.engine), verify_files=False)


def check_coverage(asked: EvaluationSettings) -> None:
    """Raise UserError for a missing file, or an option that coverage does not use."""
    for video in asked.coverage:
        if not video.is_file():
            raise UserError(f"--coverage {video}: no such file; give video files")
    if asked.frames is not None:
        whole("--frames", asked.frames, MIN_FRAMES)
    if asked.engine is not None or asked.record or asked.budgets or asked.only_times or asked.table or asked.table_plot:
        raise UserError(
            "--coverage goes without --engine, --record, --budgets, --only-times and --table: it asks no questions"
        )


def coverage_job(asked: EvaluationSettings, checkpoint: Checkpoint) -> CoverageJob:
    """The coverage job for a checkpoint."""
    from builder.evaluation.coverage.command import CoverageJob
    from earlytom.families import geometry

    frames = asked.frames or checkpoint.frames
    shown = geometry(checkpoint.config)
    config = settings_of(asked, shown.depth, frames, shown.full)
    return CoverageJob(
        asked.coverage, frames, config, cells_of(asked, config), tuple(sorted(set(asked.ratios))), asked.plot
    )


def checked(asked: EvaluationSettings, checkpoint: Checkpoint) -> EvaluationJob:
    """The accuracy job for a checkpoint, checked against it."""
    from builder.evaluation import record
    from builder.evaluation.bench import EvaluationJob
    from earlytom.families import geometry

    model: Any = checkpoint.config
    depth = geometry(model).depth
    config = settings_of(asked, depth, asked.frames)
    job = EvaluationJob(
        checkpoint.source,
        config,
        asked.methods,
        tuple(sorted(set(asked.ratios))),
        asked.split,
        asked.seed,
        cells=cells_of(asked, config),
        budgets=tuple(dict.fromkeys(merging_of(words, asked.frames) for words in asked.budgets)),
        bias=asked.bias,
        faithful=asked.faithful,
        original=None if asked.positions is None else asked.positions == "original",
        frames=asked.frames or FRAMES,
    )
    job.rows(depth, model.text_config.num_hidden_layers)
    if asked.record:
        record.check_recordable(
            checkpoint,
            split=asked.split,
            seed=asked.seed,
            clips=asked.clips,
            whole=asked.is_whole,
            overruled=(asked.bias, asked.positions, asked.faithful) != (None, None, False),
        )
    return job
