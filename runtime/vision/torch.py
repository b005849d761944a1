"""The reference backend: the checkpoint's own vision tower in PyTorch, with the settings of the engine folder.

Runs anywhere PyTorch does, in the precision of its weights: as the reference for engines, and on machines for which no
engine was built. `TorchVision` takes whole clips, `TorchChunked` also the frames of a clip as they arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from earlytom.encoder import VisualTokens, checked_depth, encode, head, rest
from earlytom.families import Vision, family_of
from earlytom.methods import method_of, several
from earlytom.settings import MethodSettings
from runtime.checkpoint import Checkpoint, VisionPart, load_vision
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from runtime.gpu.streams import Here
from runtime.vision.by_frames import ByFrames
from runtime.vision.chunked import CHUNK, ChunkedVision, Room
from runtime.vision.frames import batch_of, check_clips, check_frames
from runtime.vision.protocol import Encoded, VisionBackend


class TorchVision:
    """A checkpoint's vision tower and projector as a `VisionBackend`.

    Args:
        checkpoint: from `runtime.checkpoint.describe`.
        config: the method's settings; any schedule.
        shape: [F, 3, H, W] of its input frames; [B, F, 3, H, W] for B > 1 videos.
        device, dtype: where and in which precision it runs.
        part: the model, if loaded already; default: loaded from the checkpoint.

    Attributes:
        batch: B.
        device: as given.
    """

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: MethodSettings,
        shape: tuple[int, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
        part: VisionPart | None = None,
    ) -> None:
        self.config = config
        self.shape = shape
        self.batch = batch_of(shape)
        if self.batch > 1:
            several(method_of(config), self.batch)  # refuses settings that cannot be batched
        self.family = family_of(checkpoint.config)
        self.depth = self.family.geometry(checkpoint.config).depth
        self.part: VisionPart | None = part or load_vision(checkpoint, dtype).to(device)  # None once closed
        self.device, self.dtype = torch.device(device), dtype
        pixels = checkpoint.preprocessing
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (pixels.mean, pixels.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def encode(self, frames: Tensor) -> Encoded:
        """Visual tokens of frames uint8 [F, 3, H, W]; new tensors, so calls may overlap.

        All have a leading B where it takes several videos.
        """
        check_frames(frames, self.shape)
        return self._encode(frames.flatten(0, -4), self.batch)

    def encode_several(self, clips: Sequence[Tensor]) -> list[Encoded]:
        """Visual tokens of each of 1 to B clips uint8 [F, 3, H, W], in one run of as many.

        Errors as those of `encode`.
        """
        check_clips(clips, self.shape)
        found = self._encode(torch.cat(list(clips)), len(clips))
        return [found] if len(clips) == 1 else found.each()

    def _encode(self, frames: Tensor, videos: int) -> Encoded:
        method = method_of(self.config)
        deciding = method if videos == 1 else several(method, videos)
        return _of(encode(self.vision, self.pixels(frames), deciding, depth=self.depth))

    @property
    def vision(self) -> Vision:
        """The model, as `earlytom.encoder` takes it. Raises RuntimeError once closed."""
        part = _part(self)
        return self.family.vision(part.vision_tower, part.projector)

    def pixels(self, frames: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] to normalised pixels, on the model's device and in its dtype."""
        return (frames.to(self.scale.device).float() * self.scale + self.shift).to(self.dtype)

    def close(self) -> None:
        """Free the weights; a second call does nothing."""
        self.part = None


class TorchChunked(ChunkedVision):
    """A `TorchVision` that takes a clip in chunks; see `runtime.vision.chunked`.

    Args:
        vision: the backend whose model runs; closed with this one.
        chunk: C, any number of frames up to those of a clip.
    """

    def __init__(self, vision: TorchVision, chunk: int = CHUNK) -> None:
        if vision.batch > 1:
            raise EngineError(
                f"clips in chunks are one video at a time, and this takes {vision.batch}: leave out --batch"
            )
        whole = cast(tuple[int, int, int, int], vision.shape)
        super().__init__(vision.name, whole, chunk, lambda shape: Here(vision.scale.device, shape, kept=True))
        self._vision = vision
        assert self._lane.frames is not None
        self._sample = self._head(self._lane.frames)  # for the shapes of the head's outputs; also a warm-up

    def _make_room(self) -> Room:
        hidden, received = (
            None if value is None else value.new_zeros(self.shape[0], *value.shape[1:]) for value in self._sample
        )
        assert hidden is not None
        return Room(hidden, received)

    @torch.no_grad()
    def _head(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        vision = self._vision
        tower, method = vision.vision.tower, method_of(vision.config)
        return head(tower, vision.pixels(frames), method, checked_depth(tower, method, vision.depth))

    @torch.no_grad()
    def _rest(self, room: Room) -> Encoded:
        vision = self._vision
        return _of(rest(vision.vision, room.hidden, room.received, method_of(vision.config), vision.depth))

    def _free(self) -> None:
        self._vision.close()


def open_torch(
    checkpoint: Checkpoint,
    manifest: Manifest,
    *,
    device: torch.device,
    dtype: torch.dtype,
    frames: Sequence[int] | None = None,
) -> VisionBackend:
    """Open a checkpoint's vision tower with the settings and shapes of an engine, as `open_backend` opens the engine.

    Args:
        manifest: of the engine: its frame counts (the model is loaded once), batch and chunk.
        device, dtype: where and in which precision it runs.
        frames: only these frame counts; default: all.
    """
    config = manifest.settings
    videos = () if manifest.batch == 1 else (manifest.batch,)
    backends: dict[int, VisionBackend] = {}
    part: VisionPart | None = None
    for count in frames or manifest.counts:
        shape = (*videos, manifest.at(count).frames, 3, *manifest.model.preprocessing.size)
        vision = TorchVision(checkpoint, config, shape, device=device, dtype=dtype, part=part)
        backends[count], part = vision if manifest.chunk is None else TorchChunked(vision, manifest.chunk), vision.part
    return next(iter(backends.values())) if len(backends) == 1 else ByFrames(backends)


def _of(visual: VisualTokens) -> Encoded:
    return Encoded(visual.tokens, visual.positions, visual.sources, visual.place, visual.bias)


def _part(vision: TorchVision) -> VisionPart:
    if vision.part is None:
        raise RuntimeError("this vision backend is closed")
    return vision.part
