"""Flops of a video, with and without compression: exact counts from shapes, nothing measured.

A multiply-add is two floating-point operations. Counted are the matrix products (patches, projections, attention, MLP,
LLM prefill; a projector is counted by its family, see `earlytom.families`); norms, softmax and the compression itself
are left out (they are bound by memory, not arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from earlytom.budget import kept_tokens


def encoder_layer(tokens: int, width: int, intermediate: int, *, pairs: int | None = None, gated: bool = False) -> int:
    """One encoder layer on one frame of `tokens` tokens; `pairs` of this layer, see `earlytom.families.Geometry`."""
    projections = 8 * tokens * width * width
    attention = 4 * (tokens * tokens if pairs is None else pairs) * width
    return projections + attention + mlp(tokens, width, intermediate, gated=gated)


def mlp(tokens: int, width: int, intermediate: int, *, gated: bool = False) -> int:
    """The MLP of a layer: two products, or three where it is `gated`."""
    return (6 if gated else 4) * tokens * width * intermediate


def vision_encoder(
    config: Any,
    tokens: int,
    frames_per_stage: Sequence[int],
    merge_layers: Sequence[int],
    depth: int,
    *,
    prefix: int = 0,
    pairs: Sequence[int] | None = None,
    gated: bool = False,
) -> int:
    """The vision tower on a video.

    Args:
        config: a Hugging Face vision config (hidden_size, intermediate_size, patch_size).
        tokens: patches of a frame.
        frames_per_stage: frames before the first merge and after each one, as `budget.frames_per_stage` gives them.
        merge_layers: after which layers the frames are merged.
        depth: how many layers run.
        prefix: tokens of a frame that are not patches.
        pairs, gated: as in `earlytom.families.Geometry`.
    """
    size = config.patch_size
    area = size**2 if isinstance(size, int) else math.prod(size)
    patches = 2 * tokens * 3 * area * config.hidden_size * frames_per_stage[0]
    size = (prefix + tokens, config.hidden_size, config.intermediate_size)
    every = [size[0] ** 2] * depth if pairs is None else pairs
    layers = [encoder_layer(*size, pairs=one, gated=gated) for one in every]
    stages = (sum(merged < index for merged in merge_layers) for index in range(depth))
    return patches + sum(layer * frames_per_stage[stage] for layer, stage in zip(layers, stages, strict=True))


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
        visual: number of visual tokens among them; default: all.
        inner_layer, inner_ratio: see `EarlyTomConfig`; from that layer on there are fewer visual tokens.
    """
    if inner_layer is None:
        linear = list(getattr(config, "layer_types", None) or ()).count("linear_attention")
        layers = (config.num_hidden_layers - linear) * decoder_layer(config, tokens)
        if linear:  # in such models the other layers have a gate as wide as their queries
            layers += linear * linear_layer(config, tokens)
            gate = 2 * tokens * config.hidden_size * config.num_attention_heads * config.head_dim
            layers += (config.num_hidden_layers - linear) * gate
        return layers + 2 * config.hidden_size * config.vocab_size
    visual = tokens if visual is None else visual
    later = tokens - visual + kept_tokens(visual, inner_ratio)
    layers = inner_layer * decoder_layer(config, tokens)
    layers += (config.num_hidden_layers - inner_layer) * decoder_layer(config, later)
    return layers + 2 * config.hidden_size * config.vocab_size


def decoder_layer(config: Any, tokens: int) -> int:
    """One layer of a Qwen2-like text config on the `tokens` of a prompt."""
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    queries, keys = head * heads, head * config.num_key_value_heads
    projections = tokens * (4 * width * queries + 4 * width * keys)
    attention = 2 * tokens * tokens * queries  # causal: half of the full product
    return projections + attention + 6 * tokens * width * config.intermediate_size


def linear_layer(config: Any, tokens: int) -> int:
    """One layer with a gated delta rule, token by token: per head two products with the state and one update of it."""
    width, inner = config.hidden_size, config.intermediate_size
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    heads = config.linear_num_value_heads
    values = heads * config.linear_value_head_dim
    # Queries and keys; values, their gate and the output; two numbers per head.
    projections = 2 * width * (2 * keys + 3 * values + 2 * heads)
    convolution = 2 * config.linear_conv_kernel_dim * (2 * keys + values)
    state = 6 * values * config.linear_key_head_dim
    return tokens * (projections + convolution + state + 6 * width * inner)
