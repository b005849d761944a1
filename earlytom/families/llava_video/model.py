"""The whole model in transformers' form: LLaVA-OneVision's with another pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionPreTrainedModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from earlytom.families.llava_video.config import LlavaVideoConfig
from earlytom.families.llava_video.pooling import pooled


class LlavaVideoModel(LlavaOnevisionModel):
    """Without the language model's head."""

    config: LlavaVideoConfig
    config_class = LlavaVideoConfig

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        return pooled(image_features, self.config.mm_spatial_pool_mode)


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """With it."""

    config: LlavaVideoConfig
    config_class = LlavaVideoConfig

    def __init__(self, config: Any) -> None:
        LlavaOnevisionPreTrainedModel.__init__(self, config)  # its parent would make a model to be thrown away
        self.model = LlavaVideoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
