"""Sampling against transformers' warpers, the distribution that draws follow, and what picking may not do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from earlytom.errors import UserError
from runtime.decoder.picking import Picker, filter_logits, pick_best
from runtime.decoder.sampling import GREEDY, Sampling
from tests.runtime.gpu.recorded_graph import WaitsForDeviceError, no_waiting

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (2.0, 9, 0.5)]
)
def test_filtered_logits_equal_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(torch.zeros(50, 1, dtype=torch.long), logits.clone()).softmax(-1)
    got = torch.stack([filter_logits(row, Sampling(temperature, top_p, top_k)) for row in logits]).softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_draws_follow_the_distribution() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    pick = Picker(Sampling(temperature=1.0, seed=0), CPU)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[pick(shares.log())] += 1
    assert (counts / 4000 - shares).abs().max() < 0.025  # three standard deviations of the most likely one
    assert (counts / 4000 - shares.flip(0)).abs().max() > 0.025  # negative control: another distribution is told apart


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-30},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"seed": -1},
    ],
)
def test_sampling_refuses_nonsense(settings: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=0), Sampling(0.5, top_k=3, top_p=0.9, seed=0)])
def test_logits_that_are_not_finite_give_no_id(sampling: Sampling, broken: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert 0 <= int(Picker(sampling, CPU)(logits)) < 20
    logits[7] = broken
    if broken == -torch.inf:  # an id that is ruled out is no error, unless all are
        assert int(Picker(sampling, CPU)(logits)) not in (-1, 7)
        logits.fill_(broken)
    assert int(Picker(sampling, CPU)(logits)) == -1


def test_greedy_takes_the_first_of_equals() -> None:
    assert int(pick_best(torch.tensor([0.0, 2.0, 2.0, 1.0]))) == 1


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=0), Sampling(0.5, top_k=3, top_p=0.9, seed=0)])
def test_picking_does_not_wait_for_the_device(sampling: Sampling) -> None:
    logits, pick = torch.randn(20), Picker(sampling, CPU)
    with no_waiting():
        chosen = pick(logits)
    with (
        pytest.raises(WaitsForDeviceError),
        no_waiting(),
        torch.inference_mode(),
    ):  # negative control: an index is asked for
        logits[chosen]


LOGIT = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [-float("inf"), 0.0, 3.4e38, -3.4e38]
)


@example([-1.1754943508222875e-38, 0.0], 16777216.0, 0.5, 0, 0)  # a tie, once they are divided
@given(
    st.lists(LOGIT, min_size=1, max_size=12).filter(lambda logits: max(logits) > -float("inf")),
    st.floats(1e-6, 1e308),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 20) | st.just(2**70),
    st.integers(0, 3),
)
def test_the_best_token_always_stays(
    logits: list[float], temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    """Whatever is asked for: what is sampled from are numbers, the best of them is one of the best before, and what was
    ruled out is not drawn."""
    values, sampling = torch.tensor(logits), Sampling(temperature, top_p, top_k, seed)
    filtered = filter_logits(values, sampling)
    assert not filtered.isnan().any()
    assert filtered.max() == 0
    assert (filtered[values == values.max()] == 0).any()
    assert bool((filtered[values == -torch.inf] == -torch.inf).all())
    chosen = int(Picker(sampling, CPU)(values))
    assert 0 <= chosen < len(logits)
    assert filtered[chosen] > -torch.inf


@pytest.mark.parametrize("top_p", [1e-300, 5e-324, 1e-45])
def test_a_sum_that_is_nothing_in_fp32_leaves_the_best(top_p: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    kept = filter_logits(logits, Sampling(1.0, top_p=top_p)).isfinite()
    assert kept.nonzero().flatten().tolist() == [int(logits.argmax())]
