"""The interface of all vision backends, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """An engine's outputs for one clip; for B videos, each with a leading B.

    Attributes:
        tokens: [N, D] in the dtype of the graph.
        positions: [N] int64, `f * P + cell`, f among the F' frames left after merging.
        sources: [F', F] fp32, the weight of each of the clip's frames in each frame left.
        place: [N] int64, `frame of the video * P + cell`.
        bias: [N] fp32, log of the number of the video's tokens that each stands for.
    """

    tokens: Tensor
    positions: Tensor
    sources: Tensor
    place: Tensor
    bias: Tensor

    def each(self) -> list[Encoded]:
        """The outputs of each video of a batch."""
        return [Encoded(*values) for values in zip(*(value.unbind() for value in self), strict=True)]


class VisionBackend(Protocol):
    """One loaded vision engine; tensors as in `runtime.engine.layout`.

    `batch` is B, the videos of one call; with B > 1 the backend is a `BatchedVision`. Frames may be on the CPU or on
    `device`, where the backend runs.

    Unless a backend says otherwise, it owns the tensors that `encode` returns, and the next `encode` overwrites them:
    splice them into the prompt (a copy anyway) or clone them before. A second call during one raises RuntimeError.
    """

    name: str
    batch: int
    device: torch.device

    def encode(self, frames: Tensor) -> Encoded:
        """Visual tokens of one clip.

        Args:
            frames: uint8 [F, 3, H, W], RGB; with B > 1 [B, F, 3, H, W].

        Raises:
            EngineError: frames of another shape or dtype.
        """
        ...

    def close(self) -> None:
        """Free the backend; a second call does nothing. Tensors returned before stay readable."""
        ...


class BatchedVision(VisionBackend, Protocol):
    """A backend for several videos at once."""

    def encode_several(self, clips: Sequence[Tensor]) -> list[Encoded]:
        """Visual tokens of 1 to `batch` clips uint8 [F, 3, H, W] each, in one run; valid as those of `encode`.

        Raises:
            EngineError: too many clips or none, frames of another shape or dtype.
        """
        ...


def encode_one(vision: VisionBackend, frames: Tensor) -> Encoded:
    """Visual tokens of one clip uint8 [F, 3, H, W], whatever the backend's batch."""
    if vision.batch == 1:
        return vision.encode(frames)
    return cast(BatchedVision, vision).encode_several([frames])[0]
