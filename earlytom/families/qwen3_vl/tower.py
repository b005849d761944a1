"""Qwen3-VL's tower and projectors.

A token's patches are consecutive, so joining them is a reshape; attention is within a frame. Positions and angles
depend on the grid only, and are computed once per grid by transformers' own functions.

Notation as in `earlytom.families.qwen3_vl`.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding, apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from earlytom.families.qwen3_vl.grid import SIDE, STEP, grid_of, streams_of
from earlytom.families.qwen3_vl.pixels import frame_patches
from earlytom.families.vision import Features, Vision
from earlytom.towers import LayerParts, Tower, add


class Places(NamedTuple):
    """The positions of a grid's patches.

    Attributes:
        around, shares: [S, 4] indices of the four learned positions around each patch, and their bilinear weights.
        cos, sin: [S, d] fp32 of the patches' rotary angles, d channels a head.
    """

    around: Tensor
    shares: Tensor
    cos: Tensor
    sin: Tensor


class PatchEmbeddings(nn.Module):
    """The patch embedding, and learned positions if a tower has them."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed = visual.patch_embed, getattr(visual, "pos_embed", None)


class Trunk(nn.Module):
    """The tower without projectors; nothing is copied."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.config = visual.config
        self.embeddings, self.blocks = PatchEmbeddings(visual), visual.blocks


class Mergers(nn.Module):
    """The projectors: of the last layer's states, and of earlier layers' (deepstack)."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.merger, self.deepstack = visual.merger, getattr(visual, "deepstack_merger_list", ())


def parted(visual: Any) -> tuple[Trunk, Mergers]:
    """transformers' vision model as tower and projectors, which share its modules."""
    return Trunk(visual), Mergers(visual)


class Qwen3VlTower(Tower):
    """Two pictures a frame, positions interpolated to the grid, a rotary embedding over rows and columns.

    Attributes:
        grid: (rows, columns) of patches: of the pixels embedded last, and at first of the configuration.
    """

    step = STEP
    key_bias_cancels = False  # the rotary embedding rotates it
    places_patches = True

    def __init__(self, model: nn.Module) -> None:
        self.model = trunk = cast(Any, model)
        self.layers = trunk.blocks
        self.streams = streams_of(trunk.config)
        self.grid = grid_of(trunk.config)
        self.angles(next(model.parameters()).device)  # cached before anybody traces the tower

    def places(self, device: torch.device) -> Places:
        """The places of `grid`."""
        config = self.model.config
        side, head = int(config.num_position_embeddings**0.5), config.hidden_size // config.num_heads
        return _places(side, head, tuple(config.rope_parameters.items()), self.grid, str(device))

    def angles(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, d] fp32 of the rotary angles, in the order of patches, d channels a head."""
        places = self.places(device)
        return places.cos, places.sin

    def parts(self, layer: Any) -> LayerParts:
        return LayerParts(layer.norm1, layer.attn, layer.norm2, layer.mlp)

    def embed(self, pixels: Tensor) -> Tensor:
        patch: int = self.model.config.patch_size
        self.grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        patches = frame_patches(pixels, patch)
        frames, count = patches.shape[:2]
        parts: Any = self.embeddings
        embedded = parts.patch_embed(patches.flatten(2).flatten(0, 1)).unflatten(0, (frames, count))
        places = self.places(pixels.device)
        learned = (parts.pos_embed(places.around) * places.shares[:, :, None]).sum(1)
        return embedded + learned.to(embedded.dtype)

    def heads(self, module: Any, entering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = module.qkv(entering).unflatten(-1, (3, -1, module.head_dim)).unbind(-3)  # [F, S, H, d]
        query, key = apply_rotary_pos_emb_vision(query, key, *self.angles(entering.device))
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def compared(self, module: Any, entering: Tensor) -> tuple[Tensor, Tensor]:
        query, key, _ = self.heads(module, entering)
        return query, key

    def run_layer(self, layer: Any, hidden: Tensor, *, receive: bool = False) -> tuple[Tensor, Tensor | None]:
        attended, received = self.attention(*self.attention_input(layer, hidden), receive)
        hidden = add(hidden, layer.attn.proj(attended))
        return add(hidden, layer.mlp(layer.norm2(hidden))), received


class Qwen3VlVision(Vision):
    """Joins 2 x 2 patches and projects them; states of earlier layers likewise, each with its own projector."""

    def __init__(self, tower: Qwen3VlTower, projector: Any) -> None:
        super().__init__(tower, projector)
        self._grid_of = tower

    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        last, *earlier = hidden.split(self.tower.width, dim=-1)
        mergers = (self.projector.merger, *self.projector.deepstack)
        # A caller that only looks at the projectors gives the last layer's states alone; they then stand for all.
        states = (last, *(earlier or [last] * len(self.projector.deepstack)))
        made = [merger(state.contiguous()) for merger, state in zip(mergers, states, strict=True)]
        features = torch.cat(made, dim=-1).unflatten(0, (len(hidden), -1))
        rows, columns = self._grid_of.grid
        return Features(features, self.relevance(received), features, (rows // SIDE, columns // SIDE))

    def pool(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, SIDE**2)).mean(2)

    def own(self, features: Tensor) -> Tensor:
        return features[..., : features.shape[-1] // (1 + len(self.projector.deepstack))]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
@torch.no_grad()
def _places(side: int, head: int, rope: tuple[tuple[str, Any], ...], grid: tuple[int, int], device: str) -> Places:
    """The places of a grid, for `side` x `side` learned positions and heads of `head` channels."""
    rows, columns = grid
    one = torch.tensor([[1, rows, columns]])
    around, shares = get_vision_interpolation_indices_and_weights(
        one, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=SIDE
    )
    settings: Any = SimpleNamespace(rope_parameters=dict(rope), head_dim=head)
    cos, sin = Qwen3VLVisionRotaryEmbedding(settings)(shares, get_vision_position_ids(one, SIDE))
    return Places(*(value.to(device) for value in (around, shares, cos, sin)))
