"""The whole model as a transformers class: LLaVA-OneVision with other poolings and newlines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionPreTrainedModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from earlytom.families.llava_video.config import LlavaVideoConfig
from earlytom.families.llava_video.layout import CLOSES, pooled


class LlavaVideoModel(LlavaOnevisionModel):
    """The model without the language model's head."""

    config: LlavaVideoConfig
    config_class = LlavaVideoConfig

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        return pooled(image_features, self.config.mm_spatial_pool_mode)

    def get_video_features(self, pixel_values_videos: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, F, 3, H, W] to visual tokens with newlines, [B, L, E] in `pooler_output`."""
        found = super().get_video_features(pixel_values_videos, *args, **kwargs)
        videos, frames = pixel_values_videos.shape[:2]
        closes, tokens = CLOSES[self.config.mm_newline_position], found.pooler_output[:, :-1]
        if closes == "video":
            return found
        if closes is not None:
            runs = frames * (1 if closes == "frame" else math.isqrt(tokens.shape[1] // frames))
            cells = tokens.reshape(videos, runs, -1, tokens.shape[2])
            newlines = self.image_newline.expand(videos, runs, 1, -1).to(cells)
            tokens = torch.cat([cells, newlines], dim=2).flatten(1, 2)
        found.pooler_output = tokens
        return found


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """The model with the language model's head."""

    config: LlavaVideoConfig
    config_class = LlavaVideoConfig

    def __init__(self, config: Any) -> None:
        LlavaOnevisionPreTrainedModel.__init__(self, config)  # the parent's would make a second model
        self.model = LlavaVideoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
