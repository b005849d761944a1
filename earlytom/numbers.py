"""Numbers that come from a caller: whole or real, finite, within bounds, and nothing that only looks like a number.

Every argument of every public function goes through these two, so that what is no number is refused where it is passed
and by the name that the caller knows. Taken are Python's `int` and `float` and numpy's scalars, where a `float` holds
them exactly. Refused are `bool` (a flag in the wrong place), texts, `Decimal`, `Fraction`, complex numbers, tensors and
arrays, NaN, infinity, and integers too large for a `float`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from earlytom.errors import UserError

_SHOWN = 60  # characters of a value in a message


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an `int`, if it is a whole number in [low, high].

    Raises:
        UserError: it is not; `name` is what the caller calls it.
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool | np.timedelta64):
        number = int(value)
        if (low is None or low <= number) and (high is None or number <= high):
            return number
    raise UserError(f"{name} must be a whole number{_whole_span(low, high)}, got {shown(value)}")


def real(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """`value` as a `float`, if it is a finite number between the bounds, which are meant but for the open ones.

    Raises:
        UserError: it is not; `name` is what the caller calls it.
    """
    span = _span(low, high, low_open, high_open)
    number = _as_float(value)
    if number is None:
        what = f"a number {span}" if span else "a finite number"
        raise UserError(f"{name} must be {what}, got {shown(value)}")
    above = low is None or (low < number if low_open else low <= number)
    below = high is None or (number < high if high_open else number <= high)
    if not (above and below and math.isfinite(number)):  # NaN is neither above nor below
        raise UserError(f"{name} must be {span.removeprefix('of ') or 'finite'}, got {shown(value)}")
    return number


def shown(value: Any) -> str:
    """`repr` of a value for a message: one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an object's own `repr` may fail, and that of an int of more than 4,300 digits does
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _as_float(value: Any) -> float | None:
    """The float that equals a number; None for what is no number, or that no float equals."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool | np.timedelta64):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    exact = number == value or math.isnan(number)
    return number if exact or isinstance(value, int | np.integer) else None


def _whole_span(low: int | None, high: int | None) -> str:
    if high is not None:
        return f" of at most {high}" if low is None else f" between {low} and {high}"
    return "" if low is None else f" of at least {low}"


def _span(low: float | None, high: float | None, low_open: bool, high_open: bool) -> str:
    if low is not None and high is not None:
        return f"in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    if low is not None:
        return f"above {low:g}" if low_open else f"of at least {low:g}"
    if high is not None:
        return f"below {high:g}" if high_open else f"of at most {high:g}"
    return ""
