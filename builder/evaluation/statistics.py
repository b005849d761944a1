"""Intervals of accuracies and of their differences, with several questions about each clip.

Clips are independent, questions about one clip are not. So everything is computed from two numbers a clip, of questions
asked and of right answers, with the clip as the cluster (cluster-robust variance of a ratio of sums). Two methods are
compared on the same clips, by the differences of their right answers a clip: difficulty shared by both cancels.

Notation: C clips, K comparisons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # 95 %, two-sided
FLIPS = 10_000
_BLOCK = 500  # rows of signs drawn at once

Counts = NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def accuracy(right: Counts, asked: Counts) -> Estimate:
    """Share of right answers, with Wilson's interval for the effective number of independent questions.

    That is the number of questions over the design effect (variance between clips over that of independent questions,
    at least 1); or the number of clips if the effect is unknown, as all answers are right, or all wrong, or there is
    one clip.

    Args:
        right, asked: [C] numbers of questions; clips without questions are left out.
    """
    right, asked = _asked(right, asked)
    clips, questions, share = len(asked), asked.sum(), right.sum() / asked.sum()
    worth = float(clips)
    if clips > 1 and 0 < share < 1:
        independent = share * (1 - share) / questions * clips / (clips - 1)
        worth = questions / max(1.0, _variance(right - share * asked, questions) / independent)
    centre = (share + Z**2 / (2 * worth)) / (1 + Z**2 / worth)
    half = Z / (1 + Z**2 / worth) * math.sqrt(share * (1 - share) / worth + Z**2 / (4 * worth**2))
    # At 0 and 1 the interval includes its value, which rounding may miss.
    return Estimate(
        float(share), float(min(max(0.0, centre - half), share)), float(max(min(1.0, centre + half), share))
    )


def difference(right: Counts, other: Counts, asked: Counts) -> Estimate:
    """Accuracy of one method less that of another on the same clips.

    Args:
        right, other, asked: [C] numbers of questions.
    """
    gained, asked = _asked(np.asarray(right, np.float64) - other, asked)
    value = gained.sum() / asked.sum()
    return _normal(value, _variance(gained - value * asked, asked.sum()))


def relative(right: Counts, other: Counts) -> Estimate | None:
    """Accuracy of one method as a share of another's on the same clips; None if the other was never right.

    Args:
        right, other: [C] numbers of questions.
    """
    right, other = np.asarray(right, np.float64), np.asarray(other, np.float64)
    if not other.sum():
        return None
    value = right.sum() / other.sum()
    return _normal(value, _variance(right - value * other, other.sum()))


def sign_flip(gained: Counts, *, seed: int = 0, flips: int = FLIPS) -> NDArray[np.float64]:
    """Two-sided p-values of "neither method is better", by a paired permutation test.

    Under that hypothesis each clip's difference is as likely to have the other sign. The p-value is the share of random
    sign vectors (including the observed one) with as large an absolute sum of differences, at least 1 / (flips + 1).

    Args:
        gained: [C, K] right answers of one method less those of the other, on each clip.
        seed: of the signs, which are the same for all comparisons.

    Returns:
        [K].
    """
    gained = np.asarray(gained, np.float32)  # whole numbers, exact
    observed = np.abs(gained.sum(0))
    random = np.random.default_rng(seed)
    as_large = np.zeros(gained.shape[1], np.int64)
    for start in range(0, flips, _BLOCK):
        rows = min(_BLOCK, flips - start)
        signs = random.integers(0, 2, (rows, len(gained)), np.int8) * np.float32(2) - 1
        as_large += (np.abs(signs @ gained) >= observed).sum(0)
    return (1 + as_large) / (1 + flips)


def _asked(right: Counts, asked: Counts) -> tuple[Counts, Counts]:
    """Both as float64, without clips that have no question."""
    right, asked = np.asarray(right, np.float64), np.asarray(asked, np.float64)
    if not asked.sum():
        raise ValueError("no question was asked")
    return right[asked > 0], asked[asked > 0]


def _variance(residuals: Counts, total: float) -> float:
    """The variance of a ratio of sums over clips, from the clips' residuals; infinite for one clip."""
    clips = len(residuals)
    return math.inf if clips < 2 else clips / (clips - 1) * float((residuals**2).sum()) / float(total) ** 2


def _normal(value: float, variance: float) -> Estimate:
    """A normal interval, at most +-1, as for one clip, whose variance is unknown."""
    half = min(Z * math.sqrt(variance), 1.0)
    return Estimate(float(value), float(value - half), float(value + half))
