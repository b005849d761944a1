"""How much arithmetic a video costs, with and without compression: exact counts from shapes, nothing measured.

A multiply-add is two floating-point operations. Counted are the matrix products (patches, projections, attention, MLP,
LLM prefill; a projector is counted by its family, see `earlytom.families`); norms, softmax and the compression itself
are left out (they are bound by memory, not arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from earlytom.budget import kept_tokens


def encoder_layer(tokens: int, width: int, intermediate: int) -> int:
    """One encoder layer on one frame of `tokens` tokens."""
    projections = 8 * tokens * width * width
    attention = 4 * tokens * tokens * width
    return projections + attention + 4 * tokens * width * intermediate


def vision_encoder(
    config: Any,
    tokens: int,
    frames_per_stage: Sequence[int],
    merge_layers: Sequence[int],
    depth: int,
    *,
    prefix: int = 0,
) -> int:
    """The vision tower on a video.

    Args:
        config: a Hugging Face vision config (hidden_size, intermediate_size, patch_size).
        tokens: patches of a frame.
        frames_per_stage: frames before the first merge and after each one, as `budget.frames_per_stage` gives them.
        merge_layers: after which layers the frames are merged.
        depth: how many layers run.
        prefix: tokens of a frame that are not patches.
    """
    size = config.patch_size
    area = size**2 if isinstance(size, int) else math.prod(size)
    patches = 2 * tokens * 3 * area * config.hidden_size * frames_per_stage[0]
    layer = encoder_layer(prefix + tokens, config.hidden_size, config.intermediate_size)
    stages = (sum(merged < index for merged in merge_layers) for index in range(depth))
    return patches + layer * sum(frames_per_stage[stage] for stage in stages)


def merged_encoder(config: Any, tokens: int, frames: int, ran: Sequence[tuple[int, int]]) -> int:
    """Like `vision_encoder`, where tokens are merged: `ran` has (sequences, tokens of each) of every layer."""
    patches = vision_encoder(config, tokens, (frames,), (), 0)
    layers = (count * encoder_layer(own, config.hidden_size, config.intermediate_size) for count, own in ran)
    return patches + sum(layers)


def prefill(
    config: Any, tokens: int, *, visual: int | None = None, inner_layer: int | None = None, inner_ratio: float = 0.5
) -> int:
    """Prefill of a Qwen2-like text config: all layers, and the logits of the last position.

    Args:
        config: a Hugging Face text config (hidden_size, num_attention_heads, ...).
        tokens: of the prompt.
        visual: how many of them are visual; default all.
        inner_layer, inner_ratio: see `EarlyTomConfig`: from that layer on, fewer visual tokens are left.
    """
    if inner_layer is None:
        return config.num_hidden_layers * decoder_layer(config, tokens) + 2 * config.hidden_size * config.vocab_size
    visual = tokens if visual is None else visual
    later = tokens - visual + kept_tokens(visual, inner_ratio)
    layers = inner_layer * decoder_layer(config, tokens)
    layers += (config.num_hidden_layers - inner_layer) * decoder_layer(config, later)
    return layers + 2 * config.hidden_size * config.vocab_size


def decoder_layer(config: Any, tokens: int) -> int:
    """One layer of a Qwen2-like text config on the `tokens` of a prompt."""
    width, heads = config.hidden_size, config.num_attention_heads
    keys = width // heads * config.num_key_value_heads
    projections = tokens * (4 * width * width + 4 * width * keys)
    attention = 2 * tokens * tokens * width  # causal: half of the full product
    return projections + attention + 6 * tokens * width * config.intermediate_size
