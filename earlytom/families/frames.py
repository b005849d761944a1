"""A frame on its way to the LLM: which are shown, what their sizes are, and when each was.

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
        step: pictures of the video that the tower takes for one frame.
        depth: encoder layers that run.
        width: D; llm_width: E.
        heads, inner: attention heads of a layer, and the width inside its MLP.
        projector: widths of the projector's layers, from what enters to what comes out.
        unpooled: the projector runs before pooling, on all patches of a frame.
        prefix: tokens a frame inside the tower that are not patches.
        streams: K.
        full: layers whose attention sees whole frames, ascending; None: all. Of the others received attention says
            nothing (`earlytom.spans`).
        pairs: of each layer, how many pairs of a query and a key meet in the attention of a frame; None: all.
        gated: whether an MLP has three products: two of its input are multiplied, one of them behind the activation.
        rms: whether the norms of a layer are RMS norms, which shift nothing.
        tokens_per_second: positions that a second takes on the language model's axis of time, where a video has one
            span in a prompt (`Family.on_axes`); None where it takes none.
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
        """Rows of a frame that go through the projector."""
        return self.patches if self.unpooled else self.tokens_per_frame

    @property
    def layer_weights(self) -> int:
        """How many values the weights of an encoder layer have: attention, MLP, two norms."""
        width, inner, into = self.width, self.inner, 1 + self.gated
        mlp = into * inner * (width + 1) + width * (inner + 1)
        return 4 * width * (width + 1) + mlp + (2 if self.rms else 4) * width


class FrameTimes(NamedTuple):
    """When the frames of a video that are shown were.

    Attributes:
        seconds: of each, from its first frame.
        duration: of the video, in seconds.
    """

    seconds: tuple[float, ...]
    duration: float
