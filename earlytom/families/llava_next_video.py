"""LLaVA-NeXT-Video: LLaVA-OneVision with a CLIP tower, average pooling before the projector, and no closing token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from earlytom.errors import UserError
from earlytom.families.frames import Geometry
from earlytom.families.llava_onevision import TOWER_SETTINGS, LlavaOnevision, LlavaOnevisionVision, grid_side
from earlytom.families.vision import Features, VisionModules
from earlytom.numbers import shown

if TYPE_CHECKING:
    from torch import Tensor, nn

_STRIDE = 2


class LlavaNextVideoVision(LlavaOnevisionVision):
    """Pooling first, then the projector."""

    def features(self, hidden: Tensor, received: Tensor | None) -> Features:
        features = self.projector(self.pool(hidden))
        return Features(features, self.relevance(received), features, self.cells(hidden))


class LlavaNextVideo(LlavaOnevision):
    """See `Family`."""

    model_type = "llava_next_video"
    title, tower_title = "LLaVA-NeXT-Video", "CLIP"
    model_class, config_class = "LlavaNextVideoForConditionalGeneration", "LlavaNextVideoConfig"
    towers = ("clip_vision_model",)
    frames = 16
    released = False
    vision_names, unused_names = LlavaOnevision.vision_names[:2], LlavaOnevision.vision_names[2:]
    closing_name = None
    roles: ClassVar[Mapping[str, str]] = {"class_embedding": "position_embedding.weight"}
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def check(self, raw: Mapping[str, Any]) -> None:
        super().check(raw)
        mode, stride = raw.get("spatial_pool_mode", "average"), raw.get("spatial_pool_stride", _STRIDE)
        if (mode, stride) != ("average", _STRIDE):
            got = f"{shown(mode)} and {shown(stride)}"
            raise UserError(f"spatial_pool_mode must be average and spatial_pool_stride {_STRIDE}, got {got}")

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        return rows // _STRIDE, columns // _STRIDE

    def pool(self, values: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return average_pool(values)

    def geometry(self, config: Any) -> Geometry:
        return replace(super().geometry(config), prefix=1, unpooled=False)

    def vision(self, tower: nn.Module, projector: nn.Module) -> LlavaNextVideoVision:
        return LlavaNextVideoVision(self.tower(tower), projector, self)

    def new_modules(self, config: Any) -> VisionModules:
        from transformers import AutoModel
        from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoMultiModalProjector

        return VisionModules(
            AutoModel.from_config(config.vision_config), LlavaNextVideoMultiModalProjector(config), None
        )

    def drop_vision(self, model: Any) -> None:
        super().drop_vision(model)
        del model.model.image_newline

    def vision_settings(self, config: Any) -> dict[str, Any]:
        settings = [name for name in TOWER_SETTINGS if hasattr(config.vision_config, name)]
        return {
            "family": self.model_type,
            "tower": {name: getattr(config.vision_config, name) for name in settings},
            "projector": [config.projector_hidden_act, config.multimodal_projector_bias, config.vision_feature_layer],
        }

    def other_weights(self, config: Any) -> int:
        frame = self.geometry(config)
        return frame.width * (3 * frame.patch**2 + 1 + 1 + frame.patches + 2)  # + 2: the norm before the layers

    @property
    def published(self) -> Mapping[str, Callable[[], Any]]:
        return {"llava-next-video-7b": _published}


LLAVA_NEXT_VIDEO = LlavaNextVideo()


def _published() -> Any:
    """The published 7B configuration: CLIP-L at 336 pixels, whose last layer is not used, and Vicuna.

    Ids of special tokens are free ones of the bundled tokenizer, which replaces its own.
    """
    first = 31997
    return LLAVA_NEXT_VIDEO.config(
        {
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
            "text_config": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "vocab_size": 32064,
                "bos_token_id": first,
                "eos_token_id": first + 2,
                "pad_token_id": first,
                "tie_word_embeddings": False,
            },
            "image_token_index": first + 3,
            "video_token_index": first + 4,
            "tie_word_embeddings": False,
        }
    )


def average_pool(values: Tensor) -> Tensor:
    """The mean of 2 x 2 patches; an odd last row or column is left out: [F, g * g, n] to [F, P, n]."""
    from torch.nn import functional

    side = grid_side(values.shape[1])
    grid = values.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return functional.avg_pool2d(grid, _STRIDE, _STRIDE).flatten(2).transpose(1, 2).contiguous()
