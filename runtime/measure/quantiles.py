"""Middle and tail of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, interpolated between values; of ten values p99 is nearly the largest."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}


def median(values: Sequence[float]) -> float:
    return float(np.median(values))
