"""Diverse tokens: both forms against the rule written as loops, and what holds for every clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.cells.select import (
    affinity,
    likeness,
    round_sizes,
    saliency,
    select_greedy,
    select_rounds,
    token_sizes,
)

KINDS = ("noise", "copies", "constant", "zero", "coarse", "not finite")
tokens_of = st.tuples(st.sampled_from(KINDS), st.integers(1, 24), st.integers(0, 2**16))


def made(kind: str, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features [M, 8] and times [M] of four frames. Kinds: noise, copies (each token twice), constant, zero, coarse
    (few values, so that many are equal), not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=generator)
    if kind == "copies":
        x = x[torch.arange(tokens) // 2]
    elif kind in ("constant", "zero"):
        x = torch.full_like(x, 1.5 if kind == "constant" else 0.0)
    elif kind == "coarse":
        x = x.sign()
    elif kind == "not finite":
        x[seed % tokens, 0] = float("nan")
    return x, torch.arange(tokens) * 4 // tokens * torch.ones(())


def problem(kind: str, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    x, time = made(kind, tokens, seed)
    return saliency(x), likeness(affinity(x, time, 4))


def sequential(salient: Tensor, alike: Tensor, count: int, rounds: int) -> list[int]:
    """The rule, one token at a time."""
    far, taken = [1.0] * len(salient), list[int]()
    f32 = torch.float32

    def times(a: float, b: float) -> float:
        return float(torch.tensor(a, dtype=f32) * torch.tensor(b, dtype=f32))

    def rest(x: float) -> float:
        return float(1 - torch.tensor(x, dtype=f32))

    for size in round_sizes(count, rounds):
        left = [i for i in range(len(far)) if i not in taken]
        order = sorted(left, key=lambda i: (-times(float(salient[i]), far[i]), i))
        value = {
            i: times(times(float(salient[i]), far[i]), rest(max((float(alike[j, i]) for j in order[:n]), default=0.0)))
            for n, i in enumerate(order)
        }
        new = sorted(left, key=lambda i: (-value[i], i))[:size]
        taken += new
        far = [min(f, rest(max(float(alike[j, i]) for j in new))) for i, f in enumerate(far)]
    return sorted(taken)


@given(tokens_of.filter(lambda made: made[0] != "not finite"), st.data())
def test_both_forms_are_the_rule(made: tuple[str, int, int], data: st.DataObject) -> None:
    salient, alike = problem(*made)
    count = data.draw(st.integers(1, len(salient)))
    rounds = data.draw(st.integers(1, count))
    assert select_greedy(salient, alike, count).tolist() == sequential(salient, alike, count, count)
    assert select_rounds(salient, alike, count, rounds).tolist() == sequential(salient, alike, count, rounds)


@given(tokens_of, st.data())
def test_as_many_as_asked_for_each_once_and_in_order(made: tuple[str, int, int], data: st.DataObject) -> None:
    salient, alike = problem(*made)
    count = data.draw(st.integers(1, len(salient)))
    rounds = data.draw(st.integers(1, 30))
    for taken in (select_greedy(salient, alike, count), select_rounds(salient, alike, count, rounds)):
        assert taken.dtype == torch.int64
        assert taken.tolist() == sorted(set(taken.tolist()))
        assert len(taken) == count
        assert int(taken[0]) >= 0
        assert int(taken[-1]) < len(salient)


@given(tokens_of, st.data())
def test_as_many_rounds_as_tokens_is_one_after_the_other(made: tuple[str, int, int], data: st.DataObject) -> None:
    if made[0] == "not finite":
        return
    salient, alike = problem(*made)
    count = data.draw(st.integers(1, len(salient)))
    wanted = select_greedy(salient, alike, count)
    for rounds in (count, count + 5):
        assert torch.equal(select_rounds(salient, alike, count, rounds), wanted)


@given(tokens_of)
def test_all_is_all(made: tuple[str, int, int]) -> None:
    salient, alike = problem(*made)
    every = torch.arange(len(salient))
    assert torch.equal(select_greedy(salient, alike, len(salient)), every)
    assert torch.equal(select_rounds(salient, alike, len(salient), 3), every)


@given(st.integers(1, 700), st.integers(1, 700))
def test_rounds_are_even(count: int, rounds: int) -> None:
    sizes = round_sizes(count, rounds)
    assert (sum(sizes), len(sizes)) == (count, min(count, rounds))
    assert sizes[0] == max(sizes) <= min(sizes) + 1
    assert min(sizes) >= 1


@pytest.mark.parametrize("form", [select_greedy, lambda *choice: select_rounds(*choice, 2)])
def test_ties_go_to_the_earlier(form: Any) -> None:
    equal = torch.ones(6)
    assert form(equal, torch.zeros(6, 6), 4).tolist() == [0, 1, 2, 3]
    assert form(equal, torch.ones(6, 6), 4).tolist() == [0, 1, 2, 3]  # nothing is left of any after the first
    assert form(torch.tensor([1.0, 2, 2, 1, 1, 2]), torch.eye(6), 4).tolist() == [0, 1, 2, 5]


def test_a_copy_waits_until_the_others_are_taken() -> None:
    salient, alike = torch.tensor([0.9, 0.9, 0.2, 0.1]), torch.eye(4)
    alike[0, 1] = alike[1, 0] = 1
    assert select_greedy(salient, alike, 3).tolist() == [0, 2, 3]
    assert select_rounds(salient, alike, 3, 1).tolist() == [0, 2, 3]
    assert select_greedy(salient, torch.eye(4), 3).tolist() == [0, 1, 2]  # negative control: were it no copy


def test_equal_tokens_of_far_frames_resemble_each_other_less() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    near, far = (affinity(x, torch.tensor([0.0, 0, time]), 4)[0, 2] for time in (1, 3))
    assert near == pytest.approx(torch.e ** (-1 / 4))
    assert far == pytest.approx(torch.e ** (-3 / 4))


@given(tokens_of, st.data())
def test_sizes_of_tokens_add_up(made_: tuple[str, int, int], data: st.DataObject) -> None:
    if made_[0] == "not finite":
        return
    x, time = made(*made_)
    affine = affinity(x, time, 4)
    size = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=len(x), max_size=len(x)))).float()
    taken = select_greedy(saliency(x), likeness(affine), data.draw(st.integers(1, len(x))))
    total = token_sizes(affine, size, taken)
    assert total.sum() == size.sum()
    owner = affine[:, taken].argmax(1)
    wanted = [float(size[owner == j].sum()) for j in range(len(taken))]
    assert total.tolist() == wanted


@pytest.mark.parametrize("count", [0, 5])
def test_refusals(count: int) -> None:
    for form in (select_greedy, lambda *choice: select_rounds(*choice, 2)):
        with pytest.raises(UserError, match="count must be between 1 and 4"):
            form(torch.ones(4), torch.ones(4, 4), count)
