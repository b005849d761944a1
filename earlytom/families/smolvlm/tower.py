"""SmolVLM2's tower and projector: SigLIP, its last norm, pixel shuffle, one linear layer.

All frames have one size, so the model's patch mask is all ones and left out, and patch i has position i. The model
itself computes positions in fp32, and in grids of 19, 25 and others gives some patches their neighbour's, depending on
the machine; in the published models' grids, 27 and 32, it is exact on every CPU.

Notation as in `earlytom.families.smolvlm`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from earlytom.families.adapters import SiglipTower
from earlytom.families.internvl.tower import mean_pool, pixel_shuffle
from earlytom.families.vision import Features, Vision
from earlytom.towers import Tower


class SmolVlmTower(SiglipTower):
    """SigLIP with positions for one grid, that of every frame."""

    def embed(self, pixels: Tensor) -> Tensor:
        embeddings = self.model.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return patches + embeddings.position_embedding.weight


class SmolVlmVision(Vision):
    """The tower's last norm, pixel shuffle and projector."""

    def __init__(self, tower: Tower, projector: Any) -> None:
        super().__init__(tower, projector)
        self.norm = tower.model.post_layernorm
        self.side = projector.scale_factor  # r
        self.grid = (tower.model.embeddings.num_patches_per_side,) * 2

    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        joined = pixel_shuffle(self.norm(hidden), self.grid, self.side)
        features = self.projector.modality_projection(joined)
        return Features(features, self.relevance(received), features, (self.grid[0] // self.side,) * 2)

    def pool(self, values: Tensor) -> Tensor:
        return mean_pool(values, self.grid, self.side)
