"""Inner merging in a slow decoder: one token after the other, no cache, no mask, double precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Model = Any  # a transformers model, whose methods take whatever


def slow_layer(layer: Model, theta: float, tokens: list[Tensor], places: list[int], watch: int) -> tuple[list, Tensor]:
    """A Qwen2 layer on tokens at `places`. Also the attention [n] that token number `watch` pays the ones before it."""
    attention = layer.self_attn
    size = attention.head_dim
    group = attention.q_proj.out_features // attention.k_proj.out_features

    def norm(gain: Any, x: Tensor) -> Tensor:
        return gain.weight.double() * x / torch.sqrt((x * x).mean() + gain.variance_epsilon)

    def linear(module: Any, x: Tensor) -> Tensor:
        out = module.weight.double() @ x
        return out if module.bias is None else out + module.bias.double()

    def turned(x: Tensor, place: int) -> Tensor:
        """Pairs (i, i + size/2) of each head turned by the angle of their frequency."""
        out = x.clone().view(-1, size)
        for i in range(size // 2):
            angle = place * theta ** (-2 * i / size)
            one, two = x.view(-1, size)[:, i], x.view(-1, size)[:, i + size // 2]
            out[:, i] = one * math.cos(angle) - two * math.sin(angle)
            out[:, i + size // 2] = two * math.cos(angle) + one * math.sin(angle)
        return out

    keys: list[Tensor] = []
    values: list[Tensor] = []
    out: list[Tensor] = []
    watched = torch.empty(0)
    for number, (token, place) in enumerate(zip(tokens, places, strict=True)):
        x = norm(layer.input_layernorm, token)
        keys.append(turned(linear(attention.k_proj, x), place))
        values.append(linear(attention.v_proj, x).view(-1, size))
        paid, heads = [], []
        for head, query in enumerate(turned(linear(attention.q_proj, x), place)):
            scores = torch.stack([query @ key[head // group] for key in keys]) / math.sqrt(size)
            weights = scores.softmax(0)
            paid.append(weights)
            heads.append(sum(w * value[head // group] for w, value in zip(weights, values, strict=True)))
        if number == watch:
            watched = torch.stack(paid).mean(0)
        hidden = token + linear(attention.o_proj, torch.cat(heads))
        x = norm(layer.post_attention_layernorm, hidden)
        gate = linear(layer.mlp.gate_proj, x)
        out.append(hidden + linear(layer.mlp.down_proj, gate * torch.sigmoid(gate) * linear(layer.mlp.up_proj, x)))
    return out, watched


def slow_fold(tokens: list[Tensor], paid: Tensor, visual: list[int], ratio: float) -> dict[int, Tensor]:
    """The tokens that stay, by number: each of the others is averaged into the most similar one of them, in order."""
    ranked = sorted(visual, key=lambda n: -float(paid[n]))
    stay = sorted(ranked[: round(len(visual) * (1 - ratio))])
    left = dict(enumerate(tokens))
    for n in sorted(set(visual) - set(stay)):
        alike = [torch.cosine_similarity(tokens[n], tokens[m], dim=0) for m in stay]
        target = stay[int(torch.stack(alike).argmax())]
        left[target] = (left[target] + left.pop(n)) / 2
    return left


def slow_logits(model: Model, embeds: Tensor, visual: list[int], last: int, layer: int, ratio: float) -> Tensor:
    """Logits [V] after the last of `embeds [n, E]`: a prompt up to number `last`, and what has been generated since."""
    decoder = model.get_decoder()
    theta = decoder.config.rope_parameters["rope_theta"]
    tokens, places = list(embeds.double()), list(range(len(embeds)))
    paid = torch.empty(0)
    for index, module in enumerate(decoder.layers):
        if index == layer:
            left = slow_fold(tokens, paid, visual, ratio)
            tokens, places = list(left.values()), list(left)
        tokens, paid = slow_layer(module, theta, tokens, places, last)
    final = tokens[-1]
    final = decoder.norm.weight.double() * final / torch.sqrt((final * final).mean() + decoder.norm.variance_epsilon)
    return model.get_output_embeddings().weight.double() @ final


def slow_answer(
    model: Model, embeds: Tensor, visual: list[int], count: int, layer: int, ratio: float
) -> tuple[list[int], list[Tensor]]:
    """Greedy decoding, everything computed again for every token."""
    ids, logits, last = [], [], len(embeds) - 1
    for _ in range(count):
        logits.append(slow_logits(model, embeds, visual, last, layer, ratio))
        ids.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings().weight[ids[-1]][None]])
    return ids, logits
