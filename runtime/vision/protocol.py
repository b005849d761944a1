"""What every vision backend can do, whichever library runs it and in whatever order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """What an engine makes of a clip; names as in `runtime.engine.layout`, of several videos all with a leading B.

    Attributes:
        tokens: [N, D] in the dtype of the graph.
        positions: [N] int64, `f * P + cell`, f counted among the F' frames that are left.
        sources: [F', F] fp32, what each of these is made of.
        place: [N] int64, `frame of the video * P + cell`.
        bias: [N] fp32, the logarithm of how many of the video's tokens each stands for.
    """

    tokens: Tensor
    positions: Tensor
    sources: Tensor
    place: Tensor
    bias: Tensor

    def each(self) -> list[Encoded]:
        """Of several videos, those of each."""
        return [Encoded(*values) for values in zip(*(value.unbind() for value in self), strict=True)]


class VisionBackend(Protocol):
    """One loaded vision engine; tensors as in `runtime.engine.layout`.

    `batch` is B, the videos that it takes at once; where that is more than 1 it is a `BatchedVision`. Frames may be on
    the CPU, or on `device`, where it runs.

    The tensors that `encode` returns belong to the backend: they are valid until the next `encode` or `close`, which
    writes over them. Splice them into the prompt (a copy anyway) or clone them before that. One call at a time: a
    backend refuses a second one while the first is under way with RuntimeError.
    """

    name: str
    batch: int
    device: torch.device

    def encode(self, frames: Tensor) -> Encoded:
        """Visual tokens of one clip.

        Args:
            frames: uint8 [F, 3, H, W], RGB; where `batch` is more than 1 [B, F, 3, H, W].

        Raises:
            EngineError: frames of another shape or dtype.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; it cannot be used afterwards. A second call does nothing."""
        ...


class BatchedVision(VisionBackend, Protocol):
    """A backend for several videos at once."""

    def encode_several(self, clips: Sequence[Tensor]) -> list[Encoded]:
        """Visual tokens of each of 1 to `batch` clips uint8 [F, 3, H, W], in one run.

        They are valid as long as those of `encode`, all together.

        Raises:
            EngineError: too many clips or none, frames of another shape or dtype.
        """
        ...


def encode_one(vision: VisionBackend, frames: Tensor) -> Encoded:
    """Visual tokens of one clip uint8 [F, 3, H, W], however many videos the backend takes at once."""
    if vision.batch == 1:
        return vision.encode(frames)
    return cast(BatchedVision, vision).encode_several([frames])[0]
