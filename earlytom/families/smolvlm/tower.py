"""SmolVLM2's tower and what comes behind it: SigLIP, its last norm, pixel shuffle, one product.

Every frame has one size, so the model's mask of patches is all ones: attention is the same without it, and each patch
has the position of its own. The model finds that by dividing and comparing in fp32, which gives some patches their
neighbour's in grids of 19, 25 and others, on one machine other ones than on the next; in those of the published models,
27 and 32, on no CPU.

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
    """SigLIP; positions are learned for one grid, which every frame has."""

    def embed(self, pixels: Tensor) -> Tensor:
        embeddings = self.model.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return patches + embeddings.position_embedding.weight


class SmolVlmVision(Vision):
    """The last norm, pixel shuffle, the projector."""

    def __init__(self, tower: Tower, projector: Any) -> None:
        super().__init__(tower, projector)
        self.norm = tower.model.post_layernorm
        self.side = projector.scale_factor  # patches on a side of a token
        self.grid = (tower.model.embeddings.num_patches_per_side,) * 2

    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        joined = pixel_shuffle(self.norm(hidden), self.grid, self.side)
        features = self.projector.modality_projection(joined)
        return Features(features, self.relevance(received), features, (self.grid[0] // self.side,) * 2)

    def pool(self, values: Tensor) -> Tensor:
        return mean_pool(values, self.grid, self.side)
