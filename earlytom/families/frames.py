"""Sampling, geometry and times of frames.


Notation as in `earlytom.families.family`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

FrameSampling = Literal["ends", "middles", "nearest", "begins"]


@dataclass(frozen=True)
class Geometry:
    """Frames of one size, from pixels to visual tokens.

    Attributes:
        size: (height, width) in pixels.
        patch: side of a patch, in pixels.
        grid: (rows, columns) of patches, which enter the tower.
        cells: (rows, columns) of tokens, which reach the LLM.
        step: pictures of the video per frame of the tower.
        depth: encoder layers that run.
        width: D; llm_width: E.
        heads, inner: attention heads of a layer, and the width inside its MLP.
        projector: widths of the projector's layers, from input to output.
        unpooled: whether the projector runs before pooling, on all patches of a frame.
        prefix: tokens per frame inside the tower that are not patches.
        streams: K.
        full: layers with full attention within a frame, ascending; None: all. Only these have received attention
            (`earlytom.spans`).
        pairs: number of query-key pairs in each layer's attention of a frame; None: all T * T.
        gated: whether MLPs are gated: three products, the activated one multiplied by the gate.
        rms: whether a layer's norms are RMS norms, without a shift.
        tokens_per_second: positions per second on the language model's time axis, where a video has one span in a
            prompt (`Family.on_axes`); None if time takes no positions.
    """

    size: tuple[int, int]
    patch: int
    grid: tuple[int, int]
    cells: tuple[int, int]
    step: int
    depth: int
    width: int
    llm_width: int
    heads: int
    inner: int
    projector: tuple[int, ...]
    unpooled: bool = False
    prefix: int = 0
    streams: int = 0
    full: tuple[int, ...] | None = None
    pairs: tuple[int, ...] | None = None
    gated: bool = False
    rms: bool = False
    tokens_per_second: float | None = None

    @property
    def token_width(self) -> int:
        """E."""
        return self.llm_width * (1 + self.streams)

    @property
    def patches(self) -> int:
        """S."""
        return math.prod(self.grid)

    @property
    def tokens_per_frame(self) -> int:
        """P."""
        return math.prod(self.cells)

    @property
    def projector_rows(self) -> int:
        """Rows of a frame in the projector."""
        return self.patches if self.unpooled else self.tokens_per_frame

    @property
    def layer_weights(self) -> int:
        """Parameters of an encoder layer: attention, MLP, two norms."""
        width, inner, into = self.width, self.inner, 1 + self.gated
        mlp = into * inner * (width + 1) + width * (inner + 1)
        return 4 * width * (width + 1) + mlp + (2 if self.rms else 4) * width


class FrameTimes(NamedTuple):
    """The times of a video's sampled frames.

    Attributes:
        seconds: of each, from the video's first frame.
        duration: of the video, in seconds.
    """

    seconds: tuple[float, ...]
    duration: float
