"""Qwen2.5-VL's tower: Qwen3-VL's without learned positions and deepstack, but with window attention.

From the embedding to the projector patches are in window order, which `Qwen25VlVision` undoes. The layers in `full`
attend to whole frames and can give received attention; the others attend within windows.

Notation as in `earlytom.families.qwen2_5_vl.windows`; F frames, D tower width, H heads, d channels a head.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_position_ids

from earlytom.families.qwen2_5_vl.windows import bands, order
from earlytom.families.qwen3_vl.grid import SIDE
from earlytom.families.qwen3_vl.pixels import frame_patches
from earlytom.families.qwen3_vl.tower import Qwen3VlTower, Qwen3VlVision
from earlytom.families.vision import Features


class WindowPlaces(NamedTuple):
    """The window order of a grid's patches, and their angles in it.

    Attributes:
        order: [S / m^2] int64 from `windows.order`; back: its inverse.
        cos, sin: [S, d] fp32 of the patches' rotary angles, in window order.
    """

    order: Tensor
    back: Tensor
    cos: Tensor
    sin: Tensor


class Qwen25VlTower(Qwen3VlTower):
    """Two pictures a frame, a rotary embedding over rows and columns, window attention in most layers."""

    def __init__(self, model: nn.Module) -> None:
        config = cast(Any, model).config
        self.full = tuple(config.fullatt_block_indexes)
        self._side: int = config.window_size // SIDE // config.patch_size
        super().__init__(model)
        self._whole = {id(self.parts(self.layers[at]).attention) for at in self.full}

    def windows(self, device: torch.device) -> WindowPlaces:
        """The places of `grid`."""
        config = self.model.config
        rope = tuple(config.rope_parameters.items())
        return _places(config.hidden_size // config.num_heads, rope, self.grid, self._side, str(device))

    def angles(self, device: torch.device) -> tuple[Tensor, Tensor]:
        places = self.windows(device)
        return places.cos, places.sin

    def embed(self, pixels: Tensor) -> Tensor:
        patch: int = self.model.config.patch_size
        self.grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        patches = frame_patches(pixels, patch).flatten(2)
        parts: Any = self.embeddings
        embedded = parts.patch_embed(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return by_cell(embedded).index_select(1, self.windows(pixels.device).order).flatten(1, 2)

    def attention(self, module: Any, hidden: Tensor, receive: bool) -> tuple[Tensor, Tensor | None]:
        if id(module) in self._whole:
            return super().attention(module, hidden, receive)
        assert not receive  # callers look at `full` first
        return self._in_windows(module, hidden), None

    def _in_windows(self, module: Any, entering: Tensor) -> Tensor:
        """`attention` within windows; windows of one size are a batch of one fused operator."""
        scale, given, out = module.head_dim**-0.5, self.heads(module, entering), []
        found = bands(self.grid, self._side)
        for band, *parts in zip(found, *(part.split([one.patches for one in found], 2) for part in given), strict=True):
            row = band.patches // band.rows
            rows = [part.unflatten(2, (band.rows, row)) for part in parts]  # [F, H, rows, patches, d]
            split = [one.split([row - band.rest, band.rest], dim=3) for one in rows]
            made = []
            for at, count, size in ((0, band.whole, band.size), (1, 1, band.rest)):
                if not count * size:
                    continue
                each = [one[at].unflatten(3, (count, size)).permute(0, 2, 3, 1, 4, 5).flatten(0, 2) for one in split]
                attended = nn.functional.scaled_dot_product_attention(each[0], each[1], each[2], scale=scale)
                # [F * rows * count, H, size, d] to [F, rows, patches, D]
                made.append(attended.transpose(1, 2).flatten(2).unflatten(0, (-1, band.rows, count)).flatten(2, 3))
            out.append(torch.cat(made, dim=2).flatten(1, 2))
        return torch.cat(out, dim=1)


class Qwen25VlVision(Qwen3VlVision):
    """Joins 2 x 2 patches and projects them; tokens are in raster order again."""

    def __init__(self, tower: Qwen25VlTower, projector: Any) -> None:
        super().__init__(tower, projector)
        self._windowed = tower

    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        found = super().features(hidden, received)
        return found._replace(features=found.features.index_select(1, self._windowed.windows(hidden.device).back))

    def pool(self, values: Tensor) -> Tensor:
        return super().pool(values).index_select(1, self._windowed.windows(values.device).back)


def by_cell(values: Tensor) -> Tensor:
    """[F, S, n] to [F, S / m^2, m^2, n]; a cell's patches are consecutive."""
    return values.unflatten(1, (-1, SIDE**2))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
@torch.no_grad()
def _places(
    head: int, rope: tuple[tuple[str, Any], ...], grid: tuple[int, int], side: int, device: str
) -> WindowPlaces:
    """The places of a grid, for windows of `side` x `side` cells and heads of `head` channels."""
    settings: Any = SimpleNamespace(rope_parameters=dict(rope), head_dim=head)
    angles = Qwen2_5_VLVisionRotaryEmbedding(settings)(
        torch.empty(0), get_vision_position_ids(torch.tensor([[1, *grid]]), SIDE)
    )
    place = order(grid, side)
    cos, sin = (by_cell(angle[None])[0, place].flatten(0, 1) for angle in angles)
    return WindowPlaces(*(value.to(device) for value in (place, place.argsort(), cos, sin)))
