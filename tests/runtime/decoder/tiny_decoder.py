"""Small random decoders, and what is asked of them, for the tests of `runtime.decoder.eager` and its friends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from runtime.decoder.eager import Decoder
from runtime.decoder.sampling import GREEDY, Sampling

WIDTH, CONTEXT = 32, 128
BUCKETS = (16, 32, 64, 128)
TEXT = {
    "vocab_size": 101,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.4,  # large enough for answers that depend on the whole prompt
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}  # in the second of the two layers


def make_qwen(seed: int = 0, **changes: object) -> Any:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**(TEXT | changes))).eval()


def make_llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TEXT)).eval()


def prompt(length: int, seed: int = 0) -> Tensor:
    """Embeddings [1, length, WIDTH]."""
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(100 * seed + length))


def answer(decoder: Decoder, embeds: Tensor, new: int = 8, sampling: Sampling = GREEDY, **how: Any) -> list[int]:
    return list(decoder.stream(embeds, max_new_tokens=new, sampling=sampling, **how))


@contextmanager
def lengths_read(module: nn.Module) -> Iterator[list[int]]:
    """How many tokens each pass through the language model reads."""
    lengths: list[int] = []
    hook = module.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        yield lengths
    finally:
        hook.remove()
