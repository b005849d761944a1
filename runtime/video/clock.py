"""The time of each frame, from the file's timestamps where these are plausible."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.video.packets import Packets

_LOCAL = 16  # frames within which out-of-order times must recover
_JOINTS = 0.1  # share of backward steps from which on timestamps are ignored


def seconds_of(pts: list[int | None], packets: Packets) -> tuple[NDArray[np.float64], float]:
    """Seconds of every frame after the first, non-decreasing, and the duration. pts: in display order.

    Where recordings were joined the timestamps restart or jump: the gap is removed. Without usable timestamps the
    file's frame rate is used.
    """
    count = len(pts)
    if None in pts or not packets.tick:
        return _even(count, 1 / packets.rate)
    ticks = np.array(pts, dtype=np.int64)
    steps = np.diff(ticks)
    forward = steps[steps > 0]
    if not forward.size:
        return _even(count, 1 / packets.rate)
    if packets.decode_times:  # the right times in decoding order: sorted they fit the frames
        ticks = np.sort(ticks)
        step = float(np.median(np.diff(ticks)))
        if np.abs(ticks - ticks[0] - step * np.arange(count)).max() <= step:
            return _even(count, step * packets.tick)
        steps = np.diff(ticks)
    elif (steps < 0).sum() >= _JOINTS * count:
        return _even(count, 1 / packets.rate)
    elif (steps < 0).any() or steps.max() * packets.tick > packets.jump:
        ticks = _joined(ticks, packets.jump / packets.tick, int(np.median(forward)))
    seconds = (ticks - ticks[0]).astype(np.float64) * packets.tick
    return seconds, float(seconds[-1] * count / (count - 1))  # the last frame is shown for the mean time of the others


def _even(count: int, step: float) -> tuple[NDArray[np.float64], float]:
    return np.arange(count, dtype=np.float64) * step, count * step


def _joined(ticks: NDArray[np.int64], jump: float, step: int) -> NDArray[np.int64]:
    """The times of joined recordings as of a single one, `step` between one recording and the next."""
    ticks = ticks.copy()
    for at in (np.flatnonzero(np.diff(ticks) < 0)).tolist():  # a single wrong time is no joint
        if at > 0 and ticks[at - 1] < ticks[at + 1] <= ticks[at - 1] + 4 * step:
            ticks[at] = (ticks[at - 1] + ticks[at + 1]) // 2
    steps = np.diff(ticks)
    for at in (np.flatnonzero((steps < 0) | (steps > jump)) + 1).tolist():
        before = ticks[:at].max() if at else 0
        if steps[at - 1] < 0 and ticks[at : at + _LOCAL].max() > before:  # a few frames out of order
            continue
        ticks[at:] += before + step - ticks[at]
    return np.maximum.accumulate(ticks)
