"""Numbers from callers: what is taken, what is refused, and that a refusal is one line with the argument's name."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlytom.errors import UserError
from earlytom.numbers import real, shown, whole


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


NO_NUMBERS = [
    None, True, False, "3", b"3", "", [3], (3,), {}, {3}, 3j, Decimal(5), Fraction(1, 2), Unspeakable(), object(),
    np.bool_(True), np.array(3), np.array([3]), np.datetime64("2026-01-01"), np.timedelta64(5), np.complex64(1),
    torch.tensor(3), torch.tensor(True),
]  # fmt: skip
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), 10**400, -(10**400), 10**5000]


def kind(value: Any) -> str:
    """The same in every process, as an object's own text is not."""
    return f"{type(value).__name__}-{shown(value).split(' at 0x')[0]}"


@pytest.mark.parametrize("value", [*NO_NUMBERS, *NOT_FINITE], ids=kind)
def test_what_is_no_finite_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UserError, match=r"^deadline must be ") as caught:
        real("deadline", value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1.5, 3.0, np.float32(3), math.nan, math.inf], ids=kind)
def test_what_is_not_whole_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UserError, match=r"^frames must be a whole number"):
        whole("frames", value)


@pytest.mark.parametrize("kind", [int, np.int8, np.int64, np.uint16, np.uint64])
def test_whole_numbers_of_numpy_become_python_s(kind: Any) -> None:
    assert type(whole("frames", kind(7))) is int
    assert whole("frames", kind(7)) == 7
    assert real("seconds", kind(7)) == 7.0


@pytest.mark.parametrize("kind", [float, np.float16, np.float32, np.float64])
def test_real_numbers_of_numpy_become_python_s(kind: Any) -> None:
    assert type(real("seconds", kind(0.5))) is float
    assert real("seconds", kind(0.5)) == 0.5
    assert real("seconds", kind(0.1)) == float(kind(0.1))  # the very number that was given


@pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="numpy's long double is a double here")
def test_a_number_that_no_float_equals_is_refused() -> None:
    with pytest.raises(UserError, match="seconds must be a finite number"):
        real("seconds", np.longdouble(1) / 3)


@given(st.integers(), st.integers(), st.integers())
def test_bounds_of_whole_numbers_are_meant(value: int, low: int, high: int) -> None:
    if low <= value <= high:
        assert whole("n", value, low, high) == value
    else:
        with pytest.raises(UserError, match="between"):
            whole("n", value, low, high)


@given(st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.booleans())
def test_open_bounds_are_not_meant(bound: float, low_open: bool, high_open: bool) -> None:
    inside = not (low_open or high_open)
    if inside:
        assert real("x", bound, bound, bound) == bound
    else:
        with pytest.raises(UserError, match=r"x must be in [(\[].*[)\]], got"):
            real("x", bound, bound, bound, low_open=low_open, high_open=high_open)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"low": 0}, "of at least 0"),
        ({"low": 0, "low_open": True}, "above 0"),
        ({"high": 1}, "of at most 1"),
        ({"high": 1, "high_open": True}, "below 1"),
        ({"low": 0, "high": 1, "low_open": True}, r"in \(0, 1\]"),
    ],
)
def test_a_refusal_says_what_was_expected(bounds: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"x must be a number {words}, got 'a'"):
        real("x", "a", **bounds)


@pytest.mark.parametrize(
    ("value", "words"), [("a", "a finite number"), (math.nan, "finite"), (True, "a finite number")]
)
def test_a_number_without_bounds_is_finite(value: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"^x must be {words}, got "):
        real("x", value)


@pytest.mark.parametrize(("value", "bounds", "words"), [(-1, {"low": 0}, "at least 0"), (10, {"high": 9}, "at most 9")])
def test_a_number_out_of_bounds_is_told_the_bound(value: int, bounds: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^x must be {words}, got {value}"):
        real("x", value, **bounds)
