"""The accuracy gate: is the exported graph the model it came from?

Polygraphy runs the graph in ONNX Runtime and the fp32 PyTorch reference on the same real frames. Two of the graph's
steps are discrete choices that half precision may take otherwise without harm, so a plain comparison of outputs would
say little. Hence four steps:

1. hidden:    the hidden states that each decision is taken from (cosine, mean error), with equal decisions before them
2. decisions: the frames and tokens kept, against what the reference keeps on its own (overlap of the two sets)
              and, exactly, that the graph's own values put through the reference's rule give the graph's decisions
3. tokens:    the output, element by element, against the reference with the graph's decisions forced on it; positions
              exactly
4. text:      the decoder's next tokens along the reference's answer (where the decoder is at hand)

Half graphs are run operator by operator: fp32 arithmetic, every result rounded (`builder.precision.rounding`). As they
are, ONNX Runtime leaves out roundings of fp16 on a CPU, and with them the overflows of a GPU, and has no bf16 kernels
at all.

The graph's outputs are compared with what `builder.gate.runners` returns, and every step's limits are those of the
graph's precision in `builder.gate.limits`. Nothing is printed and nothing stays in the folder: the report says what was
measured, and `builder.gate.kept_reference` saves the reference's outputs and makes the command line that repeats step 3
in CI.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from polygraphy.comparator import (
    Comparator,
    CosineSimilarityCompareFunc,
    RunResults,
    SimpleCompareFunc,
)
from polygraphy.logger import G_LOGGER
from torch import Tensor

from builder.export.vision import VisionGraph
from builder.gate.limits import GATES, OTHER_VIDEO, PLAN_TOLERANCE, SOURCES_TOLERANCE, STEPS, Gate
from builder.gate.next_tokens import SeenTokens
from builder.gate.rules import Rule, rule_of
from builder.gate.runners import TorchRunner
from builder.gate.runs import Arrays, run_tapped
from earlytom.errors import UserError
from earlytom.families import Vision
from earlytom.settings import MethodSettings
from earlytom.spans import trace_names
from runtime.engine import layout


@dataclass(frozen=True)
class Check:
    """One line of the report: what was measured, what it was held against, whether that was reached."""

    step: str
    what: str
    value: float
    limit: float
    passed: bool
    frames: int | None = None  # of which frame count, where the engine has several

    def to_dict(self) -> dict[str, Any]:
        values = {"what": self.what, "value": self.value, "limit": self.limit, "passed": self.passed}
        return values if self.frames is None else {"frames": self.frames, **values}


@dataclass(frozen=True)
class Report:
    """The outcome of the gate."""

    checks: tuple[Check, ...]
    clips: tuple[str, ...]
    notes: tuple[str, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, checks grouped by step."""
        steps: dict[str, list[dict[str, Any]]] = {}
        for check in self.checks:
            steps.setdefault(check.step, []).append(check.to_dict())
        return {"passed": self.passed, "clips": list(self.clips), "notes": list(self.notes), "steps": steps}

    def require(self) -> None:
        """Raise UserError with the first failed check, unless all passed."""
        for check in self.checks:
            if not check.passed:
                raise UserError(
                    f"the graph does not reproduce the model: {check.what} is {check.value:.5g}, it must be "
                    f"{'at most' if check.what.endswith(('error', 'difference')) else 'at least'} {check.limit:.5g} "
                    f"(step {check.step}); build with --fp32 to see whether the precision is the cause, and with "
                    "--no-verify to see where it drifts: python -m builder.verify ENGINE --layers"
                )


def joined(reports: Mapping[int, Report]) -> Report | None:
    """The reports of several frame counts as one, whose checks and notes say of which count they are."""
    if not reports:
        return None
    checks = [replace(check, frames=frames) for frames, report in reports.items() for check in report.checks]
    checks.sort(key=lambda check: STEPS.index(check.step))
    notes = [f"{frames} frames: {note}" for frames, report in reports.items() for note in report.notes]
    clips = dict.fromkeys(clip for report in reports.values() for clip in report.clips)
    return Report(tuple(checks), tuple(clips), tuple(notes), max(report.tolerance for report in reports.values()))


def verify(
    onnx_path: Path | Sequence[Path],
    reference: VisionGraph,
    clips: dict[str, Tensor],
    dtype: str,
    *,
    precision: str | None = None,
    batch: int = 1,
    text: Callable[[SeenTokens, SeenTokens], float] | None = None,
    text_with_equal_decisions: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Report, RunResults]:
    """Run the gate.

    Args:
        onnx_path: the exported graph, or those of a chain; a temporary copy with more outputs is written beside it.
        reference: the same vision part in fp32.
        clips: name to uint8 frames [F, 3, H, W]; real frames, never noise (on noise all decisions are near-ties).
        dtype: of the graph.
        precision: which of `builder.gate.limits.GATES` it is held against; default that of its dtype.
        batch: videos that the graph takes at once; `clips` are then those of whole batches
            (`builder.gate.batches.fill`).
        text: given engine tokens and reference tokens [N, E] of a clip, the share of next tokens that agree; None skips
            the step and says so.
        text_with_equal_decisions: compare with the reference under the graph's decisions, not with its own. For
            decoders that are not trained: they are chaotic, and one token of many chosen otherwise changes half of
            the text.
        say: progress, one line at a time.

    Returns:
        The report, and the reference's outputs under the graph's decisions (for `builder.gate.kept_reference`).
    """
    config = reference.config
    feeds = [{layout.FRAMES: frames.numpy()} for frames in clips.values()]
    shape = tuple(next(iter(clips.values())).shape)
    half = dtype != "fp32"
    say(f"running the graph in ONNX Runtime{', every result rounded' if half else ''}")
    got = run_tapped(onnx_path, trace_names(config), feeds, rounded=half, batch=batch)
    outputs = [_arrays(iteration) for iteration in got[0][1]]
    rule = rule_of(config)
    forced = [rule.forced(out) for out in outputs]
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        say("running the PyTorch reference")
        free = Comparator.run(
            [TorchRunner(reference, [rule.own()] * len(feeds), shape, "reference")], data_loader=feeds
        )
        own = [_arrays(iteration) for iteration in free[0][1]]
        if all(rule.same(a, b) for a, b in zip(outputs, own, strict=True)):
            wanted = free
        else:
            say("running the PyTorch reference with the graph's decisions")
            wanted = Comparator.run([TorchRunner(reference, forced, shape, "reference")], data_loader=feeds)

    gate = GATES[precision or dtype]
    scale = float(np.sqrt(np.mean([np.mean(out[layout.TOKENS].astype(np.float64) ** 2) for out in own])))
    if not np.isfinite(scale) or scale == 0:
        raise UserError("the reference's tokens are not finite or all zero: the checkpoint's weights are unusable")
    checks = _compare_values(got, wanted, config, gate, gate.error * scale)
    checks += _compare_decisions(rule, outputs, own, gate)
    if config.schedule == "adaptive":
        checks += _compare_counts(rule, outputs, own, gate, exact=precision in (None, dtype) and not half)
    checks += _repeat_decisions(rule, outputs, shape[0] // reference.tower.step, reference.vision)
    if batch > 1:
        checks += _compare_videos(rule, outputs, [_arrays(iteration) for iteration in wanted[0][1]], batch)
    checks.sort(key=lambda check: STEPS.index(check.step))
    notes = [f"{dtype}: each operator in fp32, each result rounded to {dtype}, as on a GPU"] if half else []
    if text is None:
        notes.append("step text was not run: the decoder was not loaded (--verify-text runs it)")
    else:
        say("comparing the decoder's next tokens")
        against = [_arrays(iteration) for iteration in wanted[0][1]] if text_with_equal_decisions else own
        share = gate.of_clips([text(_seen(out), _seen(ref)) for out, ref in zip(outputs, against, strict=True)])
        checks.append(Check("text", "share of next tokens that agree", share, gate.text, share >= gate.text))
    if dtype == "fp16" and isinstance(onnx_path, Path):
        # Polygraphy's command line will run the graph as it is, which rounds less and may take near-ties otherwise.
        say("running the graph in ONNX Runtime as it is")
        run = run_tapped(onnx_path, trace_names(config), feeds[:batch], rounded=False, batch=batch)
        plain = [_arrays(iteration) for iteration in run[0][1]]
        if not all(rule.same(a, b) for a, b in zip(plain, outputs[:batch], strict=True)):
            say("running the PyTorch reference with those decisions")
            first = TorchRunner(reference, [rule.forced(one) for one in plain], shape, "reference")
            with G_LOGGER.verbosity(G_LOGGER.ERROR):
                again = Comparator.run([first], data_loader=feeds[:batch])
            wanted = RunResults([(wanted[0][0], [*again[0][1], *wanted[0][1][batch:]])])
    return Report(tuple(checks), tuple(clips), tuple(notes), gate.error * scale), wanted


def _seen(out: Arrays) -> SeenTokens:
    tokens, positions, sources = (
        torch.from_numpy(out[name]) for name in (layout.TOKENS, layout.POSITIONS, layout.SOURCES)
    )
    return SeenTokens(tokens.float(), positions, sources)


def _arrays(iteration: Any) -> Arrays:
    return {name: np.asarray(iteration[name]) for name in iteration}


def _compare_counts(rule: Rule, got: list[Arrays], own: list[Arrays], gate: Gate, *, exact: bool) -> list[Check]:
    """Step 2, adaptive schedule: how many frames each merge leaves, where fp32 (`exact`) has no excuse."""
    layers = [f"{rule.decisions[0]}_{layer}" for layer in rule.layers]
    pairs = [(a[name], b[name]) for a, b in zip(got, own, strict=True) for name in layers]
    difference = max((abs(len(a) - len(b)) for a, b in pairs), default=0)
    frames = max((a.shape[1] for a, _ in pairs), default=1)
    limit = 0.0 if exact else math.ceil((1 - gate.frames) * frames)
    what = "frames that a merge keeps: largest error"
    return [Check("decisions", what, float(difference), limit, difference <= limit)]


def _compare_values(
    got: RunResults, wanted: RunResults, config: MethodSettings, gate: Gate, tolerance: float
) -> list[Check]:
    """Steps 1 and 3, with Polygraphy's comparison functions: the worst over the clips of each value."""
    taps = [f"hidden_{layer}" for layer in config.merge_layers]
    both = RunResults(list(got) + list(wanted))
    simple = SimpleCompareFunc(atol=tolerance, rtol=0.0, check_error_stat="max", infinities_compare_equal=False)
    cosine = CosineSimilarityCompareFunc(gate.cosine)
    checks: list[Check] = []
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(divide="ignore", invalid="ignore"):
        errors, cosines = Comparator.compare_accuracy(both, compare_func=[simple, cosine])
    for name in [*taps, layout.TOKENS]:
        step = "tokens" if name == layout.TOKENS else "hidden"
        lowest = min(_finite(row[name].cosine_similarity, -1.0) for row in _rows(cosines))
        checks.append(Check(step, f"{name}: cosine", lowest, gate.cosine, lowest >= gate.cosine))
    for name in taps:
        mean = max(_finite(row[name].mean_absdiff, float("inf")) for row in _rows(errors))
        spread = max(float(np.std(np.asarray(it[name], dtype=np.float64))) for it in wanted[0][1])
        limit = gate.error / 5 * spread
        checks.append(Check("hidden", f"{name}: mean error", mean, limit, mean <= limit))
    worst = max(_finite(row[layout.TOKENS].max_absdiff, float("inf")) for row in _rows(errors))
    checks.append(Check("tokens", "tokens: largest error", worst, tolerance, worst <= tolerance))
    for name, bound in (
        (layout.POSITIONS, 0.0),
        (layout.PLACE, 0.0),
        (layout.SOURCES, SOURCES_TOLERANCE),
    ):
        moved = max(_finite(row[name].max_absdiff, float("inf")) for row in _rows(errors))
        checks.append(Check("tokens", f"{name}: largest error", moved, bound, moved <= bound))
    mean = max(_finite(row[layout.BIAS].mean_absdiff, float("inf")) for row in _rows(errors))
    checks.append(Check("tokens", f"{layout.BIAS}: mean error", mean, gate.bias, mean <= gate.bias))
    return checks


def _rows(result: Any) -> list[Any]:
    return [row for rows in result.values() for row in rows]


def _finite(value: float, otherwise: float) -> float:
    return float(value) if np.isfinite(value) else otherwise


def _compare_decisions(rule: Rule, got: list[Arrays], own: list[Arrays], gate: Gate) -> list[Check]:
    """Step 2: how many of the frames and tokens that the reference keeps does the graph keep."""
    frames, tokens = [], []
    for a, b in zip(got, own, strict=True):
        kept_a, kept_b = set(rule.kept_frames(a)), set(rule.kept_frames(b))
        frames.append(len(kept_a & kept_b) / len(kept_b))
        wanted = rule.kept_tokens(b)
        tokens.append(len(rule.kept_tokens(a) & wanted) / len(wanted))
    of_frames, of_tokens = gate.of_clips(frames), gate.of_clips(tokens)
    return [
        Check("decisions", "overlap of kept frames", of_frames, gate.frames, of_frames >= gate.frames),
        Check("decisions", "overlap of kept tokens", of_tokens, gate.tokens, of_tokens >= gate.tokens),
    ]


def _repeat_decisions(rule: Rule, got: list[Arrays], frames: int, vision: Vision) -> list[Check]:
    """Step 2, exactly: from the graph's own values the reference decides the same.

    The other steps take the graph's decisions as given, and would let pass one that is wrong but plausible.
    """
    worst, places = max([0.0, *(rule.repeat_plans(out, vision) for out in got)]), []
    for out in got:
        positions, repeated = out[layout.POSITIONS], rule.repeat_tokens(out, frames, vision)
        same_count = len(repeated) == len(positions)
        places.append(float(np.mean(repeated.numpy() == positions)) if same_count else 0.0)
    same, least = min(places), rule.same_tokens
    return [
        Check(
            "decisions", "frame plans repeated: largest difference", worst, rule.same_plans, worst <= rule.same_plans
        ),
        Check("decisions", "token choices repeated: share that is equal", same, least, same >= least),
    ]


def _compare_videos(rule: Rule, got: list[Arrays], wanted: list[Arrays], batch: int) -> list[Check]:
    """Step 2, several videos at once: is what each video's plans are made from its own?

    A graph that compares the frames of another video decides rightly from what it sees, and by chance much the same.
    So the error against the reference's values is held against the one against any other video's of its batch.
    """
    worst = 0.0
    for layer in rule.layers:
        name = f"{rule.videos}_{layer}"
        for place, out in enumerate(got):
            first = place - place % batch
            errors = [float(np.abs(out[name] - other[name]).mean()) for other in wanted[first : first + batch]]
            own = errors.pop(place - first)
            worst = max(worst, _finite(own / (min(errors) + PLAN_TOLERANCE), math.inf))
    what = f"{rule.videos_called}, own video over others: error"
    return [Check("decisions", what, worst, OTHER_VIDEO, worst <= OTHER_VIDEO)]
