"""Inner merging in a transformers Qwen2 decoder: layers from the k-th on run the prefill on fewer visual tokens.

`apply_inner` wraps layers k-1 and later, undoably, so that `generate` works; the KV cache tells whether a pass is the
prefill of a prompt or continues one. Later layers see fewer tokens, at their original positions, and keep a shorter KV
cache. Attention stays causal everywhere (unless `InnerSettings.causal` is off), and only the one row of attention that
ranks tokens is computed explicitly. `earlytom.inner` decides.

Notation: B prompts, T tokens a prompt, M tokens of it in the later layers, D width.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlytom.budget import kept_tokens
from earlytom.errors import UserError
from earlytom.inner import InnerSettings, plan_inner
from earlytom.restorable import Restorable
from earlytom.transfers import to_device


@dataclass
class InnerPrompt:
    """A prompt to be announced with `AppliedInner.prompt`.

    Attributes:
        visual: positions of the visual tokens of each row, ascending; on the host.
        length: tokens of a row, padding included.
        last: [B] int64, position of the last token of each row; None: `length` - 1.
        unread: no pass has prefilled it yet.
    """

    visual: list[Tensor]
    length: int
    last: Tensor | None
    unread: bool = True

    @classmethod
    def of(cls, visual: Tensor, last: Tensor | None = None) -> Self:
        """From a mask [B, T] bool, True for visual tokens. Raises UserError for another shape or dtype."""
        if visual.dim() != 2 or visual.dtype != torch.bool:
            raise UserError(f"visual must be bool [B, T], got {visual.dtype} {list(visual.shape)}")
        return cls([row.nonzero().flatten() for row in visual.cpu()], visual.shape[1], last)


@dataclass(frozen=True)
class Held:
    """What the later layers' KV caches hold of a prompt of `length` tokens.

    Attributes:
        kept: [B, M] int64, the prompt's tokens that are kept, ascending; shorter rows are padded on the left.
        real: [B, M] bool, False for that padding; None if there is none.
    """

    length: int
    kept: Tensor
    real: Tensor | None


@dataclass
class _Pass:
    """One forward pass, from layer k-1 on.

    Attributes:
        of: the prompt that it prefills, or what the later caches hold of the prompt that it continues.
        received: [B, T] attention that ranks tokens, in a prefill; see `_received`.
        later: arguments that replace those of the earlier layers in layers k and later.
    """

    of: InnerPrompt | Held
    received: Tensor | None = None
    later: dict[str, Any] = field(default_factory=dict)


class AppliedInner(Restorable):
    """A decoder that merges the visual tokens of announced prompts until `restore()` or the end of the `with` block."""

    def __init__(self, model: nn.Module, settings: InnerSettings) -> None:
        super().__init__()
        self.decoder: Any = _decoder(model)
        self.layer, self.ratio, self._fold, self._causal = settings
        self._local = threading.local()  # the announced prompt and the pass under way, of each thread
        self._check()
        if self.ratio > 0:
            self._install()

    @contextlib.contextmanager
    def prompt(self, visual: Tensor | InnerPrompt, *, last: Tensor | None = None) -> Iterator[None]:
        """Announce a prompt: this thread's next pass prefills and merges it; passes with its KV cache continue it.

        Each generation in the block prefills the prompt anew, into an empty cache (a static cache must have been reset;
        this is not checked, as the host would wait). A cache that holds a merged prompt may be continued outside the
        block; with a static cache on a GPU every such pass waits for the device, so a loop that leaves the block
        between two steps should enter it again with the same `InnerPrompt`.

        Args:
            visual: [B, T] bool, True for visual tokens (on the host it costs no synchronisation), or an `InnerPrompt`.
            last: [B] int64, position of the last token of each prompt if prompts are padded on the right; default
                T - 1.
        """
        prompt = visual if isinstance(visual, InnerPrompt) else InnerPrompt.of(visual, last)
        outer, self._local.prompt = self._announced, prompt
        try:
            yield
        finally:
            self._local.prompt = outer

    @property
    def _announced(self) -> InnerPrompt | None:
        return getattr(self._local, "prompt", None)

    def _check(self) -> None:
        config, depth = self.decoder.config, len(self.decoder.layers)
        if not 1 <= self.layer < depth:
            raise UserError(
                f"inner layer {self.layer} does not exist: the language model has layers 0 to {depth - 1}, and tokens "
                f"can be merged before layers 1 to {depth - 1}; set inner_layer (--inner-layer) to one of them"
            )
        if "sliding_attention" in config.layer_types[self.layer - 1 :]:
            raise UserError(
                "inner merging needs full attention, and this language model has sliding windows from layer "
                f"{config.layer_types.index('sliding_attention')} on: set inner_layer to None"
            )
        if not self._causal and "flash" in config._attn_implementation:
            raise UserError("a layer that is not causal needs a mask: load the model with attn_implementation='sdpa'")
        if "_earlytom_inner" in vars(self.decoder):
            raise UserError("inner merging is already applied: call restore() on what apply_inner returned")

    def _install(self) -> None:
        layers = list(self.decoder.layers)
        self.replace(self.decoder, "_earlytom_inner", self)
        self.replace(layers[self.layer - 1], "forward", self._ranking(layers[self.layer - 1]))
        for index in range(self.layer, len(layers)):
            self.replace(layers[index], "forward", self._later(layers[index], index, index + 1 == len(layers)))

    def _ranking(self, layer: Any) -> Any:
        """Wrap layer k-1: find out which kind of pass this is, and in a prefill rank the visual tokens."""
        own = layer.forward

        @functools.wraps(own)
        def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
            run = self._local.run = self._begin(hidden_states, kwargs.get("past_key_values"))
            if run is not None and isinstance(run.of, InnerPrompt):
                run.received = _received(layer, hidden_states, run.of, **kwargs)
                if not self._causal:
                    kwargs["attention_mask"] = open_mask(kwargs.get("attention_mask"), run.of, hidden_states)
            return own(hidden_states, **kwargs)

        return forward

    def _later(self, layer: Any, index: int, final: bool) -> Any:
        """Wrap layers k and later: merged tokens, their positions and the matching mask."""
        own = layer.forward

        @functools.wraps(own)
        def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
            run: _Pass | None = getattr(self._local, "run", None)
            if run is None:
                return own(hidden_states, **kwargs)
            if final:
                self._local.run = None
            if index == self.layer:
                hidden_states = self._enter(run, hidden_states, kwargs)
            return own(hidden_states, **(kwargs | run.later))

        return forward

    def _begin(self, hidden: Tensor, cache: Any) -> _Pass | None:
        """The pass if it prefills the announced prompt or continues a merged one; None for any other."""
        prompt, length = self._announced, hidden.shape[1]
        held: Held | None = getattr(cache, "_earlytom_inner", None)
        # Whether the cache is empty is checked last: a static one answers with a tensor, for which the host would wait.
        if prompt is None:
            if held is not None and self._seen(cache) == 0:  # it was reset
                held = cache._earlytom_inner = None
            return None if held is None else _Pass(held)
        if held is not None and not prompt.unread and (length < prompt.length or self._seen(cache) > 0):
            return _Pass(held)
        if length < prompt.length or (isinstance(seen := self._seen(cache), int) and seen > 0):
            raise UserError(
                f"the announced prompt of {prompt.length} tokens must be read in one pass into an empty cache, got "
                f"{length} tokens: leave out prefill_chunk_size, and a cache that holds something else"
            )
        if hidden.shape[0] % len(prompt.visual):
            raise UserError(f"{len(prompt.visual)} prompts were announced, and a batch of {hidden.shape[0]} came")
        prompt.unread = False
        return _Pass(prompt)

    def _seen(self, cache: Any) -> Any:
        """Tokens that the cache of layer k-1 holds: a number, or a tensor on the device if the cache is static."""
        return 0 if cache is None else cache.get_seq_length(self.layer - 1)

    def _enter(self, run: _Pass, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Before layer k: merge in a prefill, and prepare the later layers' arguments in `run.later`.

        Returns the hidden states: [B, M, D] in a prefill, else unchanged.
        """
        cache, held, reads = kwargs.get("past_key_values"), run.of, isinstance(run.of, InnerPrompt)
        if isinstance(held, InnerPrompt):
            assert run.received is not None  # layer k-1 saw to it
            hidden, held = self._merge(held, run.received, hidden)
            if cache is not None:
                cache._earlytom_inner = held
            cos, sin = (
                x.expand(len(hidden), -1, -1).take_along_dim(held.kept[..., None], 1)
                for x in kwargs["position_embeddings"]
            )
            # The rotary embedding has the original positions. Ids with gaps would look to flash attention like packed
            # sequences, so there are none.
            run.later |= {"position_embeddings": (cos, sin), "position_ids": None}
        tokens = hidden.shape[1]
        columns = tokens if cache is None else cache.get_mask_sizes(tokens, self.layer)[0]
        flat = "flash" in self.decoder.config._attn_implementation
        given = kwargs.get("attention_mask")
        run.later["attention_mask"] = later_mask(given, held, tokens, columns, reads=reads, flat=flat)
        return hidden

    def _merge(self, prompt: InnerPrompt, received: Tensor, hidden: Tensor) -> tuple[Tensor, Held]:
        """[B, T, D] to [B, M, D], M of the row that keeps most; row by row, as rows may differ in length."""
        copies = len(hidden) // len(prompt.visual)  # `generate` repeats each prompt for its beams
        plans = []
        for row, tokens in enumerate(hidden):
            visual = to_device(prompt.visual[row // copies], hidden.device)
            plans.append(plan_inner(tokens, received[row], visual, kept_tokens(len(visual), self.ratio)))
        longest = max(len(plan.kept) for plan in plans)
        missing = [longest - len(plan.kept) for plan in plans]
        left = (plan.apply(row, fold=self._fold) for plan, row in zip(plans, hidden, strict=True))
        merged = torch.stack([F.pad(row, (0, 0, pad, 0)) for row, pad in zip(left, missing, strict=True)])
        kept = torch.stack([F.pad(plan.kept, (pad, 0)) for plan, pad in zip(plans, missing, strict=True)])
        real = None
        if any(missing):
            pads = to_device(torch.tensor(missing), hidden.device)
            real = torch.arange(longest, device=hidden.device) >= pads[:, None]
        return merged, Held(hidden.shape[1], kept, real)


def later_mask(
    mask: Tensor | None, held: Held, queries: int, columns: int, *, reads: bool, flat: bool = False
) -> Tensor | None:
    """The attention mask of layers k and later, from that of the earlier layers.

    Args:
        mask: None, [B, 1, q, c] (bool, or additive), or [B, c] (flash attention: padding only).
        held: the prompt's tokens in the later layers.
        queries: tokens of this pass in the later layers.
        columns: keys of the later layers, this pass included; a static cache has more than it uses.
        reads: this pass is the prefill, so queries were removed, too.
        flat: the attention in use takes masks [B, c] (flash attention).
    """
    if mask is None:
        if held.real is None:
            return None  # causal by shape alone, before and after
        early = held.length + columns - held.kept.shape[1]
        mask = held.kept.new_ones(early if flat else (held.length if reads else queries, early), dtype=torch.bool)
        mask = mask[None] if flat else mask.tril(0 if reads else early - queries)[None, None]
    if not isinstance(mask, Tensor):
        raise UserError(
            f"inner merging cannot shorten an attention mask of type {type(mask).__name__}: load the model with "
            "attn_implementation='sdpa'"
        )
    batch, kept = held.kept.shape
    fresh = torch.arange(columns - kept, device=mask.device) + held.length  # columns after the prompt
    index = torch.cat([held.kept, fresh.clamp(max=mask.shape[-1] - 1).expand(batch, -1)], 1)  # [B, columns]
    prompt = torch.ones_like(held.kept, dtype=torch.bool) if held.real is None else held.real
    valid = torch.cat([prompt, (fresh < mask.shape[-1]).expand(batch, -1)], 1)
    mask = mask.expand(batch, *mask.shape[1:])
    if mask.dim() == 2:
        return mask.take_along_dim(index, 1) * valid
    if reads:
        mask = mask.take_along_dim(held.kept[:, None, :, None], 2)
    mask = mask.take_along_dim(index[:, None, None], 3)
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~valid[:, None, None], blocked)


def open_mask(mask: Tensor | None, prompt: InnerPrompt, hidden: Tensor) -> Tensor:
    """The mask [B, 1, T, c] with which every prompt token sees what the last one sees, from the layer's own mask (None:
    causal by shape). `hidden` [B, T, D] is the layer's input."""
    batch, length = hidden.shape[:2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
    mask = mask.expand(batch, *mask.shape[1:])
    last = _last(prompt, hidden)[:, None, None, None]  # [B, 1, 1, 1]
    asks = torch.arange(length, device=hidden.device)[:, None]
    return torch.where(asks <= last, mask.take_along_dim(last, 2), mask)


def _last(prompt: InnerPrompt, hidden: Tensor) -> Tensor:
    """Position of the last token of each row of `hidden [B, T, D]`, [B] int64."""
    batch = len(hidden)
    if prompt.last is None:
        return torch.full((batch,), prompt.length - 1, device=hidden.device)
    return prompt.last.to(hidden.device).repeat_interleave(batch // len(prompt.last))


def _received(
    layer: Any,
    hidden: Tensor,
    prompt: InnerPrompt,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention of the last prompt token to each token in this Qwen2 layer, mean over heads, fp32 [B, T].

    Only this row is computed, so the layer itself may use any attention kernel. `hidden` [B, T, D] is the layer's
    input.
    """
    attention = layer.self_attn
    batch, length = hidden.shape[:2]
    last = _last(prompt, hidden)
    at = last[:, None, None]  # [B, 1, 1]
    x = layer.input_layernorm(hidden)
    cos, sin = (e.expand(batch, -1, -1) for e in position_embeddings)
    keys = attention.k_proj(x).view(batch, length, -1, attention.head_dim)
    query = attention.q_proj(x.take_along_dim(at, 1)).view(batch, 1, -1, attention.head_dim)
    keys = _rotated(keys, cos, sin).permute(0, 2, 3, 1).float()  # [B, kv heads, d, T]
    query = _rotated(query, cos.take_along_dim(at, 1), sin.take_along_dim(at, 1)).float()
    scores = query.view(batch, keys.shape[1], -1, attention.head_dim) @ keys * attention.scaling  # [B, kv, group, T]
    scores = scores.flatten(1, 2)  # [B, heads, T]
    visible = torch.arange(length, device=hidden.device) <= last[:, None]
    if isinstance(attention_mask, Tensor):
        mask = attention_mask[..., :length].expand(batch, *attention_mask.shape[1:-1], length)
        row = mask[:, None] if mask.dim() == 2 else mask.take_along_dim(at[..., None], 2)[:, :, 0]  # [B, 1 or heads, T]
        if not row.is_floating_point():
            row = torch.zeros_like(row, dtype=scores.dtype).masked_fill(~row.bool(), -torch.inf)
        scores = scores + row.float()
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `x` [B, T, heads, d], with cos and sin [B, T, d]."""
    one, two = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-two, one], dim=-1) * sin[:, :, None]


def _decoder(model: Any) -> Any:
    """The Qwen2 decoder of a model, or the model itself if it is one."""
    decoder = model if hasattr(model, "layers") else getattr(model, "get_decoder", lambda: model)()
    family = getattr(getattr(decoder, "config", None), "model_type", type(model).__name__)
    if family != "qwen2" or not hasattr(decoder, "layers"):
        raise UserError(
            f"{type(model).__name__} ({family}) is not supported: inner merging takes a Qwen2 decoder; leave it out"
        )
    return decoder


def apply_inner(
    model: nn.Module, layer: int, ratio: float = 0.5, fold: bool = True, causal: bool = True
) -> AppliedInner:
    """Make a transformers Qwen2 decoder merge visual tokens before one of its layers, on prefill.

        with apply_inner(model, layer=18, ratio=0.5) as inner, inner.prompt(visual):
            model.generate(inputs_embeds=embeds, ...)

    Works as a plain call (`restore()` on the result undoes it) and as a context manager. Prompts that are not announced
    are not changed. `earlytom.apply_earlytom` does all this for a whole video model.

    Args:
        model: a Qwen2 decoder, or a model that has one (`Qwen2ForCausalLM`, a video model).
        layer: k, the first layer that sees fewer tokens, from 1 on.
        ratio: share of the visual tokens to remove, in [0, 1); 0 changes nothing.
        fold, causal: see `InnerSettings`.

    Raises:
        UserError: another model family, a layer that does not exist, sliding windows, flash attention without
            causality, or it is applied already.
    """
    if not 0 <= ratio < 1:
        raise UserError(f"the inner ratio must be in [0, 1), got {ratio}")
    return AppliedInner(model, InnerSettings(layer, ratio, fold, causal))
