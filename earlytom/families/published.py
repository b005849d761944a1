"""Configurations of published checkpoints, and a mid-size one, to measure models without a download.

`earlytom.micro.random_model` makes models of them with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from earlytom.families import FAMILIES, LLAVA_ONEVISION
from earlytom.families.qwen2 import QWEN2_7B, QWEN2_SMALL
from earlytom.families.tokens import END, IMAGE, SPECIAL_TOKENS, STOP, VIDEO

_FIRST_SPECIAL_ID = 151643  # of the tokenizer of Qwen2


def _published(**text: Any) -> Any:
    """A published configuration: SigLIP so400m at 384 pixels without last layer and head, and Qwen2 with `text`."""
    from transformers import LlavaOnevisionConfig

    ids = dict(zip(SPECIAL_TOKENS, range(_FIRST_SPECIAL_ID, _FIRST_SPECIAL_ID + 5), strict=True))
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "bos_token_id": ids[END],
            "eos_token_id": ids[STOP],
            "pad_token_id": ids[END],
            "max_window_layers": text["num_hidden_layers"],
            **text,
        },
        image_token_index=ids[IMAGE],
        video_token_index=ids[VIDEO],
        tie_word_embeddings=text["tie_word_embeddings"],
    )


# The vocabularies are those of Qwen2 (151936 and 152064) and two tokens more, rounded up to a multiple of 64.
_LLAVA_ONEVISION: dict[str, Callable[[], Any]] = {
    "llava-onevision-qwen2-0.5b-ov": lambda: _published(
        **QWEN2_SMALL,
        vocab_size=152000,
        tie_word_embeddings=True,
    ),
    "llava-onevision-qwen2-7b-ov": lambda: _published(
        **QWEN2_7B,
        vocab_size=152128,
        tie_word_embeddings=False,
    ),
}
PUBLISHED = _LLAVA_ONEVISION | {name: make for one in FAMILIES.values() for name, make in one.published.items()}
"""All families' published configurations, by name."""

MID_SIZE, MID_SIZE_FRAMES = "siglip-base-qwen2-0.5b", 8
"""The name of the mid-size configuration, between bundled and published ones, and its frames of a video."""


def mid_size() -> Any:
    """SigLIP base at 384 pixels and the smallest published decoder, which a CPU can measure in minutes."""
    settings = PUBLISHED["llava-onevision-qwen2-0.5b-ov"]().to_dict()
    settings["vision_config"] |= {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
    }
    return LLAVA_ONEVISION.config(settings)
