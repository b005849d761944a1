"""Adapters of transformers' vision towers: SigLIP, SigLIP2 (fixed resolution), CLIP, DINOv2.

Families may share towers; `Family.towers` lists those of a family's checkpoints.

Notation: F frames, S patch tokens, T = S + prefix tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from earlytom.errors import UserError
from earlytom.towers import LayerParts, Tower, add


class SiglipTower(Tower):
    """SigLIP: patches only, learned positions."""


class ClipTower(Tower):
    """CLIP: a leading class token, and a layer norm before the first layer."""

    prefix = 1

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model.pre_layrnorm(self.model.embeddings(pixels))


class Siglip2Tower(Tower):
    """SigLIP2 at a fixed resolution: every frame has the same grid, so there is no padding and no mask."""

    def embed(self, pixels: Tensor) -> Tensor:
        embeddings = self.model.embeddings
        size = embeddings.patch_size
        rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
        patches = pixels.unflatten(2, (rows, size)).unflatten(4, (columns, size))  # [F, C, r, p, c, p]
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [F, S, p*p*C]
        positions = embeddings.position_embedding.weight
        if rows != columns or rows * columns != positions.shape[0]:
            side = embeddings.position_embedding_size
            positions = embeddings.resize_positional_embeddings(
                positions.reshape(side, side, -1), torch.tensor([[rows, columns]]), max_length=rows * columns
            )[0]
        return embeddings.patch_embedding(patches.to(embeddings.patch_embedding.weight.dtype)) + positions


class Dinov2Tower(Tower):
    """DINOv2: a leading class token, and layer scale on both branches."""

    prefix = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = model.encoder.layer  # type: ignore[union-attr, assignment]

    def parts(self, layer: Any) -> LayerParts:
        return LayerParts(layer.norm1, layer.attention, layer.norm2, layer.mlp)

    def run_layer(self, layer: Any, hidden: Tensor, *, receive: bool = False) -> tuple[Tensor, Tensor | None]:
        attended, received = self.attention(*self.attention_input(layer, hidden), receive)
        hidden = add(hidden, layer.layer_scale1(layer.attention.o_proj(attended)))
        return add(hidden, layer.layer_scale2(layer.mlp(layer.norm2(hidden)))), received


TOWERS: dict[str, type[Tower]] = {
    "siglip_vision_model": SiglipTower,
    "siglip2_vision_model": Siglip2Tower,
    "clip_vision_model": ClipTower,
    "dinov2": Dinov2Tower,
}


def tower_of(vision_model: nn.Module) -> Tower:
    """The adapter of a Hugging Face vision model."""
    family = getattr(getattr(vision_model, "config", None), "model_type", type(vision_model).__name__)
    if family not in TOWERS:
        raise UserError(
            f"vision tower {family!r} is not supported: EarlyTom runs on {', '.join(TOWERS)} "
            "(an adapter is one class in earlytom.families.adapters)"
        )
    return TOWERS[family](vision_model)
