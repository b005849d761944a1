"""Choosing without a sort: against sorts that keep the order of equal values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import ranking
from earlytom.ranking import ascending, at, best, largest, ranks, slots


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    """[lists, n], many of them equal."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, draw(st.sampled_from([1, 3, 1000])), shape, generator=generator).float()


@given(scores())
def test_ranks_are_those_of_a_stable_sort(values: Tensor) -> None:
    order = values.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(ranks(values), order.argsort(dim=-1).float())


@given(scores(), st.integers(0, 13))
def test_the_best_are_the_first_of_a_stable_sort(values: Tensor, count: int) -> None:
    order = values.argsort(dim=-1, descending=True, stable=True)[:, :count]
    wanted = torch.zeros_like(values, dtype=torch.bool).scatter(1, order, True)
    assert torch.equal(best(values, count), wanted)


@pytest.mark.parametrize("most", [ranking.MOST_TOP, 2])
def test_slots_are_where_a_mask_is_true(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, with and without a search that an engine has a limit for."""
    monkeypatch.setattr(ranking, "MOST_TOP", most)
    for count in range(8):
        generator = torch.Generator().manual_seed(count)
        mask = best(torch.rand(5, 7, generator=generator), count)
        wanted = [row.nonzero().flatten().tolist() for row in mask]
        assert slots(mask, count).tolist() == wanted


@given(scores())
def test_the_largest_is_the_first_of_equal_ones(values: Tensor) -> None:
    assert largest(values).tolist() == [row.index(max(row)) for row in values.tolist()]


@given(st.permutations(range(9)))
def test_places_are_put_in_order(places: list[int]) -> None:
    found = torch.tensor([places]) * 5
    order = ascending(found)
    assert torch.equal(order, found.argsort(dim=-1))
    assert torch.equal(at(found[..., None], order)[..., 0], found.sort(dim=-1).values)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_values_that_are_not_numbers_give_places_in_range(count: int) -> None:
    for values in (torch.full((2, 5), torch.nan), torch.tensor([[1.0, torch.nan, 2.0, torch.nan, 0.0]])):
        for found in (slots(best(values, count), count), largest(values)):
            assert bool(((found >= 0) & (found < 5)).all())
