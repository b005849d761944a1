"""Qwen2.5-VL's tower and what comes behind it.

Patches stand in window order from the embedding to the projector, which undoes it; a layer of `fullatt_block_indexes`
attends to whole frames, any other within windows. Only the first kind can say which tokens of a frame matter.

Notation as in `earlytom.families.qwen2_5_vl.windows`; F' frames, D tower width, E LLM width.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionRotaryEmbedding,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids

from earlytom.errors import UserError
from earlytom.families.family import Features, Vision
from earlytom.families.qwen2_5_vl.windows import bands, order
from earlytom.families.qwen3_vl.grid import SIDE, STEP, grid_of
from earlytom.families.qwen3_vl.pixels import frame_patches
from earlytom.towers import LayerParts, Tower, add


class Places(NamedTuple):
    """What a grid of patches has instead of positions.

    Attributes:
        order: [S / m^2] as `windows.order`; back: its inverse.
        cos, sin: fp32 [S, d] of the angles of patches in window order, d channels a head.
    """

    order: Tensor
    back: Tensor
    cos: Tensor
    sin: Tensor


class PatchEmbeddings(nn.Module):
    """What patches are embedded by."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.patch_embed = visual.patch_embed


class WindowedTrunk(nn.Module):
    """The tower without what comes behind it; nothing is copied."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.config = visual.config
        self.embeddings, self.blocks = PatchEmbeddings(visual), visual.blocks


class Qwen25VlTower(Tower):
    """Two pictures a frame, a rotary embedding over rows and columns, windows in most layers.

    Attributes:
        grid: (rows, columns) of patches: those of the pixels that were embedded last, before that of the configuration.
        full: layers that attend to whole frames.
    """

    step = STEP
    key_bias_cancels = False  # the rotary embedding turns it

    def __init__(self, model: nn.Module) -> None:
        self.model = trunk = cast(Any, model)
        self.layers = trunk.blocks
        self.full = tuple(trunk.config.fullatt_block_indexes)
        self._whole = {id(trunk.blocks[at]) for at in self.full}
        self._side: int = trunk.config.window_size // SIDE // trunk.config.patch_size
        self.grid = grid_of(trunk.config)
        self.places(next(model.parameters()).device)  # now, and not while somebody traces

    def places(self, device: torch.device) -> Places:
        """Those of `grid`."""
        config = self.model.config
        rope = tuple(config.rope_parameters.items())
        return _places(config.hidden_size // config.num_heads, rope, self.grid, self._side, str(device))

    def parts(self, layer: Any) -> LayerParts:
        return LayerParts(layer.norm1, layer.attn, layer.norm2, layer.mlp)

    def embed(self, pixels: Tensor) -> Tensor:
        patch: int = self.model.config.patch_size
        self.grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        patches = frame_patches(pixels, patch).flatten(2)
        parts: Any = self.embeddings
        embedded = parts.patch_embed(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return by_cell(embedded).index_select(1, self.places(pixels.device).order).flatten(1, 2)

    def heads(self, module: Any, entering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = self.places(entering.device)
        query, key, value = module.qkv(entering).unflatten(-1, (3, -1, module.head_dim)).unbind(-3)  # [F, S, H, d]
        query, key = apply_rotary_pos_emb_vision(query, key, places.cos, places.sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def compared(self, module: Any, entering: Tensor) -> tuple[Tensor, Tensor]:
        query, key, _ = self.heads(module, entering)
        return query, key

    def received(self, layer: Any, hidden: Tensor) -> Tensor:
        self._refuse_windows(layer)
        return super().received(layer, hidden)

    def run_layer(self, layer: Any, hidden: Tensor, *, receive: bool = False) -> tuple[Tensor, Tensor | None]:
        module, entering = self.attention_input(layer, hidden)
        received = None
        if receive:
            self._refuse_windows(layer)
        if id(layer) in self._whole:
            attended, received = self.attention(module, entering, receive)
        else:
            attended = self._in_windows(module, entering)
        hidden = add(hidden, layer.attn.proj(attended))
        return add(hidden, layer.mlp(layer.norm2(hidden))), received

    def _in_windows(self, module: Any, entering: Tensor) -> Tensor:
        """`attention` within windows: those of one size are a batch, so that each is one fused operator."""
        scale, given, out = module.head_dim**-0.5, self.heads(module, entering), []
        found = bands(self.grid, self._side)
        for band, *parts in zip(found, *(part.split([one.patches for one in found], 2) for part in given), strict=True):
            row = band.patches // band.rows
            rows = [part.unflatten(2, (band.rows, row)) for part in parts]  # [F, H, rows, patches, d]
            split = [one.split([row - band.rest, band.rest], dim=3) for one in rows]
            kinds = [(n, size) for n, size in ((band.whole, band.size), (1, band.rest)) if n and size]
            made = []
            for at, (count, size) in zip((0, 1) if band.whole else (1,), kinds, strict=False):
                each = [one[at].unflatten(3, (count, size)).permute(0, 2, 3, 1, 4, 5).flatten(0, 2) for one in split]
                attended = nn.functional.scaled_dot_product_attention(*each, scale=scale)  # [F * rows * n, H, size, d]
                made.append(attended.transpose(1, 2).flatten(2).unflatten(0, (-1, band.rows, count)).flatten(2, 3))
            out.append(torch.cat(made, dim=2).flatten(1, 2))
        return torch.cat(out, dim=1)

    def _refuse_windows(self, layer: Any) -> None:
        if id(layer) not in self._whole:
            at = next(number for number, one in enumerate(self.layers) if one is layer)
            raise UserError(
                f"layer {at} of this tower attends within windows, so it cannot say which tokens of a frame matter: "
                f"let --merge-layers end with one of {', '.join(map(str, self.full))}"
            )


class Qwen25VlVision(Vision):
    """Patches joined two by two and projected; cells row by row again."""

    def __init__(self, tower: Qwen25VlTower, projector: nn.Module) -> None:
        super().__init__(tower)
        self.projector, self._windowed = projector, tower

    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        places, (rows, columns) = self._windowed.places(hidden.device), self._windowed.grid
        projected = self.projector(hidden.contiguous()).unflatten(0, (len(hidden), -1))
        features = projected.index_select(1, places.back)
        relevance = None
        if received is not None:
            relevance = self.pool(received[:, :, None])[:, :, 0].index_select(1, places.back)
        return Features(features, relevance, projected, (rows // SIDE, columns // SIDE))

    def pool(self, values: Tensor) -> Tensor:
        return by_cell(values).mean(2)


def by_cell(values: Tensor) -> Tensor:
    """[F, S, n] to [F, S / m^2, m^2, n]; patches of a cell follow one another."""
    return values.unflatten(1, (-1, SIDE**2))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
@torch.no_grad()
def _places(head: int, rope: tuple[tuple[str, Any], ...], grid: tuple[int, int], side: int, device: str) -> Places:
    """Those of a grid, in windows of `side` x `side` cells and heads of `head` channels."""
    settings: Any = SimpleNamespace(rope_parameters=dict(rope), head_dim=head)
    angles = Qwen2_5_VLVisionRotaryEmbedding(settings)(
        torch.empty(0), get_vision_position_ids(torch.tensor([[1, *grid]]), SIDE)
    )
    place = order(grid, side)
    cos, sin = (by_cell(angle[None])[0, place].flatten(0, 1) for angle in angles)
    return Places(*(value.to(device) for value in (place, place.argsort(), cos, sin)))
