"""The vision tower's passes over one clip, each run once and shared.

Tokens are selected after the projector, so all retention ratios of one way of merging share a pass, as do the controls
that select from the unmerged clip. `Pass.choose` gives exactly the tokens, places and bias of `earlytom.encoder.encode`
with that method.

Notation: F frames, F' frames left, P tokens a frame after pooling, E width of the decoder, N tokens kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlytom.encoder import encode
from earlytom.families import Vision, family_of
from earlytom.method import Method, State
from runtime.checkpoint import Checkpoint, VisionPart
from runtime.measure.clock import timed


@dataclass(frozen=True)
class KeptTokens:
    """The tokens that a method keeps of a pass.

    Attributes:
        tokens: [N, E].
        place: [N] int64, `frame of the video * P + cell`.
        bias: [N] fp32, see `earlytom.standing`.
    """

    tokens: Tensor
    place: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Pass:
    """A clip's features after merging, before selection.

    Attributes:
        features: [F', P, E] projected and pooled.
        relevance: [F', P] received attention of the watched layer, pooled; None if there is none.
        state: of the run.
    """

    features: Tensor
    relevance: Tensor | None
    state: State

    @property
    def stages(self) -> tuple[int, ...]:
        """Frames before the first merge and after each one."""
        return tuple(self.state.stages)

    @property
    def ran(self) -> tuple[tuple[int, int], ...]:
        """See `earlytom.method.State`."""
        return self.state.ran

    def choose(self, method: Method) -> KeptTokens:
        """The tokens that a method keeps, in time and raster order."""
        tokens, positions = method.choose(self.features, self.relevance, self.state)
        return KeptTokens(tokens, *method.standing(self.features, positions, self.state))


class _Watched:
    """A method that stores the state of its run."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self.state: State | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def begin(self, vision: Vision, frames: int, device: torch.device) -> State:
        self.state = self._method.begin(vision, frames, device)
        return self.state


class VisionPass:
    """The vision part of a model: frames to passes.

    Attributes:
        depth: number of encoder layers that run.
        cells: P; patches: tokens a frame before pooling.
    """

    def __init__(self, part: VisionPart, checkpoint: Checkpoint) -> None:
        family = family_of(checkpoint.config)
        frame = family.geometry(checkpoint.config)
        self.depth, self.cells, self.patches = frame.depth, frame.tokens_per_frame, frame.patches
        self._vision = family.vision(part.vision_tower, part.projector)
        self._scale, self._shift = checkpoint.preprocessing.affine()

    def encode(self, frames: Tensor, method: Method) -> Pass:
        """One pass over uint8 frames [F, 3, H, W], with the merging but not the selection of `method`."""
        pixels = frames.float() * self._scale + self._shift  # as in the runtime's reference backend
        trace: dict[str, Tensor] = {}
        watched: Any = _Watched(method)
        encode(self._vision, pixels, watched, depth=self.depth, trace=trace)
        return Pass(trace["features"], trace.get("relevance"), watched.state)


class ClipPasses:
    """The passes over one clip, each run on first use.

    Attributes:
        frames: uint8 [F, 3, H, W].
        number: the clip's index in its split; a seed of random choices.
        cells: P; patches: tokens a frame before pooling.
        seconds: total time of the passes.
    """

    def __init__(self, vision: VisionPass, frames: Tensor, number: int) -> None:
        self.frames, self.number, self.cells, self.patches = frames, number, vision.cells, vision.patches
        self.seconds = 0.0
        self._vision = vision
        self._done: dict[Hashable, Pass] = {}

    def run(self, method: Method) -> Pass:
        """The pass with this method."""
        key = method.tower_key()
        if key not in self._done:
            self._done[key] = self._encode(self.frames, method)
        return self._done[key]

    def some_frames(self, times: Sequence[int], method: Method) -> Tensor:
        """[len(times), P, E]: features of some of the frames; `method` must not merge.

        As frames do not attend to each other in the tower, they come from the pass over the whole clip if there is one;
        otherwise only they are encoded.
        """
        key = method.tower_key()
        if key in self._done:
            return self._done[key].features[list(times)]
        return self._encode(self.frames[list(times)], method).features

    def _encode(self, frames: Tensor, method: Method) -> Pass:
        done, seconds = timed(frames.device, lambda: self._vision.encode(frames, method))
        self.seconds += seconds
        return done
