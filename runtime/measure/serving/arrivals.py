"""Arrival times of an open loop, fixed before the first request, so that a slow server does not delay arrivals.

As in `vllm bench serve`: gaps are gamma-distributed with shape `burstiness` and mean 1 / rate; 1 is a Poisson process,
less is burstier, more is more even. With a given number of requests, gaps are scaled to last number / rate exactly. At
rate `inf` all arrive at once.
"""

from __future__ import annotations

import math
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from earlytom.errors import UserError
from earlytom.numbers import real, whole

_DRAWN = 256  # gaps at a time


def of_number(requests: int, rate: float, burstiness: float, seed: int) -> NDArray[np.float64]:
    """Arrival times of `requests` requests, in seconds after the start, ascending: float64 [requests]."""
    whole("requests", requests, 1)
    _check(rate, burstiness)
    if math.isinf(rate):
        return np.zeros(requests)
    times = np.cumsum(np.random.default_rng(seed).gamma(burstiness, 1 / (burstiness * rate), requests))
    if times[-1] == 0:  # so bursty that no gap is above the smallest float
        return times
    return times * (requests / rate / times[-1])


def in_seconds(seconds: float, rate: float, burstiness: float, seed: int) -> NDArray[np.float64]:
    """Arrival times below `seconds`: float64 [N], N random."""
    real("seconds", seconds, 0, low_open=True)
    _check(rate, burstiness)
    if math.isinf(rate):
        raise UserError("at the rate inf all requests arrive at once: give their number, not seconds")
    draw, last, parts = np.random.default_rng(seed), 0.0, []
    for count in repeat(_DRAWN):
        parts.append(last + np.cumsum(draw.gamma(burstiness, 1 / (burstiness * rate), count)))
        last = float(parts[-1][-1])
        if last >= seconds:
            break
    times = np.concatenate(parts)
    return times[times < seconds]


def _check(rate: float, burstiness: float) -> None:
    if not (isinstance(rate, float) and math.isinf(rate) and rate > 0):
        real("the request rate", rate, 0, low_open=True)
    real("burstiness", burstiness, 0, low_open=True)
