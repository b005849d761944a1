"""The vision tower's passes over one clip, each run once.

Merging frames depends on the settings of Stage I only, and selecting tokens comes after the tower. So all retention
ratios of one way of merging share a pass, and so do the controls that choose among the tokens of the unmerged clip.
`Pass.select` makes of a pass exactly what `earlytom.encode_video` gives at that ratio.

Notation: F frames, F' frames left, P tokens a frame after pooling, E width of the decoder, N tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlytom.budget import pooled_side
from earlytom.config import EarlyTomConfig
from earlytom.encoder import Decisions, encode
from earlytom.model import feature_depth
from earlytom.select import select_tokens
from earlytom.towers import tower_of
from runtime.checkpoint import Checkpoint, VisionPart


@dataclass(frozen=True)
class Pass:
    """What one way of merging frames leaves of a clip, before any token is dropped.

    Attributes:
        features: [F', P, E] projected and pooled.
        relevance: [F', P] received attention of the deciding layer, pooled.
        segments: [G, 2] final segments of the F' frames, inclusive.
        stages: frames before the first merge and after each one.
    """

    features: Tensor
    relevance: Tensor
    segments: Tensor
    stages: tuple[int, ...]

    @property
    def tokens(self) -> Tensor:
        """[F' * P, E]: all of them, in time and raster order."""
        return self.features.flatten(0, 1)

    def select(self, ratio: float, schedule: str) -> Tensor:
        """[N, E]: Stage II at a retention ratio, as `earlytom.encoder` applies it."""
        tokens, _ = select_tokens(
            self.features, self.relevance, self.segments, frames_in=self.stages[0], ratio=ratio, schedule=schedule
        )
        return tokens


class Vision:
    """The vision part of a model, ready for clips: normalised pixels in, passes out.

    Attributes:
        depth: encoder layers that run.
        side: g, tokens along one side of a frame after pooling.
    """

    def __init__(self, part: VisionPart, checkpoint: Checkpoint) -> None:
        vision: Any = checkpoint.config.vision_config
        self.depth = feature_depth(checkpoint.config)
        self.side = pooled_side(vision.image_size // vision.patch_size)
        self._tower, self._projector = tower_of(part.vision_tower), part.projector
        pixels = checkpoint.preprocessing
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (pixels.mean, pixels.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def encode(self, frames: Tensor, config: EarlyTomConfig) -> Pass:
        """One pass over uint8 frames [F, 3, H, W]; the retention ratio of `config` plays no part."""
        trace: dict[str, Tensor] = {}
        whole = config.replace(retention_ratio=1.0)
        pixels = frames.float() * self._scale + self._shift  # as the runtime's reference backend makes them
        visual = encode(self._tower, self._projector, pixels, whole, Decisions(whole), depth=self.depth, trace=trace)
        return Pass(trace["features"], trace["relevance"], visual.segments, visual.frames_per_stage)


class ClipPasses:
    """The passes over one clip, each run when it is first asked for.

    Attributes:
        frames: uint8 [F, 3, H, W].
        number: the clip's index in its split; seeds what is drawn at random for it.
        side: g, tokens along one side of a frame after pooling.
    """

    def __init__(self, vision: Vision, frames: Tensor, number: int) -> None:
        self.frames, self.number, self.side = frames, number, vision.side
        self._vision = vision
        self._done: dict[EarlyTomConfig, Pass] = {}

    def run(self, config: EarlyTomConfig) -> Pass:
        """The pass with these settings."""
        whole = config.replace(retention_ratio=1.0)
        if whole not in self._done:
            self._done[whole] = self._vision.encode(self.frames, whole)
        return self._done[whole]

    def some_frames(self, times: Sequence[int], config: EarlyTomConfig) -> Tensor:
        """[len(times), P, E]: features of some of the frames, nothing merged.

        Frames do not see one another in the tower. So they are taken from the pass over the whole clip if it was run
        anyway; if not, only they are encoded.
        """
        whole = config.replace(retention_ratio=1.0)
        if whole in self._done:
            return self._done[whole].features[list(times)]
        return self._vision.encode(self.frames[list(times)], whole).features
