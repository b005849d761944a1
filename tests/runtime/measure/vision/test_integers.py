"""The integer peak: the product is the one that it says, and its rate is arithmetic in time."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.checkpoint import describe
from runtime.measure.vision import integers
from runtime.measure.vision.integers import integer_peak, integer_product, integer_rate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_product_is_exact_and_in_integers() -> None:
    random = np.random.default_rng(1)
    entering, weights = random.integers(0, 256, (5, 300), np.uint8), random.integers(-127, 128, (300, 7), np.int8)
    got = integer_product(entering, weights)
    wanted = (entering.astype(np.int64) - 128) @ weights.astype(np.int64)
    assert got.dtype == np.int32
    assert (got == wanted).all()
    assert not (got == entering.astype(np.int64) @ weights.astype(np.int64)).all()  # the control: around 128, not 0


def test_a_rate_is_arithmetic_in_the_least_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([4.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(integers, "timed", lambda device, call: (call(), next(taken)))
    assert integer_rate(10, 20, 30) == 2 * 10 * 20 * 30 / 0.5
    assert next(taken, None) is None


def test_the_peak_is_of_the_tower_s_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(integers, "integer_rate", lambda *shape: asked.append(shape) or 1.0)
    vision = describe("random:llava-onevision-qwen2-7b-ov")
    assert integer_peak(vision, 8) == 1.0
    assert asked == [(8 * 729, 1152, 4304)]
