"""From answers to figures, also in plain JSON types: accuracy with intervals, cost, and paired comparisons.

Compared on the same clips: all rows with the full tokens, and with those of fewer frames if measured; all rows of
EarlyTom and "cells" with other methods at the same ratio; the two with equal `--budgets`; an engine with its twin in
PyTorch. P-values are not corrected for multiple comparisons; the claim that EarlyTom beats every control needs no
correction, as it has to beat each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.evaluation import statistics
from builder.evaluation.bench import Answers, Setting
from builder.evaluation.engine import ENGINE, TWIN
from builder.evaluation.options import FEWER, FULL
from builder.evaluation.statistics import Estimate
from builder.evaluation.timing import Times
from builder.evaluation.ways.row import Row
from earlytom.micro.data import KINDS

OURS = ("cells", "earlytom")  # groups


@dataclass(frozen=True)
class Result:
    """One setting.

    Attributes:
        name, title, group: of its row; ratio: None if it does not depend on one.
        accuracy: of all questions; relative: as a share of the full tokens' accuracy (None if that is 0).
        kinds: accuracy by kind of question; None for kinds not asked.
        tokens, frames, vision, prefill: means over the clips, see `Answers`.
        times: None if not measured.
    """

    name: str
    title: str
    group: str
    ratio: float | None
    accuracy: Estimate
    relative: Estimate | None
    kinds: dict[str, Estimate | None]
    tokens: float
    frames: float
    vision: float
    prefill: float
    times: Times | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        compression = None if self.times is None else self.times.compression
        return {
            "method": self.name,
            "title": self.title,
            "group": self.group,
            "ratio": self.ratio,
            "tokens": self.tokens,
            "frames": self.frames,
            "vision_flops": self.vision,
            "prefill_flops": self.prefill,
            "vision_ms": None if self.times is None else self.times.vision,
            "prefill_ms": None if self.times is None else self.times.prefill,
            **({} if compression is None else {"compression_ms": compression}),
            "accuracy": _triple(self.accuracy),
            "relative": _triple(self.relative),
            "kinds": {kind: _triple(estimate) for kind, estimate in self.kinds.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """Inverse of `to_dict`."""
        times = values["vision_ms"], values["prefill_ms"]
        return cls(
            name=values["method"],
            title=values["title"],
            group=values["group"],
            ratio=values["ratio"],
            accuracy=Estimate(*values["accuracy"]),
            relative=_estimate(values["relative"]),
            kinds={kind: _estimate(triple) for kind, triple in values["kinds"].items()},
            tokens=values["tokens"],
            frames=values["frames"],
            vision=values["vision_flops"],
            prefill=values["prefill_flops"],
            times=None if None in times else Times(*times, values.get("compression_ms")),
        )


@dataclass(frozen=True)
class Comparison:
    """Accuracy of one setting less that of another (`to`, `to_ratio`) on the same clips; ratios as in `Result`."""

    name: str
    ratio: float | None
    to: str
    to_ratio: float | None
    difference: Estimate
    p: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self) | {"difference": _triple(self.difference)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        """Inverse of `to_dict`."""
        return cls(**(values | {"difference": Estimate(*values["difference"])}))


@dataclass(frozen=True)
class Guess:
    """Accuracy from the questions' texts alone, and by chance, overall and by kind."""

    accuracy: Estimate
    chance: float
    kinds: dict[str, Estimate | None]
    chances: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        kinds = {kind: _triple(estimate) for kind, estimate in self.kinds.items()}
        return {"accuracy": _triple(self.accuracy), "chance": self.chance, "kinds": kinds, "chances": self.chances}


def results(answers: Answers, settings: Sequence[Setting], times: Sequence[Times] | None) -> list[Result]:
    """The figures of every setting."""
    full = answers.correct(_row(settings, FULL, None))
    found = []
    for row, setting in enumerate(settings):
        correct = answers.correct(row)
        found.append(
            Result(
                name=setting.method.name,
                title=setting.method.title,
                group=setting.method.group,
                ratio=setting.ratio,
                accuracy=statistics.accuracy(correct, answers.asked()),
                relative=statistics.relative(correct, full),
                kinds=_by_kind(answers, answers.right[row]),
                tokens=float(answers.tokens[row].mean()),
                frames=float(answers.frames[row].mean()),
                vision=float(answers.vision[row].mean()),
                prefill=float(answers.prefill[row].mean()),
                times=None if times is None else times[row],
            )
        )
    return found


def guess(answers: Answers, right: NDArray[np.bool_]) -> Guess:
    """The figures of answers without the video, `right` [Q] bool."""
    count = np.bincount(answers.kind, minlength=len(KINDS))
    chances = {name: kind.chance for name, kind in KINDS.items()}
    chance = float(count @ np.array(list(chances.values())) / count.sum())
    correct = np.bincount(answers.clip, right, minlength=answers.tokens.shape[1])
    return Guess(statistics.accuracy(correct, answers.asked()), chance, _by_kind(answers, right), chances)


def comparisons(answers: Answers, settings: Sequence[Setting], seed: int) -> list[Comparison]:
    """All comparisons, see the module; `seed`: of the permutation test."""
    pairs = _pairs(settings)
    if not pairs:
        return []
    correct = [answers.correct(row) for row in range(len(settings))]
    gained = np.stack([correct[one] - correct[other] for one, other in pairs], 1)
    p_values = statistics.sign_flip(gained, seed=seed)
    return [
        Comparison(
            settings[one].method.name,
            settings[one].ratio,
            settings[other].method.name,
            settings[other].ratio,
            statistics.difference(correct[one], correct[other], answers.asked()),
            float(p),
        )
        for (one, other), p in zip(pairs, p_values, strict=True)
    ]


def _pairs(settings: Sequence[Setting]) -> list[tuple[int, int]]:
    full = _row(settings, FULL, None)
    pairs = [(row, full) for row in range(len(settings)) if row != full]
    for one, first in enumerate(settings):
        for other, second in enumerate(settings):
            same_ratio = first.ratio is not None and first.ratio == second.ratio
            if same_ratio and _compared((first.method, one), (second.method, other)):
                pairs.append((one, other))
    names = [setting.method.name for setting in settings]
    if FEWER in names:
        fewer = names.index(FEWER)
        pairs += [(row, fewer) for row in range(len(settings)) if row not in (full, fewer)]
    return pairs + ([(names.index(ENGINE), names.index(TWIN))] if ENGINE in names else [])


def _compared(first: tuple[Row, int], second: tuple[Row, int]) -> bool:
    """Whether a row is compared with another; of EarlyTom and "cells" in one order only, "cells" first."""
    (one, mine), (other, theirs) = first, second
    if one.group == other.group == "budgets":  # the same merging, "cells" first
        return (one.name.partition("@")[2], mine < theirs) == (other.name.partition("@")[2], True)
    if one.group not in OURS or other.group == "budgets":
        return False
    return other.group not in OURS or (OURS.index(one.group), mine) < (OURS.index(other.group), theirs)


def _row(settings: Sequence[Setting], name: str, ratio: float | None) -> int:
    return next(row for row, one in enumerate(settings) if (one.method.name, one.ratio) == (name, ratio))


def _by_kind(answers: Answers, right: NDArray[np.bool_]) -> dict[str, Estimate | None]:
    """As a clip has at most one question of a kind, questions are independent here."""
    found: dict[str, Estimate | None] = {}
    for index, name in enumerate(KINDS):
        asked = answers.kind == index
        found[name] = statistics.accuracy(right[asked], np.ones(asked.sum())) if asked.any() else None
    return found


def _triple(estimate: Estimate | None) -> list[float] | None:
    """[value, low, high]."""
    return None if estimate is None else [estimate.value, estimate.low, estimate.high]


def _estimate(triple: list[float] | None) -> Estimate | None:
    """Inverse of `_triple`."""
    return None if triple is None else Estimate(*triple)
