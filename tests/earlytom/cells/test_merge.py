"""Merging cell by cell: what holds for every clip, against the formulas written as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from earlytom import UserError
from earlytom.cells.merge import (
    NOVELTY_NOISE,
    CellPlan,
    change,
    merge_marks,
    normalised,
    novelty,
    plan_cells,
    unit,
)
from earlytom.merge import SIMILARITY_STEPS

KINDS = ("noise", "drift", "still", "repeats", "constant", "zero")
clips = st.tuples(st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**16))
powers = st.sampled_from([0.0, 0.5, 2.0, 4.0, 64.0])


def clip(kind: str, frames: int, cells: int, seed: int) -> Tensor:
    """[F, S, 16] fp32. Kinds: noise, drift (slow change), still (one frame), repeats (few frames, each several times in
    a row), constant (all features of a cell equal, so that layer norm leaves nothing), zero."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(frames, cells, 16, generator=generator)
    if kind == "drift":
        return noise[:1] + 0.2 * noise.cumsum(0)
    if kind == "still":
        return noise[:1].expand_as(noise).clone()
    if kind == "repeats":
        return noise[torch.arange(frames) // 3]
    if kind == "constant":
        return noise[:, :, :1].expand_as(noise).clone()
    return noise if kind == "noise" else torch.zeros_like(noise)


def sequential(hidden: Tensor, frames_out: int, power: float) -> tuple[NDArray[np.float64], list[list[int]]]:
    """The merged hidden states and the groups, in float64 and one cell at a time."""
    x = hidden.double().numpy()
    away = x - x.mean(-1, keepdims=True)
    normal = away / np.sqrt((away**2).mean(-1, keepdims=True) + 1e-5)

    def unit(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-6)

    steps = [9.0, *(1 - (unit(normal[1:]) * unit(normal[:-1])).sum(-1).mean(-1))]
    rounded = [round(step * 2**20) for step in steps]
    starts = sorted(sorted(range(len(x)), key=lambda i: (-rounded[i], i))[:frames_out])
    groups = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(x)], strict=True)]
    out = np.zeros((frames_out, *x.shape[1:]))
    for cell in range(x.shape[1]):
        novel = np.maximum(1e-6, 1 - unit(normal[:, cell]) @ unit(normal[:, cell].mean(0)))
        for slot, group in enumerate(groups):
            weights = (novel[group] / novel[group].max()) ** power
            out[slot, cell] = weights / weights.sum() @ x[group, cell]
    return out, groups


def groups_of(plan: CellPlan) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in plan.member]


@settings(max_examples=60)
@given(clips.filter(lambda made: made[0] != "constant"), st.data(), powers)  # its directions are what rounding left
def test_merging_is_that_of_the_formulas(made: tuple[str, int, int, int], data: st.DataObject, power: float) -> None:
    hidden = clip(*made)
    left = data.draw(st.integers(1, len(hidden)))
    plan = plan_cells(hidden, left, power)
    wanted, groups = sequential(hidden, left, power)
    assert groups_of(plan) == groups
    if made[0] in ("noise", "drift"):  # where novelty is not what rounding left of 1 - 1
        np.testing.assert_allclose(plan.apply(hidden).numpy(), wanted, atol=1e-3)


@given(clips, st.data(), powers)
def test_what_holds_for_every_clip(made: tuple[str, int, int, int], data: st.DataObject, power: float) -> None:
    hidden = clip(*made)
    frames, cells, _ = hidden.shape
    left = data.draw(st.integers(1, frames))
    plan = plan_cells(hidden, left, power)
    assert plan.weights.shape == (cells, left, frames)
    assert bool((plan.weights >= 0).all())
    torch.testing.assert_close(plan.weights.sum(-1), torch.ones(cells, left))
    assert bool(((plan.weights > 0) <= (plan.member > 0)).all())
    assert plan.member[0, 0] == 1  # frame 0 starts group 0
    assert torch.equal(plan.member.sum(0), torch.ones(frames))  # every frame is in one group
    assert bool((plan.member.sum(1) > 0).all())
    group = plan.member.argmax(0)
    assert bool((group.diff() >= 0).all())  # groups are runs
    normal = normalised(hidden)
    novel = novelty(normal, unit(normal))
    peak = torch.where(plan.member[:, :, None] > 0, novel, 0.0).amax(1)  # [F', T]
    assert bool(plan.member.gather(1, plan.taken).all())
    assert bool((novel.gather(0, plan.taken) >= peak - NOVELTY_NOISE).all())
    merged = plan.apply(hidden)
    assert bool((merged.amax(0) <= hidden.amax(0) + 1e-4).all())
    assert bool((merged.amin(0) >= hidden.amin(0) - 1e-4).all())


@given(clips, st.data())
def test_sizes_add_up_and_times_are_a_member_s(made: tuple[str, int, int, int], data: st.DataObject) -> None:
    hidden = clip(*made)
    frames, cells, _ = hidden.shape
    size, time = torch.ones(frames, cells), torch.arange(float(frames))[:, None].expand(frames, cells)
    left = frames
    while left > 1:  # as many merges as there is room for
        left = data.draw(st.integers(1, left))
        plan = plan_cells(hidden, left, 4.0)
        before = time
        size, time = merge_marks(plan, size, time)
        hidden = plan.apply(hidden)
        assert size.sum(0).tolist() == [frames] * cells
        assert torch.equal(time, before.gather(0, plan.taken))
        assert bool((time.diff(dim=0) > 0).all())  # groups are in order
        if left == len(before):
            left -= 1


@given(clips, powers)
def test_all_frames_is_the_identity(made: tuple[str, int, int, int], power: float) -> None:
    hidden = clip(*made)
    size, time = (torch.rand(hidden.shape[:2]) for _ in range(2))
    plan = plan_cells(hidden, len(hidden), power)
    assert torch.equal(plan.apply(hidden), hidden)
    assert all(torch.equal(a, b) for a, b in zip(merge_marks(plan, size, time), (size, time), strict=True))


# The adaptive schedule

thresholds = st.one_of(st.sampled_from([0.0, 0.035, 2.5]), st.floats(0, 2))


@given(clips, powers)
def test_threshold_0_keeps_all_and_one_above_any_change_keeps_one(
    made: tuple[str, int, int, int], power: float
) -> None:
    hidden = clip(*made)
    every = plan_cells(hidden, None, power, threshold=0.0)
    assert groups_of(every) == [[frame] for frame in range(len(hidden))]
    assert torch.equal(every.apply(hidden), hidden)
    assert groups_of(plan_cells(hidden, None, power, threshold=2.5)) == [list(range(len(hidden)))]


@given(clips, thresholds, thresholds)
def test_the_higher_the_threshold_the_fewer_groups(made: tuple[str, int, int, int], one: float, other: float) -> None:
    hidden, (low, high) = clip(*made), sorted((one, other))
    fine, coarse = (groups_of(plan_cells(hidden, None, 4.0, threshold=t)) for t in (low, high))
    assert {group[0] for group in coarse} <= {group[0] for group in fine}


@given(clips, thresholds, powers)
def test_as_the_budget_schedule_where_as_many_stay(
    made: tuple[str, int, int, int], threshold: float, power: float
) -> None:
    hidden = clip(*made)
    free = plan_cells(hidden, None, power, threshold=threshold)
    budget = plan_cells(hidden, len(free.member), power)
    assert torch.equal(free.weights, budget.weights)
    assert torch.equal(free.member, budget.member)
    assert torch.equal(free.taken, budget.taken)


def test_a_frame_that_changes_by_exactly_the_threshold_starts_a_group() -> None:
    hidden = clip("drift", 8, 5, 11)
    step = change(unit(normalised(hidden)))
    for frame in range(1, 8):
        at, above = (
            plan_cells(hidden, None, 4.0, threshold=float(step[frame]) + more) for more in (0.0, 1 / SIMILARITY_STEPS)
        )
        assert [frame in {group[0] for group in groups_of(plan)} for plan in (at, above)] == [True, False]


def test_tokens_that_are_no_cells_do_not_start_groups() -> None:
    hidden = clip("still", 6, 5, 3)
    hidden[3:, 0] = clip("noise", 3, 1, 4)[:, 0]
    assert groups_of(plan_cells(hidden, None, 4.0, 1, threshold=0.01)) == [[0, 1, 2, 3, 4, 5]]
    assert groups_of(plan_cells(hidden, None, 4.0, 0, threshold=0.01)) == [[0, 1, 2], [3], [4], [5]]


# Examples


def test_of_equal_changes_the_earlier_starts_a_group() -> None:
    a, b = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(0))
    hidden = torch.cat([a, b, a, b, a])  # every change is the same but for rounding
    for left in range(1, 6):
        assert groups_of(plan_cells(hidden, left, 4.0)) == [[i] for i in range(left - 1)] + [list(range(left - 1, 5))]


def test_identical_frames_are_averaged_and_show_the_earliest() -> None:
    hidden = clip("still", 6, 5, 3)
    plan = plan_cells(hidden, 2, 4.0)
    assert groups_of(plan) == [[0], [1, 2, 3, 4, 5]]
    torch.testing.assert_close(plan.apply(hidden), hidden[:2])
    torch.testing.assert_close(plan.weights[:, 1, 1:], torch.full((5, 5), 0.2))
    assert plan.taken.tolist() == [[0] * 5, [1] * 5]


@pytest.mark.parametrize("seed", range(8))
def test_of_copies_the_earliest_is_shown_whatever_rounding_left_of_them(seed: int) -> None:
    """A clip of fewer frames than are asked for is shown with copies of each."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 5, 16, generator=generator).repeat_interleave(3, dim=0)
    noisy = hidden * (1 + 2e-7 * torch.randn(hidden.shape, generator=generator))
    normal = normalised(noisy)
    assert novelty(normal, unit(normal))[:3].argmax(0).any()  # what would be taken: a later one somewhere
    assert plan_cells(noisy, 2, 4.0).taken.tolist() == [[0] * 5, [3] * 5]


def test_a_cell_that_changes_takes_the_member_that_differs() -> None:
    hidden = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(1)).repeat(5, 1, 1)
    hidden[3, 1] = torch.randn(16, generator=torch.Generator().manual_seed(2))
    plan = plan_cells(hidden, 1, 4.0)
    torch.testing.assert_close(plan.weights[0, 0], torch.full((5,), 0.2))
    assert plan.weights[1, 0, 3] > 0.9
    assert plan.taken.tolist() == [[0, 3]]
    assert plan_cells(hidden, 1, 0.0).weights.flatten().tolist() == pytest.approx([0.2] * 10)  # power 0 averages


def test_half_precision_decides_as_its_values_do_in_single() -> None:
    hidden = clip("drift", 12, 9, 5).half()
    plan, wanted = plan_cells(hidden, 7, 4.0), plan_cells(hidden.float(), 7, 4.0)
    assert torch.equal(plan.weights, wanted.weights)
    assert plan.apply(hidden).dtype == torch.float16


@pytest.mark.parametrize(
    ("shape", "left", "message"),
    [
        ((4, 9), 2, "must be .frames, tokens, width. with a frame"),
        ((0, 9, 16), 1, "with a frame"),
        ((4, 9, 16), 0, "frames_out must be between 1 and 4"),
        ((4, 9, 16), 5, "frames_out must be between 1 and 4"),
    ],
)
def test_refusals(shape: tuple[int, ...], left: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_cells(torch.zeros(shape), left, 4.0)
