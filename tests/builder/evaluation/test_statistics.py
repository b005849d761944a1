"""Intervals and p-values: known values, exact enumeration, simulated clips whose questions stand or fall together."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.evaluation.statistics import Estimate, accuracy, difference, relative, sign_flip

counts = st.lists(
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=60
)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_for_independent_questions(right: int, asked: int, low: float, high: float) -> None:
    found = accuracy(np.arange(asked) < right, np.ones(asked))
    assert found.value == pytest.approx(right / asked)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_questions_that_repeat_one_another_count_once() -> None:
    """Ten questions a clip that are all right or all wrong tell as much as one."""
    clips = np.arange(100) < 80
    once, tenfold = accuracy(clips, np.ones(100)), accuracy(10 * clips, np.full(100, 10))
    assert (tenfold.low, tenfold.high) == (pytest.approx(once.low), pytest.approx(once.high))
    independent = accuracy(np.arange(1000) < 800, np.ones(1000))  # negative control
    assert independent.high - independent.low < 0.5 * (tenfold.high - tenfold.low)


@given(counts)
def test_an_interval_holds_its_value(pairs: list[tuple[int, int]]) -> None:
    right, asked = (np.array(column) for column in zip(*pairs, strict=True))
    found = accuracy(right, asked)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.value == pytest.approx(right.sum() / asked.sum())
    assert found.low < found.high
    mirrored = accuracy(asked - right, asked)
    assert (1 - mirrored.high, 1 - mirrored.low) == (pytest.approx(found.low), pytest.approx(found.high))


@given(counts, st.randoms(use_true_random=False))
def test_a_difference_is_antisymmetric(pairs: list[tuple[int, int]], random: object) -> None:
    right, asked = (np.array(column) for column in zip(*pairs, strict=True))
    other = np.array([random.randint(0, n) for n in asked])  # type: ignore[attr-defined]
    one, two = difference(right, other, asked), difference(other, right, asked)
    assert one.value == pytest.approx(-two.value)
    assert (one.low, one.high) == (pytest.approx(-two.high), pytest.approx(-two.low))
    assert difference(right, right, asked).value == 0


def test_clips_without_questions_do_not_matter() -> None:
    right, asked = np.array([1, 0, 2, 0, 3]), np.array([2, 0, 3, 1, 3])
    assert accuracy(right, asked) == accuracy(right[asked > 0], asked[asked > 0])
    assert difference(right, 0 * right, asked) == difference(right[asked > 0], 0 * right[asked > 0], asked[asked > 0])
    with pytest.raises(ValueError, match="no question"):
        accuracy(np.zeros(3), np.zeros(3))


def test_one_clip_says_next_to_nothing() -> None:
    assert accuracy(np.array([5]), np.array([9])).high - accuracy(np.array([5]), np.array([9])).low > 0.7
    found = difference(np.array([5]), np.array([4]), np.array([9]))
    assert found.low < 0 < found.high


def test_a_share_of_another_accuracy() -> None:
    right, other = np.array([3.0, 1.0, 2.0]), np.array([4.0, 2.0, 2.0])
    assert relative(right, right) == Estimate(1.0, 1.0, 1.0)
    found = relative(right, other)
    assert found is not None
    assert found.value == pytest.approx(6 / 8)
    assert found.low < 0.75 < found.high
    assert relative(right, 0 * other) is None


def clustered(random: np.random.Generator, clips: int, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """How many questions are asked of each clip, and how many answered right; some clips are harder than others."""
    ease = random.beta(2 * mean, 2 * (1 - mean), clips)
    asked = random.integers(3, 13, clips)
    return asked, random.binomial(asked, ease)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    runs, hits, naive = 400, 0, 0
    for _ in range(runs):
        asked, right = clustered(random, 150, 0.85)
        found = accuracy(right, asked)
        hits += found.low <= 0.85 <= found.high
        alone = accuracy(np.arange(asked.sum()) < right.sum(), np.ones(asked.sum()))
        naive += alone.low <= 0.85 <= alone.high
    assert abs(hits / runs - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / runs)
    assert naive / runs < 0.85  # negative control: questions taken as independent


def test_intervals_of_differences_cover_the_truth() -> None:
    random = np.random.default_rng(4)
    runs, hits, unpaired = 400, 0, 0.0
    for _ in range(runs):
        asked, right = clustered(random, 150, 0.8)
        worse = random.binomial(right, 0.95)  # loses a twentieth of what it would have had right
        found = difference(worse, right, asked)
        hits += found.low <= -0.04 <= found.high
        unpaired += (accuracy(right, asked).high - accuracy(right, asked).low) / (found.high - found.low) / runs
    assert abs(hits / runs - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / runs)
    assert unpaired > 2  # pairing is what makes small differences visible


def test_sign_flips_are_the_exact_test_on_few_clips() -> None:
    gained = np.array([[3, 1, 0], [2, -1, 0], [1, 0, 0], [2, 2, 0], [1, -1, 0], [4, 1, 0], [1, -2, 0], [0, 0, 0]])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(gained))))
    exact = (np.abs(signs @ gained) >= np.abs(gained.sum(0))).mean(0)
    assert sign_flip(gained, seed=1) == pytest.approx(exact, abs=0.015)
    assert sign_flip(gained, seed=1)[2] == 1.0


def test_p_values_are_even_where_nothing_differs_and_small_where_something_does() -> None:
    random = np.random.default_rng(5)
    nothing = random.integers(-2, 3, (200, 400))
    p = sign_flip(nothing, seed=2, flips=999)
    for level in (0.05, 0.2, 0.5):
        assert abs((p <= level).mean() - level) < 4 * math.sqrt(level * (1 - level) / 400)
    shifted = nothing + (random.random((200, 400)) < 0.5)
    assert (sign_flip(shifted, seed=2, flips=999) <= 0.05).mean() > 0.95
    assert sign_flip(np.ones((50, 1)), flips=999) == pytest.approx([1 / 1000])


def test_p_values_follow_from_the_seed() -> None:
    gained = np.random.default_rng(6).integers(-2, 4, (30, 2))
    assert (sign_flip(gained, seed=3) == sign_flip(gained, seed=3)).all()
    assert (sign_flip(gained, seed=3) != sign_flip(gained, seed=4)).any()
