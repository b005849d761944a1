"""LLaVA-OneVision: square frames, a tower, a two-layer projector, 2x bilinear pooling, one closing token a video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from earlytom import flops
from earlytom.errors import UserError
from earlytom.families.family import Family, Features, Geometry, Vision
from earlytom.towers import TOWERS, Tower, tower_of


class LlavaOnevisionVision(Vision):
    """Projector first, then pooling."""

    def __init__(self, tower: Tower, projector: nn.Module) -> None:
        super().__init__(tower)
        self.projector = projector

    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        projected = self.projector(hidden)  # [F', S, E]
        features = pool(projected)
        relevance = None if received is None else pool(received[:, :, None])[:, :, 0]
        return Features(features, relevance, projected, (pooled_side(grid_side(hidden.shape[1])),) * 2)

    def pool(self, values: Tensor) -> Tensor:
        return pool(values)


class LlavaOnevision(Family):
    """See `Family`."""

    model_type = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"

    def geometry(self, config: Any) -> Geometry:
        vision = config.vision_config
        side, grid = vision.image_size, vision.image_size // vision.patch_size
        return Geometry(
            size=(side, side),
            patch=vision.patch_size,
            grid=(grid, grid),
            cells=(pooled_side(grid),) * 2,
            step=1,
            depth=feature_depth(config),
            width=vision.hidden_size,
            llm_width=config.text_config.hidden_size,
        )

    def vision(self, tower: nn.Module, projector: nn.Module) -> LlavaOnevisionVision:
        return LlavaOnevisionVision(tower_of(tower), projector)

    def vision_of(self, model: Any) -> LlavaOnevisionVision:
        return self.vision(model.vision_tower, model.multi_modal_projector)

    def canonical_name(self, name: str) -> str:
        return canonical_name(name)

    def vision_flops(self, config: Any, frames_per_stage: Sequence[int], merge_layers: Sequence[int]) -> int:
        frame = self.geometry(config)
        tower = flops.vision_encoder(config.vision_config, frame.patches, frames_per_stage, merge_layers, frame.depth)
        return tower + self.projector_flops(config, frames_per_stage[-1])

    def projector_flops(self, config: Any, frames: int) -> int:
        frame = self.geometry(config)  # the projector runs before pooling
        return 2 * frames * frame.patches * (frame.width * frame.llm_width + frame.llm_width * frame.llm_width)

    def vision_weights(self, config: Any) -> int:
        frame, inner = self.geometry(config), config.vision_config.intermediate_size
        hidden, width = frame.width, frame.llm_width
        layer = 4 * hidden * hidden + 2 * hidden * inner + 9 * hidden + inner  # products, biases, two layer norms
        embeddings = hidden * (3 * frame.patch * frame.patch + 1 + frame.patches)
        projector = width * (hidden + width + 2)
        return frame.depth * layer + embeddings + projector

    def video_token_id(self, config: Any) -> int:
        return config.video_token_id

    def closing(self, model: Any) -> Tensor:
        return model.image_newline

    def placeholders(self, config: Any, frames: int) -> int:
        return frames * self.geometry(config).tokens_per_frame + 1


LLAVA_ONEVISION = LlavaOnevision()


def canonical_name(name: str) -> str:
    """The name of a tensor without the prefixes in which the releases of transformers differ.

    `model.vision_tower.vision_model.encoder`, `model.vision_tower.encoder` and `vision_tower.vision_model.encoder`
    are all `vision_tower.encoder`; `model.image_newline` is `image_newline`; `language_model.model.layers` is
    `language_model.layers`, as `model.language_model.layers` is; `language_model.lm_head` is `lm_head`.
    """
    name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.", 1)
    for old, new in (("language_model.model.", "language_model."), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def feature_depth(config: Any) -> int:
    """How many encoder layers a LLaVA-OneVision configuration runs before the projector.

    Raises:
        UserError: several feature layers, a layer that does not exist, or a selection that does not give all patches.
    """
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer must be one layer, got {layer!r}: EarlyTom merges frames of one stream")
    depth = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= depth <= layers:
        raise UserError(f"vision_feature_layer {layer} does not exist in a tower of {layers} layers")
    tower = config.vision_config.model_type
    strategy = "default" if tower in TOWERS and TOWERS[tower].prefix else "full"
    if config.vision_feature_select_strategy != strategy:
        raise UserError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} does not give the patches of a "
            f"{tower} tower, all of them and nothing else: set it to {strategy!r} in the model's configuration"
        )
    return depth


def pool(features: Tensor) -> Tensor:
    """The model's own 2x pooling: bilinear, g x g to ceil(g/2) x ceil(g/2), on [F, g*g, E]. Returns [F, P, E].

    Raises:
        UserError: frames are not square.
    """
    side = grid_side(features.shape[1])
    out = pooled_side(side)
    grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous()
    return nn.functional.interpolate(grid, size=(out, out), mode="bilinear").flatten(2).transpose(1, 2)


def pooled_side(grid: int) -> int:
    """Side of the token grid after the model's 2x pooling of a `grid` x `grid` frame (27 -> 14)."""
    return math.ceil(grid / 2)


def grid_side(tokens: int) -> int:
    """Patches along one side of a square frame. Raises UserError when the frame is not square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"frames must be square: a frame has {tokens} patch tokens, which is not a square number")
    return side
