"""One backend for each of several frame counts, chosen by the number of frames of a call.

All are loaded up front, so that no request waits for loading. Each has its own buffers: a call's outputs are valid
until the next call with the same number of frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from runtime.errors import EngineError
from runtime.vision.protocol import BatchedVision, Encoded, VisionBackend


class ByFrames:
    """A `VisionBackend` that dispatches to others.

    Args:
        backends: by frame count; at least one, all of the same library and batch.

    Attributes:
        name, batch, device: those of the backends.
        counts: the frame counts, ascending.
    """

    def __init__(self, backends: Mapping[int, VisionBackend]) -> None:
        self._backends = dict(sorted(backends.items()))
        first = next(iter(self._backends.values()))
        self.name = first.name
        self.batch = first.batch
        self.device = first.device
        self.counts = tuple(self._backends)

    def encode(self, frames: Tensor) -> Encoded:
        """`encode` of the backend for F frames: uint8 [F, 3, H, W], or [B, F, 3, H, W]."""
        return self._backend(frames).encode(frames)

    def encode_several(self, clips: Sequence[Tensor]) -> list[Encoded]:
        """Visual tokens of each clip, in the order of the clips; clips with the same frame count run together."""
        if not 1 <= len(clips) <= self.batch:
            raise EngineError(f"this engine takes 1 to {self.batch} clips at once, got {len(clips)}")
        groups: dict[int, list[int]] = {}
        for place, clip in enumerate(clips):
            self._backend(clip)
            groups.setdefault(clip.shape[-4], []).append(place)
        found: dict[int, Encoded] = {}
        for count, places in groups.items():
            backend = cast(BatchedVision, self._backends[count])
            found.update(zip(places, backend.encode_several([clips[place] for place in places]), strict=True))
        return [found[place] for place in range(len(clips))]

    def close(self) -> None:
        """Close all of them; a second call does nothing."""
        for backend in self._backends.values():
            backend.close()

    def _backend(self, frames: Tensor) -> VisionBackend:
        count = frames.shape[-4] if frames.dim() >= 4 else 0
        if count not in self._backends:
            counts = " or ".join(map(str, self.counts))
            raise EngineError(
                f"this engine takes clips of {counts} frames, got frames {list(frames.shape)}: sample one of these "
                "counts, or build another engine with python -m builder.build --frames"
            )
        return self._backends[count]
