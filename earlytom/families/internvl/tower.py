"""InternVL's tower (a ViT with a class token, layer scale on both branches and, in the largest, norms of queries and
keys), pixel shuffle and projector.

Notation as in `earlytom.families.internvl`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from earlytom.families.vision import Features, Vision
from earlytom.towers import LayerParts, Tower, add


class InternVLTower(Tower):
    """A ViT with a leading class token; positions are learned for one grid, that of every frame."""

    prefix = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = model.encoder.layer  # type: ignore[union-attr, assignment]
        self.key_bias_cancels = not self.model.config.use_qk_norm

    def parts(self, layer: Any) -> LayerParts:
        return LayerParts(layer.layernorm_before, layer.attention, layer.layernorm_after, layer.mlp)

    def query(self, module: Any, entering: Tensor) -> Tensor:
        return module.q_norm(module.q_proj(entering))

    def key(self, module: Any, entering: Tensor) -> Tensor:
        return module.k_norm(module.k_proj(entering))

    def embed(self, pixels: Tensor) -> Tensor:
        embeddings = self.model.embeddings
        patches = embeddings.patch_embeddings(pixels)
        first = embeddings.cls_token.expand(len(patches), -1, -1)
        return torch.cat((first, patches), dim=1) + embeddings.position_embeddings

    def run_layer(self, layer: Any, hidden: Tensor, *, receive: bool = False) -> tuple[Tensor, Tensor | None]:
        attended, received = self.attention(*self.attention_input(layer, hidden), receive)
        hidden = add(hidden, layer.lambda_1 * layer.attention.projection_layer(attended))
        return add(hidden, layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden))), received


class InternVLVision(Vision):
    """The tower's last norm, if it has one, pixel shuffle and projector."""

    def __init__(self, tower: Tower, projector: Any, grid: tuple[int, int]) -> None:
        super().__init__(tower, projector)
        self.grid = grid
        joined: int = projector.layer_norm.normalized_shape[0]
        self.side = round((joined / tower.model.config.hidden_size) ** 0.5)  # r

    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        joined = pixel_shuffle(self.tower.model.layernorm(hidden), self.grid, self.side)  # [F', P, r * r * D]
        features = self.projector(joined)
        rows, columns = self.grid
        return Features(features, self.relevance(received), features, (rows // self.side, columns // self.side))

    def pool(self, values: Tensor) -> Tensor:
        return mean_pool(values, self.grid, self.side)


def pixel_shuffle(hidden: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Concatenate each `side` x `side` patches, row by row: [F', S, D] of a grid to [F', P, side * side * D]."""
    return _blocks(hidden, grid, side).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def mean_pool(values: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The mean over each token's patches: [F', S, n] to [F', P, n]."""
    return _blocks(values, grid, side).mean(dim=(2, 4)).flatten(1, 2)


def _blocks(values: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """[F', S, n] to [F', token row, row within the token, token column, column within the token, n]."""
    rows, columns = grid
    return values.unflatten(1, (rows // side, side, columns // side, side))
