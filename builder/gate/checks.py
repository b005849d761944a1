"""The checks of each step of the gate (`builder.gate.accuracy`), from two runs on the same clips.

Values are those of `builder.gate.runs`, one dict per clip.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from builder.gate.limits import OTHER_VIDEO, PLAN_TOLERANCE, SOURCES_TOLERANCE, Gate
from builder.gate.report import Check
from builder.gate.rules import Rule
from builder.gate.runs import Arrays
from earlytom.families import Vision
from earlytom.settings import MethodSettings
from runtime.engine import layout


def compare_counts(rule: Rule, got: list[Arrays], own: list[Arrays], gate: Gate, *, exact: bool) -> list[Check]:
    """Step 2, adaptive schedule: how many frames each merge leaves; with `exact` (fp32) the counts must be equal."""
    layers = [f"{rule.decisions[0]}_{layer}" for layer in rule.layers]
    pairs = [(a[name], b[name]) for a, b in zip(got, own, strict=True) for name in layers]
    difference = max((abs(len(a) - len(b)) for a, b in pairs), default=0)
    frames = max((a.shape[1] for a, _ in pairs), default=1)
    limit = 0.0 if exact else math.ceil((1 - gate.frames) * frames)
    what = "frames that a merge keeps: largest error"
    return [Check.at_most("decisions", what, float(difference), limit)]


def compare_values(
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
        checks.append(Check.at_least(step, f"{name}: cosine", lowest, gate.cosine))
    for name in taps:
        mean = max(_finite(row[name].mean_absdiff, float("inf")) for row in _rows(errors))
        spread = max(float(np.std(np.asarray(it[name], dtype=np.float64))) for it in wanted[0][1])
        limit = gate.error / 5 * spread
        checks.append(Check.at_most("hidden", f"{name}: mean error", mean, limit))
    worst = max(_finite(row[layout.TOKENS].max_absdiff, float("inf")) for row in _rows(errors))
    checks.append(Check.at_most("tokens", "tokens: largest error", worst, tolerance))
    for name, bound in (
        (layout.POSITIONS, 0.0),
        (layout.PLACE, 0.0),
        (layout.SOURCES, SOURCES_TOLERANCE),
    ):
        moved = max(_finite(row[name].max_absdiff, float("inf")) for row in _rows(errors))
        checks.append(Check.at_most("tokens", f"{name}: largest error", moved, bound))
    mean = max(_finite(row[layout.BIAS].mean_absdiff, float("inf")) for row in _rows(errors))
    checks.append(Check.at_most("tokens", f"{layout.BIAS}: mean error", mean, gate.bias))
    return checks


def _rows(result: Any) -> list[Any]:
    return [row for rows in result.values() for row in rows]


def _finite(value: float, otherwise: float) -> float:
    return float(value) if np.isfinite(value) else otherwise


def compare_decisions(rule: Rule, got: list[Arrays], own: list[Arrays], gate: Gate) -> list[Check]:
    """Step 2: the share of the reference's kept frames and tokens that the graph keeps, too."""
    frames, tokens = [], []
    for a, b in zip(got, own, strict=True):
        kept_a, kept_b = set(rule.kept_frames(a)), set(rule.kept_frames(b))
        frames.append(len(kept_a & kept_b) / len(kept_b))
        wanted = rule.kept_tokens(b)
        tokens.append(len(rule.kept_tokens(a) & wanted) / len(wanted))
    of_frames, of_tokens = gate.of_clips(frames), gate.of_clips(tokens)
    return [
        Check.at_least("decisions", "overlap of kept frames", of_frames, gate.frames),
        Check.at_least("decisions", "overlap of kept tokens", of_tokens, gate.tokens),
    ]


def repeat_decisions(rule: Rule, got: list[Arrays], frames: int, vision: Vision) -> list[Check]:
    """Step 2, exactly: the reference's rule on the graph's own values gives the graph's decisions.

    The other steps take the graph's decisions as given, so a wrong but plausible one would pass them.
    """
    worst, places = max([0.0, *(rule.repeat_plans(out, vision) for out in got)]), []
    for out in got:
        positions, repeated = out[layout.POSITIONS], rule.repeat_tokens(out, frames, vision)
        same_count = len(repeated) == len(positions)
        places.append(float(np.mean(repeated.numpy() == positions)) if same_count else 0.0)
    same, least = min(places), rule.same_tokens
    return [
        Check.at_most("decisions", "frame plans repeated: largest difference", worst, rule.same_plans),
        Check.at_least("decisions", "token choices repeated: share that is equal", same, least),
    ]


def compare_videos(rule: Rule, got: list[Arrays], wanted: list[Arrays], batch: int) -> list[Check]:
    """Step 2, several videos at once: are each video's plans computed from its own values?

    A graph that confuses videos decides consistently with the wrong values, and often alike. So each video's error
    against its own reference must be small relative to its error against the other videos' references of the batch.
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
    return [Check.at_most("decisions", what, worst, OTHER_VIDEO)]
