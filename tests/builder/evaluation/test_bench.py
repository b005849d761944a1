"""What is measured about a few clips, and the figures that are made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builder.evaluation import bench as bench_module
from builder.evaluation import report
from builder.evaluation.bench import Answers, EvaluationBench, EvaluationJob, Setting, run
from builder.evaluation.blind import Blind, questions_of
from builder.evaluation.options import Merging
from builder.evaluation.results import Result, comparisons, results
from builder.evaluation.timing import Prefill
from builder.micro.packing import Standing
from builder.micro.scoring import Scorer
from earlytom import flops
from earlytom.families import LLAVA_ONEVISION
from earlytom.micro.data import KINDS, Question, labelled_clip
from tests.builder.evaluation.test_methods import BASE


@pytest.fixture(scope="module")
def answered() -> tuple[EvaluationBench, Answers]:
    """Three clips in a few settings."""
    bench = EvaluationBench(EvaluationJob("micro", BASE, ("budget", "merging", "adaptive", "frames"), (0.1, 0.5)))
    return bench, bench.measure(range(3))


# Measurement


def test_equal_settings_are_asked_once(
    answered: tuple[EvaluationBench, Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ratio 0.5 the budget schedule keeps every token of its frames."""
    bench, answers = answered
    rows = {(one.method.name, one.ratio): row for row, one in enumerate(bench.settings)}
    assert (answers.right[rows["budget", 0.5]] == answers.right[rows["merging", None]]).all()
    asked: list[int] = []
    real = bench.scorer.score

    def score(visual: Any, packs: Any, standing: Any) -> Any:
        asked.append(len(visual))
        return real(visual, packs, standing)

    monkeypatch.setattr(bench.scorer, "score", score)
    again = bench.measure(range(3))
    assert len(bench.settings) - 2 <= len(asked) < len(bench.settings)
    assert (again.right == answers.right).all()


def test_every_question_is_asked_of_its_clip(answered: tuple[EvaluationBench, Answers]) -> None:
    _, answers = answered
    kinds = [[question.kind for question in labelled_clip("test", index).questions] for index in range(3)]
    assert [list(KINDS)[kind] for kind in answers.kind] == [kind for row in kinds for kind in row]
    assert answers.asked().tolist() == [len(row) for row in kinds]
    assert answers.asked(0).tolist() == [row.count("colour") for row in kinds]
    assert (answers.correct(0) <= answers.asked()).all()


def test_costs_are_those_of_the_shapes(answered: tuple[EvaluationBench, Answers]) -> None:
    bench, answers = answered
    config: Any = bench.checkpoint.config
    rows = {(one.method.name, one.ratio): row for row, one in enumerate(bench.settings)}
    for name, ratio, stages, layers, tokens in (
        ("full", None, (16,), (), 400),
        ("budget", 0.1, (16, 12, 9, 7), (2, 4, 6), 42),
        ("frames", 0.1, (2,), (), 50),
    ):
        row = rows[name, ratio]
        wanted = LLAVA_ONEVISION.vision_flops(config, stages, layers)
        assert answers.vision[row].tolist() == [wanted] * 3
        assert answers.prefill[row].tolist() == [flops.prefill(config.text_config, tokens)] * 3
        assert answers.tokens[row].tolist() == [tokens] * 3
        assert answers.frames[row].tolist() == [stages[-1]] * 3


def test_clips_may_be_spread_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever portions, the answers are the same, in the same order."""
    job = EvaluationJob("micro", BASE, ("random",), (0.1,), "validation", 1)
    whole = EvaluationBench(job).measure(range(5))
    monkeypatch.setattr(bench_module, "CLIPS_AT_ONCE", 2)
    for workers in (1, 2):
        done: list[int] = []
        spread = run(job, 5, workers, done.append)
        assert done == [2, 4, 5]
        for name in Answers.__dataclass_fields__:
            assert np.array_equal(getattr(spread, name), getattr(whole, name)), (workers, name)


def test_the_decoders_first_token_is_the_scorers() -> None:
    """The prefill that is timed is the one that is scored, with what the decoder is told of the tokens; told nothing
    (negative control), some answers begin otherwise."""
    bench = EvaluationBench(EvaluationJob("micro", BASE, ("full", "cells-rounds", "budget-bias"), (0.05,)))
    prefill = Prefill(bench.model, bench.tokenizer)
    differs = 0
    for setting in bench.settings:
        for index in range(3):
            clip, known = bench.clip(index)
            questions = known.questions
            visual = setting.visual(clip)
            told = setting.standing(clip, visual)
            assert (told.bias is None) == (setting.method.name == "full")
            assert (told.place is None) == (setting.method.name != "cells-rounds")
            (outcomes,) = bench.scorer.score([visual.tokens], [bench.scorer.pack(questions)], [told])
            said = [outcome.said[0] for outcome in outcomes]
            assert [prefill(visual.tokens, question.text, told) for question in questions] == said
            untold = [prefill(visual.tokens, question.text) for question in questions]
            assert setting.method.name != "full" or untold == said
            differs += untold != said
    assert differs


def test_what_is_told_is_part_of_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens with and without bias are two settings, and an option overrules what a row is about."""
    words = ("budget", "budget-bias", "cells-rounds")
    asked: list[list[Standing]] = []

    def score(self: Any, visual: Any, packs: Any, standing: list[Standing]) -> Any:
        asked.append(standing)
        return real(self, visual, packs, standing)

    real = Scorer.score
    monkeypatch.setattr(Scorer, "score", score)
    for bias, original, wanted in (
        (None, None, [(False, False), (False, False), (False, True), (True, True)]),
        (True, None, [(False, True), (False, True), (True, True)]),
        (False, True, [(True, False), (True, False), (True, False)]),
    ):
        asked.clear()
        job = EvaluationJob("micro", BASE, words, (0.1,), bias=bias, original=original)
        EvaluationBench(job).measure(range(1))
        assert [(one.place is not None, one.bias is not None) for (one,) in asked] == wanted  # full first
        assert all(one.full == 400 for (one,) in asked)


def test_guessing_without_video() -> None:
    blind = Blind(300, 0)
    learned = [question for index in range(300) for question in questions_of("train", index, 0)]
    share = blind.right(learned).mean()
    assert 0.25 < share < 0.75  # it has seen these
    counts = {answer: sum(q.answer == answer for q in learned if q.text == "What color is the dot?") for answer in "ab"}
    assert not any(counts.values())  # no such colours
    for text in ("What color is the dot?", "How many shapes appeared?"):
        answers = [question.answer for question in learned if question.text == text]
        guessed = blind.answer(Question("dot", text, ""))
        assert answers.count(guessed) == max(map(answers.count, answers))
    assert blind.answer(Question("dot", "never asked?", "")) in {q.answer for q in learned if q.kind == "dot"}
    assert blind.answer(Question("no such kind", "never asked?", "")) == ""


# Figures


def fake(right: list[list[bool]], clips: list[int]) -> Answers:
    """Answers of settings that were right as given, about questions that belong to these clips."""
    rows, total = len(right), max(clips) + 1
    ones = np.ones((rows, total), np.int64)
    kind = np.arange(len(clips)) % len(KINDS)
    nothing = np.zeros(0, np.bool_)
    return Answers(np.array(clips), kind, np.array(right), nothing, ones, ones, ones, ones, np.full(total, 0.5))


def test_figures_and_comparisons(answered: tuple[EvaluationBench, Answers]) -> None:
    settings = [one for one in answered[0].settings if one.ratio in (None, 0.1)]
    names = [one.method.name for one in settings]
    assert names == ["full", "budget", "adaptive", "merging", "frames"]
    clips = [clip for clip in range(40) for _ in range(5)]
    full = [True] * 190 + [False] * 10
    worse = [place % 5 != 0 for place in range(200)]
    answers = fake([full, full, worse, full, worse], clips)
    found = {result.name: result for result in results(answers, settings, None)}
    assert found["full"].accuracy.value == pytest.approx(0.95)
    assert found["budget"].relative is not None
    assert found["budget"].relative.value == 1
    assert found["adaptive"].accuracy.value == pytest.approx(0.8)
    pairs = {(one.name, one.to): one for one in comparisons(answers, settings, 0)}
    assert set(pairs) == {
        *((name, "full") for name in names[1:]),
        ("budget", "adaptive"),
        ("budget", "frames"),
        ("adaptive", "frames"),
    }
    assert (pairs["budget", "full"].difference.value, pairs["budget", "full"].p) == (0, 1)
    assert pairs["budget", "frames"].difference.value == pytest.approx(0.15)
    assert pairs["budget", "frames"].difference.low > 0
    assert pairs["budget", "frames"].p < 0.001
    assert pairs["adaptive", "frames"].p == 1


def test_both_methods_are_compared_with_all_others_and_where_the_frames_are_the_same() -> None:
    merging = Merging((1, 3), (8, 4)), Merging((1, 3), (4, 2))
    words = ("cells-rounds", "cells-greedy", "budget", "top-k", "budgets")
    job = EvaluationJob("micro", BASE, words, (0.1,), budgets=merging)
    settings = [Setting(row, ratio) for row in job.rows(8, 4) for ratio in row.ratios(job.ratios)]
    names = [one.method.name for one in settings]
    right = [[False] * 6 for _ in names]
    pairs = {(one.name, one.to) for one in comparisons(fake(right, [0, 0, 1, 1, 2, 2]), settings, 0)}
    assert pairs == {
        *((name, "full") for name in names if name != "full"),
        ("cells-rounds", "cells-greedy"),
        *((name, other) for name in ("cells-rounds", "cells-greedy") for other in ("budget", "top-k")),
        ("budget", "top-k"),
        ("cells@1,3:8,4", "budget@1,3:8,4"),
        ("cells@1,3:4,2", "budget@1,3:4,2"),
    }


def test_the_ratio_of_the_short_tables() -> None:
    def at(*ratios: float | None) -> list[Result]:
        return [Result("budget", "", "earlytom", ratio, *[None] * 8) for ratio in ratios]  # type: ignore[arg-type]

    assert report.main_ratio(at(0.05, 0.1, 0.5, None)) == 0.1
    assert report.main_ratio(at(0.3, 0.25)) == 0.25
    assert report.main_ratio(at(None)) is None
