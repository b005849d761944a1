"""A Qwen2 decoder as two pure functions of tensors for `torch.export`: prefill and decode.

It knows torch and transformers' Qwen2 modules; nothing of compilers, files, prompts, sampling. Both programs have one
signature,

    program(embeds [1, L, D], last int64 [1], *caches) -> (logits [1, V], *caches)

`last` is the slot of the last real token of `embeds`, and the logits are those after it. A prefill writes L tokens to
slots 0 to L - 1; those after `last` are padding of any content. A decode step (L = 1) writes its token to slot `last`.
The caches are keys and values of each layer in turn, [1, G, C, d] (G key/value heads), both inputs and outputs; nothing
is changed in place.

A slot is attended to only by tokens at or after it. So a slot with padding is overwritten by a decode step before it is
attended to, and no mask has to tell padding from text.

Programs with positions and a bias (see `runtime.decoder.placing`) are different programs with two more inputs:

    program(embeds, last, positions int64 [L], bias fp32 [C], *caches) -> (logits, *caches)

`positions` are used by the rotary embedding only; bias j is added to the attention logits of the key in slot j.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

FAMILY = "qwen2"
# Part of a compiled program's identity: raise it when the programs below compute something else.
REVISION = 1

_ATTENTION = "earlytom_explicit"
_MASKED = -1e30  # added to a float32 score: its weight is exactly 0, and no row becomes NaN as with -inf
_NOT_COMPUTED = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")

Program = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, order=True)
class ProgramSize:
    """The static sizes of a program: cache slots, and tokens per call (1 for a decode step).

    `placed`: whether it takes positions and a bias.
    """

    cache: int
    tokens: int
    placed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.tokens < self.cache:
            raise ValueError(f"a program needs 1 <= tokens < cache slots, got {self.tokens} and {self.cache}")

    @property
    def kind(self) -> str:
        return "decode" if self.tokens == 1 else "prefill"


class DecoderProgram(nn.Module):
    """The program of one size (see the module's docstring); weights are shared with the given modules."""

    def __init__(self, language_model: nn.Module, lm_head: nn.Module, size: ProgramSize) -> None:
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head
        self.size = size

    def forward(self, embeds: Tensor, last: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """See the module's docstring. Call it inside `explicit_attention`."""
        places, caches = (rest[:2], rest[2:]) if self.size.placed else ((), rest)
        config = cast(Any, self.language_model.config)
        slots = torch.arange(self.size.cache, device=embeds.device)
        if self.size.kind == "decode":
            positions, rule = last, functools.partial(_written, (slots == last)[:, None])
        else:
            positions = slots = slots[: self.size.tokens]
            rule = functools.partial(_prefilled, (slots <= last)[:, None])
        update = _Update(caches, rule)
        distance = positions[:, None] - slots[None]  # [L, S] from each query back to each key
        masks = {"full_attention": _additive(distance >= 0)}
        if "sliding_attention" in config.layer_types:
            masks["sliding_attention"] = _additive((distance >= 0) & (distance < config.sliding_window))
        if places:
            positions, bias = places
            masks = {kind: mask + bias[: mask.shape[-1]] for kind, mask in masks.items()}
        hidden = self.language_model(
            inputs_embeds=embeds,
            attention_mask=masks,
            position_ids=positions[None],
            past_key_values=update,
            use_cache=True,
        ).last_hidden_state  # [1, L, D]
        if self.size.kind == "prefill":
            hidden = hidden.index_select(1, last)
        return (self.lm_head(hidden[:, 0]), *update.caches)


class _Update:
    """A functional cache for transformers' layers: `update` returns the keys and values to attend to.

    `rule(new, cache)` returns those and the new cache.
    """

    def __init__(self, caches: tuple[Tensor, ...], rule: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.caches = list(caches)
        self._rule = rule

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, self.caches[2 * layer] = self._rule(keys, self.caches[2 * layer])
        values, self.caches[2 * layer + 1] = self._rule(values, self.caches[2 * layer + 1])
        return keys, values


def _written(here: Tensor, new: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Rule of a decode step: the cache with a token's keys or values [1, G, 1, d] in slot `here` [C, 1], as both."""
    cache = _select(here, new, cache)
    return cache, cache


def _prefilled(used: Tensor, new: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Rule of a prefill: the tokens' own keys or values [1, G, L, d], and the cache that begins with them.

    Padding, where `used` [L, 1] is false, is zeroed: a masked slot has weight 0, but 0 times NaN is NaN.
    """
    new = _select(used, new, torch.zeros_like(new))
    return new, torch.cat((new, cache[:, :, new.shape[2] :]), dim=2)


def _select(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` in float32, which is exact: torch-tensorrt before 2.14 converts bfloat16 tensors to integers."""
    return torch.where(condition, yes.float(), no.float()).to(yes.dtype)


def _additive(allowed: Tensor) -> Tensor:
    """Float32 mask of the shape of `allowed`, to be added to scores."""
    return allowed.logical_not().float() * _MASKED


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attention as matrix products and a softmax in float32; queries [1, H, L, d], result [1, L, H, d].

    Explicit, because compilers treat the fused operator with a mask differently. Queries are scaled before the product,
    which could overflow in float16. Queries of one group are rows of one product, so that keys and values are not
    repeated.
    """
    (_, heads, length, width), (_, groups, slots, _) = query.shape, key.shape
    rows = (query * scaling).reshape(1, groups, -1, width)  # [1, G, H / G * L, d]
    scores = (rows @ key.transpose(2, 3)).view(1, groups, heads // groups, length, slots)
    weights = (scores.float() + attention_mask).softmax(-1).to(value.dtype)
    mixed = weights.view(1, groups, -1, slots) @ value  # [1, G, H / G * L, d]
    return mixed.view(1, heads, length, width).transpose(1, 2), None


@contextmanager
def explicit_attention(language_model: nn.Module) -> Iterator[None]:
    """Within the block the model computes attention with `_attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    config = cast(Any, language_model.config)
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def empty_caches(config: Any, slots: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Zeroed caches for a decoder of this configuration: keys and values of each layer, [1, G, slots, d]."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, slots, width)
    return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * config.num_hidden_layers))


def example_inputs(language_model: nn.Module, size: ProgramSize) -> tuple[Tensor, ...]:
    """Deterministic inputs of a program of this size. The last quarter of a prefill is padding, and the caches hold
    noise, also in slots that a decode step must not attend to."""
    embedding = cast(Any, language_model).get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.shape[0], (1, size.tokens), generator=generator)
    last = size.cache // 2 if size.kind == "decode" else size.tokens - 1 - size.tokens // 4
    caches = empty_caches(cast(Any, language_model.config), size.cache, embedding.dtype, embedding.device)
    places: tuple[Tensor, ...] = ()
    if size.placed:
        gaps = torch.randint(1, 4, (size.tokens,), generator=generator)
        places = (gaps.cumsum(0) + last, torch.randn(size.cache, generator=generator))
    return (
        nn.functional.embedding(ids.to(embedding.device), embedding),
        torch.tensor([last], device=embedding.device),
        *(tensor.to(embedding.device) for tensor in places),
        *(torch.randn(cache.shape, generator=generator).to(cache) for cache in caches),
    )


def export_program(language_model: nn.Module, lm_head: nn.Module, size: ProgramSize) -> ExportedProgram:
    """Export the program of one size, on the model's device and in its dtype; the weights are shared, not copied.

    One export at a time per process, with no other use of the model: torch replaces its parameters meanwhile.
    """
    program = DecoderProgram(language_model, lm_head, size).eval()
    with torch.no_grad(), explicit_attention(language_model):
        return torch.export.export(program, example_inputs(language_model, size), strict=False)


def weights_digest(language_model: nn.Module, lm_head: nn.Module) -> str:
    """SHA-256 (hex) of all that a decoder's programs depend on: settings, weights and their dtype, without the token
    embedding. About a second per gigabyte.
    """
    settings = cast(Any, language_model.config).to_dict()
    settings = {name: value for name, value in settings.items() if name not in _NOT_COMPUTED}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    embedding = cast(Any, language_model).get_input_embeddings()
    parts = [*language_model.named_parameters(), *((f"head.{n}", p) for n, p in lm_head.named_parameters())]
    for name, weight in sorted(parts, key=lambda part: part[0]):
        if weight is embedding.weight and not name.startswith("head."):
            continue
        sha.update(f"{name}:{weight.dtype}:{tuple(weight.shape)}:".encode())
        sha.update(weight.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return sha.hexdigest()
