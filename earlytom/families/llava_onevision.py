"""LLaVA-OneVision: square frames, a SigLIP tower, a two-layer projector, 2x bilinear pooling, and one closing token per
video, `image_newline`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from earlytom.errors import UserError
from earlytom.families.family import Family
from earlytom.families.frames import Geometry
from earlytom.families.tokens import SPECIAL_TOKENS, VIDEO
from earlytom.families.vision import Features, Vision, VisionModules
from earlytom.numbers import shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from earlytom.towers import Tower

TOWER_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "vision_use_head",
)


class LlavaOnevisionVision(Vision):
    """Projector first, then the family's pooling of square frames."""

    def __init__(self, tower: Tower, projector: nn.Module, family: LlavaOnevision) -> None:
        super().__init__(tower, projector)
        self.family = family

    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        projected = self.projector(hidden)  # [F', S, E]
        return Features(self.pool(projected), self.relevance(received), projected, self.cells(hidden))

    def cells(self, hidden: Tensor) -> tuple[int, int]:
        """(rows, columns) of tokens for patches [F', S, D]."""
        return self.family.cells((grid_side(hidden.shape[1]),) * 2)

    def pool(self, values: Tensor) -> Tensor:
        return self.family.pool(values)


class LlavaOnevision(Family):
    """See `Family`."""

    model_type = "llava_onevision"
    title, tower_title = "LLaVA-OneVision", "SigLIP"
    model_class, config_class = "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig"
    towers = ("siglip_vision_model",)
    frames = 32
    released = True
    vision_names: ClassVar[tuple[str, ...]] = ("vision_tower.", "multi_modal_projector.", "image_newline")
    decoder_names = ("language_model.", "lm_head.")
    closing_name: ClassVar[str | None] = "image_newline"
    embeddings_name, head_name = "language_model.embed_tokens.weight", "lm_head.weight"
    video_token = visual_token = VIDEO
    activations = ("projector_hidden_act",)
    token_ids = ("image_token_id", "video_token_id")
    layer_setting = "vision_feature_layer"

    def check(self, raw: Mapping[str, Any]) -> None:
        layer = raw.get("vision_feature_layer", -1)
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise UserError(
                f"vision_feature_layer must be one layer, got {shown(layer)}; several layers are not supported"
            )

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        return pooled_side(rows), pooled_side(columns)

    def pool(self, values: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return pool(values)

    def geometry(self, config: Any) -> Geometry:
        vision = config.vision_config
        side, grid = vision.image_size, vision.image_size // vision.patch_size
        return Geometry(
            size=(side, side),
            patch=vision.patch_size,
            grid=(grid, grid),
            cells=self.cells((grid, grid)),
            step=1,
            depth=feature_depth(config),
            width=vision.hidden_size,
            llm_width=config.text_config.hidden_size,
            heads=vision.num_attention_heads,
            inner=vision.intermediate_size,
            projector=(vision.hidden_size, config.text_config.hidden_size, config.text_config.hidden_size),
            unpooled=True,
        )

    def tower(self, tower: nn.Module) -> Tower:
        from earlytom.families.adapters import tower_of

        return tower_of(tower)

    def vision(self, tower: nn.Module, projector: nn.Module) -> LlavaOnevisionVision:
        return LlavaOnevisionVision(self.tower(tower), projector, self)

    def new_modules(self, config: Any) -> VisionModules:
        import torch
        from transformers import AutoModel
        from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

        newline = torch.nn.Parameter(torch.empty(config.text_config.hidden_size))
        tower = AutoModel.from_config(config.vision_config)
        return VisionModules(tower, LlavaOnevisionMultiModalProjector(config), newline)

    def restore_buffers(self, tower: nn.Module) -> None:
        import torch

        embeddings: Any = tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)

    def vision_settings(self, config: Any) -> dict[str, Any]:
        return {
            "tower": {name: getattr(config.vision_config, name) for name in TOWER_SETTINGS},
            "projector": [config.projector_hidden_act, config.multimodal_projector_bias],
        }

    def own_tokens(self, model: Any, pixels: Tensor) -> Tensor:
        config = model.config
        out = model.model.get_video_features(
            pixels[None],
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return out.pooler_output.flatten(0, -2)

    def other_weights(self, config: Any) -> int:
        frame = self.geometry(config)
        return frame.width * (3 * frame.patch**2 + 1 + frame.patches)

    def videos(self, config: Any, pixels: Tensor, placeholders: Sequence[int]) -> list[list[Tensor]]:
        if pixels.dim() != 5:
            raise UserError(
                "pixel_values_videos must be [videos, frames, 3, height, width], got "
                f"{list(pixels.shape)}: make them with the model's own processor"
            )
        videos, frames = pixels.shape[:2]
        full = self.placeholders(config, frames)
        if sum(placeholders) != full * videos or any(count % full for count in placeholders):
            raise UserError(
                f"the prompt has {', '.join(map(str, placeholders))} video placeholders, but {videos} video(s) of "
                f"{frames} frames take {full} each: make the prompt with the model's own processor"
            )
        each = iter(pixels)
        return [[next(each) for _ in range(count // full)] for count in placeholders]

    def special_tokens(self, config: Any) -> dict[str, int]:
        return {token: config.text_config.bos_token_id + i for i, token in enumerate(SPECIAL_TOKENS)}


LLAVA_ONEVISION = LlavaOnevision()


def feature_depth(config: Any) -> int:
    """Number of encoder layers that a LLaVA-OneVision configuration runs before the projector."""
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer must be one layer, got {layer!r}: EarlyTom merges frames of one stream")
    depth = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= depth <= layers:
        raise UserError(f"vision_feature_layer {layer} does not exist in a tower of {layers} layers")
    from earlytom.families.adapters import TOWERS

    tower = config.vision_config.model_type
    strategy = "default" if tower in TOWERS and TOWERS[tower].prefix else "full"
    if config.vision_feature_select_strategy != strategy:
        raise UserError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} does not give the patches of a "
            f"{tower} tower, all of them and nothing else: set it to {strategy!r} in the model's configuration"
        )
    return depth


def pool(features: Tensor) -> Tensor:
    """The model's own 2x pooling: bilinear, g x g to ceil(g/2) x ceil(g/2), on [F, g*g, E]. Returns [F, P, E]."""
    from torch.nn import functional

    side = grid_side(features.shape[1])
    out = pooled_side(side)
    grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous()
    return functional.interpolate(grid, size=(out, out), mode="bilinear").flatten(2).transpose(1, 2)


def pooled_side(grid: int) -> int:
    """Side of the token grid after the model's 2x pooling of a `grid` x `grid` frame (27 -> 14)."""
    return math.ceil(grid / 2)


def grid_side(tokens: int) -> int:
    """Patches along one side of a square frame. Raises UserError when the frame is not square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"frames must be square: a frame has {tokens} patch tokens, which is not a square number")
    return side
