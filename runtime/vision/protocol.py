"""What every vision backend can do, whichever library runs it and in whatever order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor


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

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens of one clip.

        Args:
            frames: uint8 [F, 3, H, W], RGB; where `batch` is more than 1 [B, F, 3, H, W].

        Returns:
            tokens [N, D] in the dtype of the graph, positions int64 [N]; likewise with a leading B.

        Raises:
            EngineError: frames of another shape or dtype.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; it cannot be used afterwards. A second call does nothing."""
        ...


class BatchedVision(VisionBackend, Protocol):
    """A backend for several videos at once."""

    def encode_several(self, clips: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Tokens [N, D] and positions [N] of each of 1 to `batch` clips uint8 [F, 3, H, W], in one run.

        They are valid as long as those of `encode`, all together.

        Raises:
            EngineError: too many clips or none, frames of another shape or dtype.
        """
        ...


def encode_one(vision: VisionBackend, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [N, D] and positions [N] of one clip uint8 [F, 3, H, W], however many videos the backend takes at once."""
    if vision.batch == 1:
        return vision.encode(frames)
    return cast(BatchedVision, vision).encode_several([frames])[0]
