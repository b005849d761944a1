"""Stage I: the vectorised plan against the sequential reference, and the promises of the budget schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from earlytom import FramePlan, UserError, plan_frames, segment_frames
from earlytom.merge import (
    SIMILARITY_STEPS,
    apply_weights,
    frame_similarity,
    plan_similarity,
    segment_bounds,
    segments_of,
    static_frames,
)
from tests.earlytom.reference import adaptive_plan, budget_plan, dense, segments, similarity

KINDS = ("noise", "uniform", "quantised", "coarse", "equal", "drift", "scenes", "still", "falling")
TAUS = (-1.0, -0.3, 0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 0.99, 1.0)
EMAS = (0.05, 0.3, 0.5, 0.75, 0.9, 1.0)


def hidden_states(kind: str, frames: int, rng: np.random.Generator, tokens: int = 4, width: int = 6) -> Tensor:
    """[F, S, D] hidden states of a made-up video."""
    noise = rng.standard_normal((frames, tokens, width))
    if kind == "noise":
        out = noise
    elif kind == "still":
        out = np.repeat(noise[:1], frames, axis=0)
    elif kind == "drift":
        out = noise[:1] + rng.uniform(0.02, 0.6) * noise.cumsum(0)
    else:
        scene = (rng.random(frames) < rng.uniform(0.05, 0.4)).cumsum()
        out = noise[scene % frames] + rng.choice([0.0, 0.05, 0.4]) * noise
    return torch.from_numpy(out.astype(np.float32))


def matrix(kind: str, frames: int, rng: np.random.Generator) -> Tensor:
    """[F, F] fp32 similarities, symmetric, ones on the diagonal: of a video, or simply drawn, with ties and without."""
    if kind in ("noise", "drift", "scenes", "still"):
        return frame_similarity(hidden_states(kind, frames, rng))
    if kind == "uniform":
        c = rng.uniform(rng.choice([-1.0, 0.0, 0.7]), 1.0, (frames, frames))
    elif kind == "quantised":
        c = rng.integers(-2, 9, (frames, frames)) / 8
    elif kind == "coarse":
        c = rng.integers(1, 4, (frames, frames)) / 4 + 0.25
    elif kind == "equal":
        c = np.full((frames, frames), rng.choice([-0.5, 0.0, 0.5, 0.875, 1.0]))
    else:  # falling with the distance in time: similar to the neighbour, less so to those further away
        index = np.arange(frames)
        c = 1 - np.abs(index[:, None] - index) * rng.uniform(0.0, 0.1) - rng.uniform(0, 0.02, (frames, frames))
    c = np.triu(c, 1)
    c = c + c.T
    np.fill_diagonal(c, 1.0)
    return torch.from_numpy(np.clip(c, -1, 1).astype(np.float32))


def draw_frames(rng: np.random.Generator) -> int:
    """1 to 128, mostly short: that is where the special cases are, and the reference is slow."""
    return int(
        rng.choice(
            [rng.integers(1, 7), rng.integers(1, 20), rng.integers(1, 48), rng.integers(48, 129)],
            p=[0.35, 0.35, 0.25, 0.05],
        )
    )


def random_cases(count: int, seed: int) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    for n in range(count):
        kind = KINDS[n % len(KINDS)]
        options = {
            "tau": float(rng.choice(TAUS)) if rng.random() < 0.5 else float(rng.uniform(-1, 1)),
            "max_window": int(rng.integers(1, 13)),
            "ema": float(rng.choice(EMAS)) if rng.random() < 0.5 else float(rng.uniform(0.01, 1)),
        }
        yield kind, matrix(kind, draw_frames(rng), rng), options


def same_rows(got: Tensor, want: NDArray[np.float64]) -> bool:
    """The same decisions exactly (which frames each row is made of), the same weights up to rounding."""
    array = got.numpy()
    return array.shape == want.shape and np.array_equal(array > 0, want > 0) and np.allclose(array, want, atol=2e-6)


# --- the vectorised plan is the sequential one


def test_segments_equal_the_sequential_reference() -> None:
    lengths: set[int] = set()
    for kind, c, options in random_cases(2500, seed=1):
        start, end = segment_bounds(c, **options)
        want = segments(c.tolist(), **options)
        assert segments_of(start).tolist() == [list(pair) for pair in want], (kind, options)
        assert end.tolist() == [last for first, last in want for _ in range(first, last + 1)], (kind, options)
        lengths |= {last - first + 1 for first, last in want}
    assert lengths >= set(range(1, 12))  # up to max_window 12 minus one: the cases reach every length


@pytest.mark.parametrize("trailing", ["released", "keep"])
def test_adaptive_plan_equals_the_sequential_reference(trailing: str) -> None:
    merged = dropped = 0
    for kind, c, options in random_cases(2500, seed=2):
        weights, _, _ = plan_similarity(c, None, **options, trailing=trailing)
        want = dense(adaptive_plan(c.tolist(), **options, trailing=trailing), len(c))
        assert same_rows(weights, want), (kind, len(c), options)
        merged += int(((want > 0).sum(1) == 2).sum())
        dropped += int((want.sum(0) == 0).sum())
    assert merged > 300  # the cases do merge
    assert dropped > 300  # and drop


def test_the_two_trailing_rules_differ() -> None:
    """Negative control: the comparison above can tell the rules apart."""
    differing = 0
    for _, c, options in random_cases(300, seed=3):
        weights, _, _ = plan_similarity(c, None, **options, trailing="keep")
        differing += not same_rows(weights, dense(adaptive_plan(c.tolist(), **options, trailing="released"), len(c)))
    assert differing > 50


def test_budget_plan_equals_the_sequential_reference() -> None:
    rng = np.random.default_rng(4)
    folded = whole = 0
    for kind, c, options in random_cases(2500, seed=4):
        trailing = str(rng.choice(["released", "keep"]))
        count = len(adaptive_plan(c.tolist(), **options, trailing=trailing))
        # Any number, or one around the adaptive count, where the two rules meet.
        frames_out = int(rng.integers(1, len(c) + 1) if rng.random() < 0.5 else count + rng.integers(-2, 4))
        frames_out = min(max(frames_out, 1), len(c))
        weights, _, _ = plan_similarity(c, frames_out, **options, trailing=trailing)
        want = dense(budget_plan(c.tolist(), frames_out, **options, trailing=trailing), len(c))
        assert same_rows(weights, want), (kind, len(c), frames_out, options)
        folded += frames_out < count
        whole += count < frames_out < len(c)
    assert folded > 300  # frames that the adaptive plan keeps have gone
    assert whole > 100  # and frames that it removes have stayed


def test_plans_from_hidden_states_equal_the_sequential_reference() -> None:
    """From pixels' hidden states on, similarity included: no case may sit on a tie that the summation order decides."""
    rng = np.random.default_rng(5)
    for n in range(150):
        kind = ("noise", "drift", "scenes", "still")[n % 4]
        hidden = hidden_states(kind, int(rng.integers(1, 16)), rng)
        options: dict[str, Any] = {
            "tau": float(rng.uniform(-0.2, 0.95)),
            "max_window": int(rng.integers(1, 13)),
            "ema": float(rng.choice(EMAS)),
        }
        c = (np.round(similarity(hidden.numpy()) * 2**20) / 2**20).tolist()
        plan = plan_frames(hidden, **options)
        assert same_rows(plan.weights, dense(adaptive_plan(c, **options, trailing="released"), len(hidden))), kind
        assert plan.segments.tolist() == [list(pair) for pair in segments(c, **options)]
        assert torch.equal(plan.segments, segment_frames(hidden, **options))
        frames_out = int(rng.integers(1, len(hidden) + 1))
        budget = plan_frames(hidden, **options, schedule="budget", frames_out=frames_out)
        assert same_rows(
            budget.weights, dense(budget_plan(c, frames_out, **options, trailing="released"), len(hidden))
        ), kind


# --- the four properties of the budget schedule


@st.composite
def plans(draw: st.DrawFn) -> tuple[Tensor, int, dict[str, Any]]:
    """A similarity matrix, a number of frames to keep, options; small matrices entry by entry, so that they shrink."""
    frames = draw(st.integers(1, 24))
    if frames <= 6:
        entry = st.integers(-4, 8).map(lambda n: n / 8)
        values = draw(st.lists(entry, min_size=frames * frames, max_size=frames * frames))
        c = torch.tensor(values, dtype=torch.float32).view(frames, frames).triu(1)
        c = c + c.T + torch.eye(frames)
    else:
        c = matrix(draw(st.sampled_from(KINDS)), frames, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    options = {
        "tau": draw(st.sampled_from(TAUS)),
        "max_window": draw(st.integers(1, 12)),
        "ema": draw(st.sampled_from(EMAS)),
        "trailing": draw(st.sampled_from(["released", "keep"])),
    }
    return c, draw(st.integers(1, frames)), options


PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


def kept_frames(weights: Tensor) -> list[int]:
    """The frame that each row keeps: the first it is made of."""
    return (weights > 0).int().argmax(1).tolist()


@PROPERTY
@given(plans())
def test_property_1_exactly_the_asked_number_of_frames(case: tuple[Tensor, int, dict[str, Any]]) -> None:
    c, _, options = case
    for frames_out in range(1, len(c) + 1):
        weights, _, _ = plan_similarity(c, frames_out, **options)
        assert weights.shape == (frames_out, len(c))


@PROPERTY
@given(plans())
def test_property_2_the_adaptive_count_gives_the_adaptive_plan(case: tuple[Tensor, int, dict[str, Any]]) -> None:
    c, _, options = case
    adaptive, _, _ = plan_similarity(c, None, **options)
    budget, _, _ = plan_similarity(c, len(adaptive), **options)
    assert torch.equal(budget, adaptive)


@PROPERTY
@given(plans())
def test_property_3_order_first_frame_and_convex_weights(case: tuple[Tensor, int, dict[str, Any]]) -> None:
    c, frames_out, options = case
    for weights in (plan_similarity(c, frames_out, **options)[0], plan_similarity(c, None, **options)[0]):
        assert bool(torch.isfinite(weights).all())
        assert bool((weights >= 0).all())
        assert torch.allclose(weights.sum(1), torch.ones(len(weights)), atol=1e-5)
        kept = kept_frames(weights)
        assert kept[0] == 0
        assert kept == sorted(set(kept))
        # A row is made of its own frame and of later ones that come before the next kept frame: time never runs back.
        for row, first, end in zip(weights, kept, [*kept[1:], len(c)], strict=True):
            assert row[first] > 0
            assert bool((row[:first] == 0).all())
            assert bool((row[end:] == 0).all())


@PROPERTY
@given(plans())
def test_property_4_all_frames_is_the_identity(case: tuple[Tensor, int, dict[str, Any]]) -> None:
    c, _, options = case
    weights, _, _ = plan_similarity(c, len(c), **options)
    assert torch.equal(weights, torch.eye(len(c)))


@PROPERTY
@given(plans())
def test_what_the_budget_keeps_beyond_the_adaptive_plan_stays_whole(case: tuple[Tensor, int, dict[str, Any]]) -> None:
    c, frames_out, options = case
    adaptive, _, _ = plan_similarity(c, None, **options)
    weights, _, _ = plan_similarity(c, frames_out, **options)
    removed = set(range(len(c))) - set(kept_frames(adaptive))
    pairs = dict(zip(kept_frames(adaptive), adaptive, strict=True))
    if frames_out <= len(adaptive):
        # Whatever the adaptive plan drops is in no row either.
        dropped = [i for i in removed if bool((adaptive[:, i] == 0).all())]
        assert bool((weights[:, dropped] == 0).all())
        return
    for first, row in zip(kept_frames(weights), weights, strict=True):
        whole = torch.nn.functional.one_hot(torch.tensor(first), len(c)).float()
        if first in removed or (first + 1) in kept_frames(weights):
            assert torch.equal(row, whole)
        else:
            assert torch.equal(row, pairs[first])


# --- examples that can be followed by hand


def chain(*steps: float, far: float) -> Tensor:
    """Similarities of neighbours as given, `far` between all others."""
    frames = len(steps) + 1
    c = torch.full((frames, frames), far)
    index = torch.arange(frames - 1)
    c[index, index + 1] = c[index + 1, index] = torch.tensor(steps)
    c.fill_diagonal_(1.0)
    return c


BY_HAND: dict[str, Any] = {"tau": -1.0, "max_window": 12, "ema": 0.9, "trailing": "released"}


def test_a_pair_is_weighted_by_its_similarities() -> None:
    # middle frames 1..4; s_1 = .8 beats s_2 = .4, then 3 and 4 are the last pair: 4 goes into 3 with no weight
    weights, _, _ = plan_similarity(chain(0.5, 0.8, 0.4, 0.6, 0.5, far=0.1), None, **BY_HAND)
    want = torch.zeros(4, 6)
    want[0, 0] = want[2, 3] = want[3, 5] = 1
    want[1, 1], want[1, 2] = 0.8 / 1.2, 0.4 / 1.2
    assert torch.allclose(weights, want)


def test_the_last_middle_frame_is_dropped_or_kept() -> None:
    # s_1 < s_2: frame 1 is emitted alone; then (2, 3) is merged as s_2 > s_3; 4 is the last middle frame, on its own
    c = chain(0.5, 0.3, 0.8, 0.4, 0.5, far=0.1)
    released, _, _ = plan_similarity(c, None, **BY_HAND)
    keep, _, _ = plan_similarity(c, None, **(BY_HAND | {"trailing": "keep"}))
    assert kept_frames(released) == [0, 1, 2, 5]
    assert kept_frames(keep) == [0, 1, 2, 4, 5]
    assert bool((released[:, 4] == 0).all())


def test_a_dropped_trailing_frame_stays_dropped_at_any_budget() -> None:
    c = chain(0.5, 0.3, 0.8, 0.4, 0.5, far=0.1)
    for frames_out in range(1, 5):
        weights, _, _ = plan_similarity(c, frames_out, **BY_HAND)
        assert bool((weights[:, 4] == 0).all())
    five, _, _ = plan_similarity(c, 5, **BY_HAND)  # 2 and 3 go first (s = .8), so 4 is back, whole
    assert kept_frames(five) == [0, 1, 2, 4, 5]
    assert torch.equal(five[3], torch.eye(6)[4])


def test_a_frame_that_goes_beyond_the_plan_is_folded_with_its_pair() -> None:
    # adaptive: 0, (1, 2), (3, 4), 5; the budget takes one more: c(0, 1) = c(4, 5) = .5 tie above c(2, 3) = .4
    c = chain(0.5, 0.8, 0.4, 0.6, 0.5, far=0.1)
    weights, _, _ = plan_similarity(c, 3, **BY_HAND)
    # of two ties the earlier goes: 1 folds into 0 with .5 against 1, and takes its own pair along
    assert kept_frames(weights) == [0, 3, 5]
    want = torch.tensor([1 / 1.5, 0.5 / 1.5 * 0.8 / 1.2, 0.5 / 1.5 * 0.4 / 1.2, 0, 0, 0])
    assert torch.allclose(weights[0], want)
    one, _, _ = plan_similarity(c, 1, **BY_HAND)
    assert torch.allclose(one.sum(), torch.tensor(1.0))
    assert one[0, 0] == one.max()


@pytest.mark.parametrize("max_window", [1, 2])
def test_a_window_of_two_or_less_makes_segments_of_one_frame(max_window: int) -> None:
    found = segment_frames(torch.ones(5, 3, 4), tau=0.5, max_window=max_window, ema=0.9)
    assert found.tolist() == [[i, i] for i in range(5)]


def test_a_window_of_six_holds_five_frames() -> None:
    found = segment_frames(torch.ones(12, 3, 4), tau=0.5, max_window=6, ema=0.9)
    assert found.tolist() == [[0, 4], [5, 9], [10, 11]]


@pytest.mark.parametrize("schedule", ["adaptive", "budget"])
def test_one_frame(schedule: str) -> None:
    plan = plan_frames(torch.randn(1, 4, 8), tau=0.8, max_window=6, ema=0.9, schedule=schedule)
    assert torch.equal(plan.weights, torch.ones(1, 1))
    assert plan.segments.tolist() == [[0, 0]]


def test_two_frames_are_never_merged_by_the_adaptive_plan() -> None:
    plan = plan_frames(torch.ones(2, 4, 8), tau=0.0, max_window=6, ema=0.9)
    assert torch.equal(plan.weights, torch.eye(2))


def test_the_default_budget_is_three_quarters() -> None:
    plan = plan_frames(torch.randn(32, 4, 8), tau=0.8, max_window=6, ema=0.9, schedule="budget")
    assert plan.weights.shape == (24, 32)


def test_static_frames_are_the_middle_ones() -> None:
    start, end = torch.tensor([0, 0, 2, 2, 2, 2, 6]), torch.tensor([1, 1, 5, 5, 5, 5, 6])
    assert static_frames(start, end).tolist() == [False, False, False, True, True, False, False]


# --- similarity and application


def test_similarity_is_the_mean_cosine_on_a_grid() -> None:
    rng = np.random.default_rng(6)
    hidden = hidden_states("scenes", 9, rng, tokens=7, width=16)
    got = frame_similarity(hidden)
    assert np.abs(got.numpy() - similarity(hidden.numpy())).max() < 2e-6
    assert torch.equal(got, got.T)
    assert torch.equal(got.diagonal(), torch.ones(9))
    assert torch.equal(got * SIMILARITY_STEPS, (got * SIMILARITY_STEPS).round())


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e3])
def test_similarity_does_not_depend_on_the_scale(scale: float) -> None:
    hidden = hidden_states("noise", 5, np.random.default_rng(7))
    assert torch.allclose(frame_similarity(hidden * scale), frame_similarity(hidden), atol=2e-6)


def test_similarity_of_tokens_of_zeros_is_zero_and_finite() -> None:
    hidden = torch.zeros(4, 3, 8)
    hidden[2:] = 1.0
    got = frame_similarity(hidden)
    assert bool(torch.isfinite(got).all())
    assert got[0, 1] == got[0, 3] == 0
    assert got[2, 3] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decided_in_full_precision(dtype: torch.dtype) -> None:
    hidden = (30 * hidden_states("drift", 12, np.random.default_rng(8), tokens=9, width=64)).to(dtype)
    options: dict[str, Any] = {"tau": 0.8, "max_window": 6, "ema": 0.9, "schedule": "budget", "frames_out": 8}
    half, full = plan_frames(hidden, **options), plan_frames(hidden.float(), **options)
    assert torch.equal(half.weights, full.weights)
    assert half.weights.dtype == torch.float32
    merged = half.apply(hidden)
    assert merged.dtype == dtype
    assert torch.allclose(merged.float(), full.apply(hidden.float()), rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 3), (6, 2, 2, 2)])
def test_apply_is_a_weighted_sum_over_frames(shape: tuple[int, ...]) -> None:
    plan = plan_frames(torch.ones(6, 3, 4), tau=0.5, max_window=8, ema=0.9, schedule="budget", frames_out=2)
    x = torch.randn(shape)
    assert torch.allclose(plan.apply(x), torch.einsum("if,f...->i...", plan.weights, x), atol=1e-6)


def test_applying_the_identity_changes_no_bit() -> None:
    x = torch.randn(5, 7, 3)
    assert torch.equal(apply_weights(torch.eye(5), x), x)
    assert not torch.equal(apply_weights(torch.full((5, 5), 0.2), x), x)


def test_a_plan_carries_received_attention_the_same_way() -> None:
    hidden, received = torch.randn(8, 4, 6), torch.rand(8, 4)
    plan = plan_frames(hidden, tau=0.1, max_window=8, ema=0.9)
    assert isinstance(plan, FramePlan)
    both = plan.apply(torch.cat([hidden, received[:, :, None]], dim=2))
    assert torch.allclose(both[:, :, -1], plan.apply(received), atol=1e-6)


# --- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "fixed"}, "schedule must be one of adaptive, budget, got 'fixed'"),
        ({"trailing": "drop"}, "trailing must be one of released, keep, got 'drop'"),
        ({"frames_out": 3}, "frames_out=3 is for schedule='budget'"),
        ({"schedule": "budget", "frames_out": 0}, "between 1 and 4 .* got 0"),
        ({"schedule": "budget", "frames_out": 5}, "between 1 and 4 .* got 5"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"tau": 0.8, "max_window": 6, "ema": 0.9} | change
    with pytest.raises(UserError, match=message):
        plan_frames(torch.randn(4, 3, 8), **options)


@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 8), (1, 4, 3, 8)])
def test_hidden_states_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    for decide in (plan_frames, segment_frames):
        with pytest.raises(UserError, match=r"\[frames, tokens, width\]"):
            decide(torch.zeros(shape), tau=0.8, max_window=6, ema=0.9)
