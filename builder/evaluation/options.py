"""Defaults of a measurement, as shown on its command line."""

from __future__ import annotations

from typing import NamedTuple

RATIOS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.50)
MAIN_RATIO = 0.1  # of the paper's headline figure
# Default, and the least for a record.
CLIPS = 2000
FULL = "full"  # the row of all tokens, with which all others are compared
FEWER = "fewer-frames"  # of long clips: all tokens of as many frames as the model was trained with
AUTO = "auto"  # an engine to build, or find built, for the measurement


class Merging(NamedTuple):
    """Merge layers, and the frames kept at each: a share, or a count for each layer."""

    layers: tuple[int, ...]
    frames: float | tuple[int, ...]

    def __str__(self) -> str:
        frames = self.frames if isinstance(self.frames, tuple) else (self.frames,)
        return ":".join(",".join(map(str, numbers)) for numbers in (self.layers, frames))
