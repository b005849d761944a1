"""Whole models with random weights, and the published configurations that they are measured with.

`PUBLISHED` holds the configurations of the LLaVA-OneVision checkpoints on the hub. `random_model` creates a model
of any LLaVA-OneVision configuration in the target dtype, each weight once. `published_tokenizer` fits the bundled
tokenizer to a published configuration, which has none here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from earlytom.micro.progress import without_progress_bars
from earlytom.micro.weights import random_state

if TYPE_CHECKING:  # transformers is imported by what makes something of it
    from transformers import (
        GenerationConfig,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        PreTrainedTokenizerBase,
        Qwen2Tokenizer,
    )

END, START, STOP, IMAGE, VIDEO = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"
SPECIAL_TOKENS = (END, START, STOP, IMAGE, VIDEO)
"""In the order of their ids, which follow one another, here as in the published checkpoints."""

_FIRST_SPECIAL_ID = 151643  # of the tokenizer of Qwen2


def _published(**text: Any) -> LlavaOnevisionConfig:
    """A published configuration: SigLIP so400m at 384 without its last layer and its head, and Qwen2 as given."""
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
            **text,
        },
        image_token_index=ids[IMAGE],
        video_token_index=ids[VIDEO],
        tie_word_embeddings=text["tie_word_embeddings"],
    )


# The vocabularies are those of Qwen2 (151936 and 152064) and two tokens more, rounded up to a multiple of 64.
PUBLISHED: dict[str, Callable[[], LlavaOnevisionConfig]] = {
    "llava-onevision-qwen2-0.5b-ov": lambda: _published(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_window_layers=24,
        vocab_size=152000,
        tie_word_embeddings=True,
    ),
    "llava-onevision-qwen2-7b-ov": lambda: _published(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_window_layers=28,
        vocab_size=152128,
        tie_word_embeddings=False,
    ),
}
"""The published configurations by name."""


def random_model(
    config: LlavaOnevisionConfig, dtype: torch.dtype, *, seed: int = 0
) -> LlavaOnevisionForConditionalGeneration:
    """A model of `config` with the weights of `weights.random_state`, on the CPU, in eval mode.

    Memory for the weights is taken once, in `dtype`. A tied output layer has no weights of its own.
    """
    from transformers import LlavaOnevisionForConditionalGeneration

    with torch.device("meta"):
        parameters = LlavaOnevisionForConditionalGeneration(config).named_parameters()
        shapes = {name: parameter.shape for name, parameter in parameters}
    with without_progress_bars():
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=random_state(shapes, dtype, seed=seed), dtype=dtype
        )
    model.generation_config = greedy(config)
    return model.eval()


def greedy(config: LlavaOnevisionConfig) -> GenerationConfig:
    """How the models of this package generate: greedily, up to the end of a turn or of the text."""
    from transformers import GenerationConfig

    text: Any = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )


def make_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], context: int) -> Qwen2Tokenizer:
    """A tokenizer with the pipeline of Qwen2. A special token in `vocabulary` keeps its id; others get the next ids."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        unk_token=None,  # type: ignore[arg-type]
        eos_token=END,  # the constructor adds it, and the first token added must be the first of SPECIAL_TOKENS
        pad_token=END,
        model_max_length=context,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.eos_token = STOP
    return tokenizer


def published_tokenizer(bundled: PreTrainedTokenizerBase, config: LlavaOnevisionConfig) -> Qwen2Tokenizer:
    """The bundled tokenizer with its special tokens moved to the ids of a published `config`.

    The ids in between name no token: a model with random weights may choose them, and they decode to nothing.
    """
    text: Any = config.text_config
    model = json.loads(bundled.backend_tokenizer.to_str())["model"]
    moved = {token: text.bos_token_id + i for i, token in enumerate(SPECIAL_TOKENS)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = make_tokenizer(model["vocab"] | moved, merges, text.max_position_embeddings)
    tokenizer.chat_template = bundled.chat_template
    return tokenizer
