"""Backends that take chunks, small enough to run hundreds of clips: a tiny tower in PyTorch, and one that is uneven."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from earlytom.config import EarlyTomConfig
from earlytom.families import LLAVA_ONEVISION
from runtime.vision import Encoded
from runtime.vision.chunked import ChunkedVision, Room
from runtime.vision.torch import TorchChunked, TorchVision
from tests.earlytom.tiny import PATCH, tiny_projector, tiny_tower

SIDE = 5 * PATCH


class TinyVision(TorchVision):
    """A `TorchVision` around a tiny random tower."""

    def __init__(
        self, frames: int, *, family: str = "siglip", layers: tuple[int, ...] = (1, 2), **settings: Any
    ) -> None:
        usual: dict[str, Any] = {"retention_ratio": 0.4, "tau": 0.5, "schedule": "budget"}
        self.config = EarlyTomConfig(merge_layers=layers, **(usual | settings))
        self.shape = (frames, 3, SIDE, SIDE)
        self.batch = 1
        self.family, self.depth = LLAVA_ONEVISION, 4
        self.part: Any = SimpleNamespace(vision_tower=tiny_tower(family), projector=tiny_projector())
        self.dtype = torch.float32
        self.scale, self.shift = torch.full((1, 3, 1, 1), 1 / 127.5), torch.full((1, 3, 1, 1), -1.0)


def tiny_chunked(frames: int, chunk: int, **settings: Any) -> TorchChunked:
    return TorchChunked(TinyVision(frames, **settings), chunk)


class Toy(ChunkedVision):
    """A head that scales its frames, and a rest that sees their order; `uneven`: a place in the chunk counts, too.

    `calls` has the frames of each head call, by their first value.
    """

    def __init__(self, frames: int, chunk: int, *, uneven: bool = False, size: int = 2) -> None:
        super().__init__("toy", (frames, 3, size, size), chunk)
        self.uneven = uneven
        self.calls: list[list[int]] = []

    def _make_room(self) -> Room:
        frames, _, height, width = self.shape
        return Room(torch.zeros(frames, 3, height * width), torch.zeros(frames, 3))

    def _head(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(frames[:, 0, 0, 0].tolist())
        hidden = frames.flatten(2).float() * 2
        if self.uneven:
            hidden += torch.arange(len(frames))[:, None, None] / 1000
        return hidden, hidden.mean(2)

    def _rest(self, room: Room) -> Encoded:
        assert room.received is not None
        place = torch.arange(len(room.hidden)) + 1
        tokens = (room.hidden * place[:, None, None]).sum(0) + room.received.cumsum(0).prod(0)[:, None] / 1e6
        return Encoded(tokens, place, torch.eye(len(place)), place, place.float())

    def _free(self) -> None:
        self.uneven = False
