"""Translates configurations of the original layout to transformers' form.

The original config.json has the language model's settings at top level, and names its vision tower, a published SigLIP,
instead of describing it. `translated` returns the settings of transformers' LLaVA-OneVision and those of
`LlavaVideoConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers import LlavaOnevisionConfig

from earlytom.errors import UserError
from earlytom.families.llava_video.layout import CLOSES, POOLINGS
from earlytom.numbers import shown, whole

STRIDE = 2
_LAYERS = 256  # the most accepted
_TOWERS: dict[str, dict[str, Any]] = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}
_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_KEPT = ("architectures", "quantization_config", "earlytom_trained", "tie_word_embeddings")
# Settings of the original layout: the supported values, and the default of a missing one.
_FIXED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "mm_projector_type": (("mlp2x_gelu",), "linear"),
    "mm_resampler_type": ((None,), None),
    "mm_patch_merge_type": (("spatial_unpad",), "flat"),
    "mm_spatial_pool_mode": (POOLINGS, POOLINGS[0]),
    "mm_spatial_pool_stride": ((STRIDE, None), STRIDE),
    "mm_newline_position": (tuple(CLOSES), "one_token"),
    "add_faster_video": ((False, None), False),
    "add_time_instruction": ((False, True, None), False),
}


class LlavaVideoConfig(LlavaOnevisionConfig):
    """LLaVA-OneVision's, with pooling, places of newlines and time sentence under the original layout's names."""

    model_type = "llava_qwen"

    mm_spatial_pool_mode: Literal["bilinear", "average", "max"] = "bilinear"
    add_time_instruction: bool = False
    mm_newline_position: Literal["grid", "frame", "one_token", "no_token"] = "one_token"


def translated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """An original config.json's content as that of a `LlavaVideoConfig`; content in that form is returned as it is.

    Only the settings that this project acts on are checked; other values are passed on as they are.
    """
    for name, (values, usual) in _FIXED.items():
        if "text_config" not in raw and not any(_same(raw.get(name, usual), value) for value in values):
            given = f"got {shown(raw[name])}" if name in raw else f"it is missing, which means {shown(usual)}"
            raise UserError(f"{name} must be {' or '.join(map(str, values))}, {given}: no other is supported")
    if "text_config" in raw:
        return dict(raw)
    visual = raw.get("image_token_index")
    if not isinstance(visual, int) or isinstance(visual, bool) or visual < 0:
        # Some have a number that is no token's id, some have none. No token has the last row of the embeddings.
        vocabulary = raw.get("vocab_size")
        visual = vocabulary - 1 if isinstance(vocabulary, int) else 0
    text = {name: raw[name] for name in _TEXT if name in raw}
    tied = bool(raw.get("tie_word_embeddings", False))
    scaling = raw.get("rope_scaling")
    rope = {"rope_type": "default"} | (scaling if isinstance(scaling, dict) else {})
    rope |= {"rope_theta": raw.get("rope_theta", 10000.0)} | ({"rope_type": rope["type"]} if "type" in rope else {})
    return {name: raw[name] for name in _KEPT if name in raw} | {
        "model_type": LlavaVideoConfig.model_type,
        "vision_config": _tower(raw),
        "text_config": {**text, "model_type": "qwen2", "rope_parameters": rope, "tie_word_embeddings": tied},
        "image_token_index": visual,
        "video_token_index": visual,
        "mm_spatial_pool_mode": raw.get("mm_spatial_pool_mode", POOLINGS[0]),
        "mm_newline_position": raw.get("mm_newline_position", "one_token"),
        "add_time_instruction": bool(raw.get("add_time_instruction")),
    }


def _tower(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's settings without its last layer and head, which the model does not use; a given `vision_config`
    includes both."""
    name, given = raw.get("mm_vision_tower"), raw.get("vision_config")
    if isinstance(given, dict):
        whole_tower = given
    elif isinstance(name, str) and name.rstrip("/").rpartition("/")[2] in _TOWERS:
        whole_tower = _TOWERS[name.rstrip("/").rpartition("/")[2]]
    else:
        raise UserError(
            f"mm_vision_tower must be {' or '.join(_TOWERS)}, got {shown(name)}: for another SigLIP add its settings "
            "as vision_config"
        )
    layers = whole("num_hidden_layers of vision_config", whole_tower.get("num_hidden_layers"), 2, _LAYERS)
    own = {"num_hidden_layers": layers - 1, "vision_use_head": False}
    return {"model_type": "siglip_vision_model"} | whole_tower | own


def _same(value: Any, wanted: Any) -> bool:
    """Equal and of the same type: true is not 1."""
    return type(value) is type(wanted) and bool(value == wanted)
