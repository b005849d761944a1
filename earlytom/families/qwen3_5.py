"""Qwen3.5 in transformers' form: frames, tower, prompts and positions of Qwen3-VL without deepstack, and a hybrid
language model: every fourth layer has attention, the others linear attention with a state of fixed size (gated delta
rule after a short convolution).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from earlytom.errors import UserError
from earlytom.families.frames import Geometry
from earlytom.families.qwen3_vl import Qwen3Vl
from earlytom.numbers import shown, whole

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = ("linear_attention", "full_attention")
_LINEAR_SIZES = {
    "linear_conv_kernel_dim": 1 << 6,
    "linear_key_head_dim": 1 << 12,
    "linear_value_head_dim": 1 << 12,
    "linear_num_key_heads": 1 << 10,
    "linear_num_value_heads": 1 << 10,
}


class Qwen35(Qwen3Vl):
    """See `Family`."""

    model_type = "qwen3_5"
    title, tower_title = "Qwen3.5", "Qwen3.5's ViT"
    model_class, config_class = "Qwen3_5ForConditionalGeneration", "Qwen3_5Config"
    section = (11, 11, 10)
    towers = ("qwen3_5_vision",)
    unused_names = ("mtp.",)  # multi-token prediction, which transformers' model does not have

    def geometry(self, config: Any) -> Geometry:
        text = config.text_config
        kinds = text.layer_types
        if len(kinds) != text.num_hidden_layers or not set(kinds) <= set(_KINDS) or _KINDS[1] not in kinds:
            raise UserError(
                f"layer_types must be {text.num_hidden_layers} of {' and '.join(_KINDS)}, one of the latter at least, "
                f"got {shown(kinds)}"
            )
        for name, most in _LINEAR_SIZES.items():
            whole(name, getattr(text, name), 1, most)
        if text.linear_num_value_heads % text.linear_num_key_heads:
            raise UserError(
                f"linear_num_value_heads must be a multiple of linear_num_key_heads, {text.linear_num_key_heads}, got "
                f"{text.linear_num_value_heads}"
            )
        return super().geometry(config)

    def given_features(self, config: Any, videos: list[Tensor]) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tokens: Any = tuple(videos)
        return BaseModelOutputWithPooling(pooler_output=tokens)

    @property
    def published(self) -> Mapping[str, Callable[[], Any]]:
        return {"qwen3.5-9b": _published}


QWEN3_5 = Qwen35()


def _published() -> Any:
    """The defaults of transformers' configuration classes, which these call "Qwen3.5-9B style"."""
    rope = {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25, "mrope_interleaved": True}
    return QWEN3_5.config(
        {
            "vision_config": {"model_type": "qwen3_5_vision", "out_hidden_size": 4096},
            "text_config": {
                "model_type": "qwen3_5_text",
                "max_position_embeddings": 262144,
                "bos_token_id": 248044,
                "eos_token_id": 248046,
                "rope_parameters": rope | {"mrope_section": list(QWEN3_5.section)},
            },
        }
    )
