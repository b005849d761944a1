"""Whole models with random weights, and their tokenizers and generation settings.

`random_model` creates a model of any configuration of a supported family in the target dtype, each weight once.
`published_tokenizer` adapts the bundled tokenizer to a published configuration.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from earlytom.families import family_of
from earlytom.families.tokens import END, SPECIAL_TOKENS, STOP, VIDEO
from earlytom.micro.progress import without_progress_bars
from earlytom.micro.weights import random_state

if TYPE_CHECKING:  # transformers is imported by what makes something of it
    from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Tokenizer


def random_model(config: Any, dtype: torch.dtype, *, seed: int = 0) -> Any:
    """A model of `config` with the weights of `weights.random_state`, on the CPU, in eval mode.

    Memory for the weights is taken once, in `dtype`. A tied output layer has no weights of its own.
    """
    family = family_of(config)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in family.new_model(config).named_parameters()}
    with without_progress_bars():
        model = family.transformers_class().from_pretrained(
            None, config=config, state_dict=random_state(shapes, dtype, seed=seed, family=family), dtype=dtype
        )
    model.generation_config = greedy(config)
    return model.eval()


def greedy(config: Any) -> GenerationConfig:
    """How the models of this package generate: greedily, up to the end of a turn or of the text."""
    from transformers import GenerationConfig

    text: Any = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )


def make_tokenizer(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    context: int,
    special: Sequence[str] = SPECIAL_TOKENS,
) -> Qwen2Tokenizer:
    """A tokenizer with the pipeline of Qwen2. A special token in `vocabulary` keeps its id; others get the next ids.

    The first of `special` is `END`, which the constructor adds.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        unk_token=None,  # type: ignore[arg-type]
        eos_token=END,
        pad_token=END,
        model_max_length=context,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.eos_token = STOP
    return tokenizer


def published_tokenizer(bundled: PreTrainedTokenizerBase, config: Any) -> Qwen2Tokenizer:
    """The bundled tokenizer with its special tokens moved to the ids of a published `config`.

    Ids in between are no tokens: a model with random weights may generate them, and they decode to nothing.
    """
    text: Any = config.text_config
    model = json.loads(bundled.backend_tokenizer.to_str())["model"]
    family = family_of(config)
    moved = family.special_tokens(config)
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = make_tokenizer(model["vocab"] | moved, merges, text.max_position_embeddings, list(moved))
    tokenizer.chat_template = str(bundled.chat_template).replace(VIDEO, family.video_token)
    return tokenizer
