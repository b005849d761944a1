"""Arrivals: a golden vector, the rate, and the shape of the gaps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.errors import UserError
from runtime.measure.serving.arrivals import in_seconds, of_number

rates = st.floats(0.01, 1000)
shapes = st.floats(0.05, 50)
seeds = st.integers(0, 2**32)


def test_golden() -> None:
    assert of_number(4, math.inf, 1.0, 0).tolist() == [0, 0, 0, 0]
    # 0.6799, 1.0198, 0.0198 and 0.0022 are drawn, and scaled so that they last two seconds
    assert of_number(4, 2.0, 1.0, 0).tolist() == pytest.approx([0.7899, 1.9744, 1.9974, 2.0], abs=1e-4)


@given(st.integers(1, 2000), rates, shapes, seeds)
def test_a_number_of_requests_lasts_as_long_as_the_rate_says(count: int, rate: float, shape: float, seed: int) -> None:
    times = of_number(count, rate, shape, seed)
    assert len(times) == count
    assert times[-1] == pytest.approx(count / rate)
    assert (np.diff(times, prepend=0.0) >= 0).all()
    assert times.tolist() == of_number(count, rate, shape, seed).tolist()
    if count > 1:
        assert times.tolist() != of_number(count, rate, shape, seed + 1).tolist()


@given(st.floats(0.1, 20), st.floats(0.1, 200), shapes, seeds)
def test_within_seconds(seconds: float, rate: float, shape: float, seed: int) -> None:
    times = in_seconds(seconds, rate, shape, seed)
    assert (np.diff(times, prepend=0.0) >= 0).all()
    assert (times < seconds).all()
    longer = in_seconds(2 * seconds, rate, shape, seed)  # the same process, watched for longer
    assert longer[longer < seconds].tolist() == pytest.approx(times.tolist())


@given(rates, seeds)
def test_burstiness_1_is_a_poisson_process(rate: float, seed: int) -> None:
    gaps = np.diff(of_number(4000, rate, 1.0, seed), prepend=0.0) * rate
    assert distance(gaps) < 0.06  # Kolmogorov and Smirnov; by chance 1e-12


@pytest.mark.parametrize("shape", [0.3, 4.0])
def test_another_burstiness_is_none(shape: float) -> None:
    """Negative control; the variance of the gaps is that of the gamma distribution."""
    gaps = np.diff(of_number(4000, 5.0, shape, 7), prepend=0.0) * 5
    assert distance(gaps) > 0.1
    assert gaps.var() == pytest.approx(1 / shape, rel=0.2)


def test_the_number_of_a_poisson_process_has_its_rate_as_mean_and_variance() -> None:
    counts = [len(in_seconds(4.0, 10.0, 1.0, seed)) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(40, rel=0.05)
    assert np.var(counts) == pytest.approx(40, rel=0.3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: of_number(0, 1.0, 1.0, 0), "requests must be a whole number of at least 1"),
        (lambda: of_number(1, 0.0, 1.0, 0), "the request rate must be above 0"),
        (lambda: of_number(1, math.nan, 1.0, 0), "the request rate must be above 0"),
        (lambda: of_number(1, 1.0, 0.0, 0), "burstiness must be above 0"),
        (lambda: in_seconds(0.0, 1.0, 1.0, 0), "seconds must be above 0"),
        (lambda: in_seconds(1.0, math.inf, 1.0, 0), "give their number, not seconds"),
    ],
)
def test_what_is_no_arrival_is_refused(call: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()  # type: ignore[operator]


def distance(gaps: np.ndarray) -> float:
    """Largest difference of the gaps' distribution from the exponential one of mean 1."""
    ordered, steps = np.sort(gaps), np.arange(len(gaps) + 1) / len(gaps)
    expected = 1 - np.exp(-ordered)
    return float(max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max()))
