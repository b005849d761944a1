"""InternVL 3 and 3.5 in transformers' form: a ViT with a class token and layer scale, pixel shuffle of 2 x 2 patches
before the projector, and a prompt in which every frame has its own span, "Frame1: <img>...".

Frames need not be square: rows and columns of patches follow from `image_size` and `patch_size`. Published models have
frames of 448 x 448 pixels.

Notation: F' frames, S patch tokens a frame, P tokens a frame after pixel shuffle, D tower width, E LLM width, r = 2: a
token is made of r x r patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from earlytom.errors import UserError
from earlytom.families.family import Family
from earlytom.families.frames import FrameSampling, FrameTimes, Geometry
from earlytom.families.qwen2 import QWEN2_7B, QWEN2_SMALL
from earlytom.families.tokens import END, START, STOP, VIDEO
from earlytom.families.vision import VisionModules
from earlytom.numbers import shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from earlytom.families.internvl.tower import InternVLTower, InternVLVision

_SIDE = 2  # r, in every published model
_OPEN, _VISUAL, _CLOSE = "<img>", "<IMG_CONTEXT>", "</img>"
_TOWER_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "norm_type",
    "attention_bias",
    "use_qk_norm",
    "use_mean_pooling",
    "use_absolute_position_embeddings",
)
# Tensors by the roles that `earlytom.micro.weights` knows.
_ROLES = {
    "attention.projection_layer.weight": "out_proj.weight",
    "patch_embeddings.projection.weight": "patch_embedding.weight",
    "embeddings.position_embeddings": "position_embedding.weight",
    "embeddings.cls_token": "position_embedding.weight",
    "lambda_1": "layer_norm.weight",
    "lambda_2": "layer_norm.weight",
}


class InternVL(Family):
    """See `Family`."""

    model_type = "internvl"
    title, tower_title = "InternVL", "InternViT"
    model_class, config_class = "InternVLForConditionalGeneration", "InternVLConfig"
    towers = ("internvl_vision",)
    frames = 32
    vision_names = ("vision_tower.", "multi_modal_projector.")
    decoder_names = ("language_model.", "lm_head.")
    embeddings_name, head_name = "language_model.embed_tokens.weight", "lm_head.weight"
    video_token, visual_token = VIDEO, _VISUAL
    span_a_frame = True
    after_frame, between_frames = _CLOSE, "\n"
    sampling: ClassVar[FrameSampling] = "middles"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels_name, features_name = "pixel_values", "get_image_features"
    activations: ClassVar[tuple[str, ...]] = ("projector_hidden_act",)
    token_ids = ("image_token_id",)
    layer_setting = "vision_feature_layer"
    roles: ClassVar[Mapping[str, str]] = _ROLES

    def check(self, raw: Mapping[str, Any]) -> None:
        if (ratio := raw.get("downsample_ratio", 1 / _SIDE)) != 1 / _SIDE:
            raise UserError(f"downsample_ratio must be {1 / _SIDE}, got {shown(ratio)}")

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        return rows // _SIDE, columns // _SIDE

    def pool(self, values: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        from earlytom.families.internvl.tower import mean_pool

        return mean_pool(values, grid or (math.isqrt(values.shape[1]),) * 2, _SIDE)

    def geometry(self, config: Any) -> Geometry:
        vision, grid = config.vision_config, grid_of(config.vision_config)
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if layer != -1 or strategy != "default":
            raise UserError(
                f"vision_feature_layer must be -1, the last, and vision_feature_select_strategy 'default', the patches "
                f"without the class token, got {shown(layer)} and {shown(strategy)}"
            )
        if not vision.use_absolute_position_embeddings:
            raise UserError("use_absolute_position_embeddings must be true: a tower without them is not supported")
        if any(length % _SIDE for length in grid):
            rows, columns = grid
            raise UserError(
                f"a frame has {rows} x {columns} patches, expected even numbers: they are joined two by two"
            )
        return Geometry(
            size=(vision.image_size[0], vision.image_size[1]),
            patch=vision.patch_size[0],
            grid=grid,
            cells=self.cells(grid),
            step=1,
            depth=vision.num_hidden_layers,
            width=vision.hidden_size,
            llm_width=config.text_config.hidden_size,
            heads=vision.num_attention_heads,
            inner=vision.intermediate_size,
            projector=(vision.hidden_size * _SIDE**2, config.text_config.hidden_size, config.text_config.hidden_size),
            prefix=1,
            rms=vision.norm_type == "rms_norm",
        )

    def tower(self, tower: nn.Module) -> InternVLTower:
        from earlytom.families.internvl.tower import InternVLTower

        return InternVLTower(tower)

    def vision(self, tower: nn.Module, projector: nn.Module) -> InternVLVision:
        from earlytom.families.internvl.tower import InternVLVision

        return InternVLVision(self.tower(tower), projector, grid_of(tower.config))

    def new_modules(self, config: Any) -> VisionModules:
        from transformers import AutoModel
        from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

        return VisionModules(AutoModel.from_config(config.vision_config), InternVLMultiModalProjector(config), None)

    def vision_settings(self, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        tower = {name: getattr(vision, name) for name in _TOWER_SETTINGS}
        tower |= {name: list(tower[name]) for name in ("image_size", "patch_size")}
        return {
            "family": self.model_type,
            "tower": tower,
            "projector": [config.projector_hidden_act, config.downsample_ratio],
        }

    def own_tokens(self, model: Any, pixels: Tensor) -> Tensor:
        config = model.config
        out = model.model.get_image_features(
            pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return out.pooler_output.flatten(0, 1)

    def projector_weights(self, config: Any) -> int:
        return super().projector_weights(config) + 2 * self.geometry(config).projector[0]  # and a norm before it

    def other_weights(self, config: Any) -> int:
        frame, vision = self.geometry(config), config.vision_config
        scales = 2 + 2 * vision.use_qk_norm - 3 * (not vision.attention_bias)  # of a layer, and norms or biases
        # Patch embedding, class token, positions of both, and the mask token of training.
        embeddings = 3 * frame.patch**2 + 1 + 1 + 1 + frame.patches + vision.use_mask_token
        last = 0 if vision.use_mean_pooling else 2
        return frame.width * (frame.depth * scales + embeddings + last)

    def before_frame(self, number: int, times: FrameTimes | None = None) -> str:
        return f"Frame{number + 1}: {_OPEN}"

    def videos(self, config: Any, pixels: Tensor, placeholders: Sequence[int]) -> list[list[Tensor]]:
        each = self.geometry(config).tokens_per_frame
        if pixels.dim() != 4:
            raise UserError(
                f"pixel_values must be [frames, 3, height, width], got {list(pixels.shape)}: make them with the "
                "model's own processor"
            )
        if sum(placeholders) != each * len(pixels) or any(count % each or not count for count in placeholders):
            raise UserError(
                f"the prompt has {', '.join(map(str, placeholders))} placeholders, but {len(pixels)} frame(s) take "
                f"{each} each: make it with the model's own processor, each prompt of one video and no pictures"
            )
        return [[frames] for frames in pixels.split([count // each for count in placeholders])]

    def special_tokens(self, config: Any) -> dict[str, int]:
        first, visual = config.text_config.bos_token_id, config.image_token_id
        return {END: first, START: first + 1, STOP: first + 2, _OPEN: visual - 2, _CLOSE: visual - 1, _VISUAL: visual}

    @property
    def published(self) -> Mapping[str, Callable[[], Any]]:
        return {
            "internvl3-1b": lambda: _published(**QWEN2_SMALL),
            "internvl3-8b": lambda: _published(**QWEN2_7B),
        }


INTERNVL = InternVL()


def grid_of(vision: Any) -> tuple[int, int]:
    """(rows, columns) of patches of a vision configuration. Raises UserError for patches that are not square."""
    height, width = vision.patch_size
    if height != width:
        raise UserError(f"patches must be square, got {height} x {width}")
    return vision.image_size[0] // height, vision.image_size[1] // width


def _published(**text: Any) -> Any:
    """A published configuration: InternViT-300M at 448 pixels, and Qwen2.5 with the settings `text`."""
    return INTERNVL.config(
        {
            "vision_config": {
                "model_type": "internvl_vision",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": [448, 448],
                "patch_size": [14, 14],
                "attention_bias": True,
            },
            "text_config": {
                "model_type": "qwen2",
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "vocab_size": 151674,
                "max_window_layers": text["num_hidden_layers"],
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "pad_token_id": 151643,
                "tie_word_embeddings": False,
                **text,
            },
            "image_token_id": 151667,
            "tie_word_embeddings": False,
        }
    )
