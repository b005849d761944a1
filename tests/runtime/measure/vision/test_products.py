"""The peaks of ONNX Runtime: the products are those that they say, and a rate is arithmetic in time."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.checkpoint import describe
from runtime.measure.vision import products
from runtime.measure.vision.products import float_peak, integer_peak, product

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_product_in_integers_is_exact() -> None:
    random = np.random.default_rng(1)
    entering, weights = random.integers(0, 256, (5, 300), np.uint8), random.integers(-127, 128, (300, 7), np.int8)
    got = product(entering, weights)
    wanted = (entering.astype(np.int64) - 128) @ weights.astype(np.int64)
    assert got.dtype == np.int32
    assert (got == wanted).all()
    assert not (got == entering.astype(np.int64) @ weights.astype(np.int64)).all()  # the control: around 128, not 0


def test_the_product_in_floats_is_plain() -> None:
    random = np.random.default_rng(1)
    entering, weights = (random.standard_normal(shape).astype(np.float32) for shape in ((5, 300), (300, 7)))
    got = product(entering, weights)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, entering @ weights, atol=1e-4)


@pytest.mark.parametrize("peak", [float_peak, integer_peak])
def test_a_peak_is_the_arithmetic_of_the_tower_s_product_in_the_least_of_the_times(
    monkeypatch: pytest.MonkeyPatch, peak: object
) -> None:
    taken = iter([4.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(products, "timed", lambda device, call: (call(), next(taken)))
    checkpoint, sizes = describe(), []
    real = products._product
    monkeypatch.setattr(products, "_product", lambda a, b, times: sizes.append((a, b)) or real(a, b, times))
    assert callable(peak)
    rate = peak(checkpoint, 2)
    ((entering, weights),) = sizes
    assert rate == 2 * len(entering) * weights.size / 0.5
    assert next(taken, None) is None
    assert entering.dtype == (np.float32 if peak is float_peak else np.uint8)


def test_the_product_is_of_the_tower_s_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(products, "_rate", lambda *given: asked.append(given[:3]) or 1.0)
    vision = describe("random:llava-onevision-qwen2-7b-ov")
    assert float_peak(vision, 8) == integer_peak(vision, 8) == 1.0
    assert asked == [(8 * 729, 1152, 4304)] * 2
