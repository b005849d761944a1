"""The bundled model has not become worse: a slice of the test split, held against its record.

The record is `earlytom/micro/accuracy.json`, the whole table by `python -m builder.evaluate --record`. A slice differs
from the whole by chance, so the test fails only if the upper end of the slice's 95 % interval lies below what is
recorded, by more than a margin for other kernels.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits

from builder.evaluation import record
from builder.evaluation.bench import EvaluationBench, EvaluationJob, run
from builder.evaluation.statistics import Estimate, accuracy
from builder.micro.scoring import Scorer
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from runtime.checkpoint import describe, load_decoder
from runtime.checkpoint.narrow import NarrowLinear

CLIPS = 240
MARGIN = 0.01
NARROW_CLIPS = 24
RECORDED = [("full", None), ("budget", 0.1), ("cells-rounds", 0.1)]

pytestmark = pytest.mark.skipif(
    not describe().trained, reason="the bundled model's weights are not trained (python -m builder.micro.train)"
)


def holds(found: Estimate, recorded: float) -> bool:
    return found.high >= recorded - MARGIN


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return record.read()


def value(recorded: dict[str, Any], name: str, ratio: float | None) -> float:
    (found,) = (one for one in recorded["results"] if (one["method"], one["ratio"]) == (name, ratio))
    share: float = found["accuracy"][0]
    return share


def job(recorded: dict[str, Any]) -> EvaluationJob:
    config, cells = EarlyTomConfig.from_dict(recorded["settings"]), CellsConfig.from_dict(recorded["cells"])
    return EvaluationJob("micro", config, ("budget", "cells-rounds"), (0.1,), cells=cells)


@pytest.mark.usefixtures("one_thread")
def test_accuracy_has_not_dropped(recorded: dict[str, Any]) -> None:
    """In this process, on one core: other tests have the others."""
    bench = EvaluationBench(job(recorded))
    with threadpool_limits(1, "blas"):
        answers = run(bench.job, CLIPS, 1, lambda done: None, bench)
    assert [(one.method.name, one.ratio) for one in bench.settings] == RECORDED
    for row, (name, ratio) in enumerate(RECORDED):
        found = accuracy(answers.correct(row), answers.asked())
        assert holds(found, value(recorded, name, ratio)), (name, found)


@pytest.mark.usefixtures("one_thread")
def test_a_decoder_with_weights_in_int8_answers_alike(recorded: dict[str, Any]) -> None:
    """On few clips; the negative control is one whose weights are those of the next row."""
    bench = EvaluationBench(job(recorded))
    narrow, broken = load_decoder(int8=True), load_decoder(int8=True)
    for linear in broken.get_decoder().modules():
        if isinstance(linear, NarrowLinear):
            linear.weight.data = linear.weight.data.roll(1, 0)
    (setting,) = (one for one in bench.settings if one.method.name == "cells-rounds")
    clips, known = zip(*map(bench.clip, range(NARROW_CLIPS)), strict=True)
    visual = [setting.visual(clip) for clip in clips]
    told = [setting.standing(clip, one) for clip, one in zip(clips, visual, strict=True)]
    packs = [bench.scorer.pack(clip.questions) for clip in known]
    right = [
        [one.right for row in scorer.score([one.tokens for one in visual], packs, told) for one in row]
        for scorer in (bench.scorer, Scorer(narrow, bench.tokenizer), Scorer(broken, bench.tokenizer))
    ]
    asked = len(right[0])
    assert asked > 100
    assert abs(sum(right[0]) - sum(right[1])) <= 0.02 * asked
    assert sum(map(operator.ne, right[0], right[1])) <= 0.03 * asked
    assert sum(right[0]) - sum(right[2]) > 0.2 * asked


def test_a_model_that_sees_nothing_would_be_noticed(recorded: dict[str, Any]) -> None:
    """Negative control, on fewer clips."""
    bench = EvaluationBench(job(recorded))
    questions = [bench.clip(index)[1].questions for index in range(CLIPS // 4)]
    nothing = torch.zeros(400, bench.model.config.text_config.hidden_size)
    outcomes = bench.scorer.score([nothing] * len(questions), [bench.scorer.pack(asked) for asked in questions])
    right = torch.tensor([sum(outcome.right for outcome in row) for row in outcomes])
    found = accuracy(right.numpy(), torch.tensor([len(row) for row in outcomes]).numpy())
    for name, ratio in RECORDED:
        assert not holds(found, value(recorded, name, ratio)), (name, found)
