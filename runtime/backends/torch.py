"""The reference backend: the checkpoint's own vision part in PyTorch, with the settings of the engine folder.

Runs anywhere PyTorch does, in the precision of its weights. It exists to compare engines with, and for machines for
which no engine was built.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlytom.config import EarlyTomConfig
from earlytom.encoder import encode_video
from earlytom.model import feature_depth
from runtime import contract
from runtime.checkpoint import Checkpoint, VisionPart, load_vision


class TorchVision:
    """The vision part of a checkpoint as a backend; see `VisionBackend`.

    Args:
        checkpoint: from `runtime.checkpoint.describe`.
        config: the method's settings; any schedule.
        shape: [F, 3, H, W] of the frames it will be given.
        device, dtype: where and in which precision it runs.

    Raises:
        UserError: as `runtime.checkpoint.load_vision`.
    """

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EarlyTomConfig,
        shape: tuple[int, int, int, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.shape = shape
        self.depth = feature_depth(checkpoint.config)
        self.part: VisionPart | None = load_vision(checkpoint, dtype).to(device)  # None once closed
        self.dtype = dtype
        pixels = checkpoint.preprocessing
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (pixels.mean, pixels.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens [N, D] and positions [N] of frames uint8 [F, 3, H, W]; new tensors, so calls may overlap.

        Raises:
            EngineError: frames of another shape or dtype.
            RuntimeError: called after `close`.
        """
        contract.check_frames(frames, self.shape)
        part = self.part
        if part is None:
            raise RuntimeError("this vision backend is closed")
        pixels = (frames.to(self.scale.device).float() * self.scale + self.shift).to(self.dtype)
        visual = encode_video(part.vision_tower, part.projector, pixels, self.config, depth=self.depth)
        return visual.tokens, visual.positions

    def close(self) -> None:
        """Free the weights; a second call does nothing."""
        self.part = None
