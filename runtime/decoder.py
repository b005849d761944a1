"""The LLM decoder behind the vision engine: prompt embeddings in, token ids out, one at a time.

It knows nothing of video, prompts or text. It drives any transformers decoder that takes `inputs_embeds` and whose
logits are `lm_head(hidden)` (Qwen2, Llama, Mistral, ...) with a static key/value cache: one cache per length bucket,
allocated the first time a request needs it and cleared, not reallocated, for the next one. Prefill computes logits for
the last position only. Greedy decoding gives the tokens of `generate(inputs_embeds=..., do_sample=False)`; logits
processors of a checkpoint's generation config (a repetition penalty, say) are not applied.

    decoder = Decoder.from_model(model)
    for token in decoder.stream(embeds, max_new_tokens=64, stop_ids=(tokenizer.eos_token_id,)):
        ...
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from earlytom.errors import UserError
from earlytom.inner_decoder import Prompt as InnerPrompt
from earlytom.inner_decoder import apply_inner

SMALLEST_BUCKET = 512
MIN_TEMPERATURE = 1e-6  # smaller ones are greedy in float32, or zero
# Why a stream ended: one of the stop ids came, or the token limit was reached.
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. Filters apply in this order, as in transformers.

    Attributes:
        temperature: divides the logits; 0 is greedy, and the rest has no effect then.
        top_k: keep the k most likely tokens (and their ties); 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum, at least one; 1 keeps all.
        seed: the same seed gives the same tokens on the same device; None takes a new one each time.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(f"the temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (off) or more, got {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"the seed must be in [0, 2**63), got {self.seed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


@dataclass(frozen=True)
class InnerMerge:
    """Merging of visual tokens inside the decoder: before which layer, and the share that is folded away (0 to 1)."""

    layer: int
    ratio: float = 0.5


class Decoder:
    """One decoder and its caches; one stream at a time.

    Args:
        language_model: the transformer without its head, in the dtype and on the device to run in. Put in eval mode.
        lm_head: hidden states to logits.
        buckets: cache lengths, any order; a request takes the smallest that holds prompt and answer. By default powers
            of two from 512, and the model's context. The largest is the limit if it is below the context.
        inner: merge visual tokens inside the decoder (Qwen2 only); the decoder's layers are wrapped for good.

    Attributes:
        limit: the most positions that a prompt and its answer may take together.
        device, dtype: of the model.

    Raises:
        ValueError: a bucket below 1.
        UserError: `inner` does not fit the model.
    """

    def __init__(
        self,
        language_model: nn.Module,
        lm_head: nn.Module,
        *,
        buckets: Sequence[int] | None = None,
        inner: InnerMerge | None = None,
    ) -> None:
        self._inner = None if inner is None else apply_inner(language_model, inner.layer, inner.ratio)
        self._language_model = language_model.eval()
        self._lm_head = lm_head.eval()
        self._embedding: nn.Module = language_model.get_input_embeddings()  # type: ignore[operator]
        self._config = cast(Any, language_model.config)
        weight = next(self._embedding.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._width = weight.shape[-1]
        self.buckets = _buckets(self._config.max_position_embeddings, buckets)
        self.limit = self.buckets[-1]
        self._caches: dict[int, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_model(
        cls, model: Any, *, buckets: Sequence[int] | None = None, inner: InnerMerge | None = None
    ) -> Decoder:
        """The decoder of a transformers model with a language modelling head, for example
        `LlavaOnevisionForConditionalGeneration` or `Qwen2ForCausalLM`; weights are shared."""
        return cls(model.get_decoder(), model.get_output_embeddings(), buckets=buckets, inner=inner)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of token ids int64 [...]; placeholder ids for video tokens are the caller's business."""
        with torch.no_grad():  # no inference tensors: the caller may write the video's tokens into the result
            return self._embedding(ids.to(self.device))

    def stream(
        self,
        inputs_embeds: Tensor,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        visual: range | None = None,
    ) -> Generator[int, None, Finish]:
        """Generate token ids; the first `next` runs the prefill, each further one a decode step.

        Closing the generator early (leaving its loop and dropping it, or `close`) leaves the decoder ready for the next
        request. The prompt must not be changed before the first token.

        Args:
            inputs_embeds: [1, L, D]; converted to the decoder's dtype and device where they differ.
            max_new_tokens: at least 1.
            stop_ids: ids that end the answer; they are not yielded.
            sampling: greedy by default.
            visual: positions of the prompt that inner merging may merge; of no effect without it.

        Yields:
            token ids.

        Returns:
            (as the generator's value) "stop" or "length".

        Raises:
            ValueError: a prompt of another shape.
            UserError: prompt and answer do not fit in `limit`; while iterating, logits that are not finite.
            RuntimeError: while iterating, another stream of this decoder has not ended.
        """
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[0] != 1 or inputs_embeds.shape[2] != self._width:
            raise ValueError(f"inputs_embeds must be [1, L, {self._width}], got {list(inputs_embeds.shape)}")
        length = inputs_embeds.shape[1]
        if length < 1:
            raise ValueError("the prompt is empty: give at least one embedding")
        if max_new_tokens < 1:
            raise UserError(
                f"the number of new tokens must be at least 1, got {max_new_tokens}: raise --max-new-tokens"
            )
        if length + max_new_tokens > self.limit:
            raise UserError(
                f"a prompt of {length} tokens and {max_new_tokens} new ones need {length + max_new_tokens} positions, "
                f"the decoder has {self.limit}: lower --max-new-tokens, or use an engine with fewer frames or tokens"
            )
        # The body is a generator of its own so that the checks above fail here and not at the first `next`.
        merged: InnerPrompt | None = None
        if self._inner is not None and visual:
            mask = torch.zeros(1, length, dtype=torch.bool)
            mask[0, visual.start : visual.stop] = True
            merged = InnerPrompt.of(mask)
        return self._generate(inputs_embeds, max_new_tokens, frozenset(stop_ids), sampling, merged)

    def _generate(
        self,
        embeds: Tensor,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        sampling: Sampling,
        merged: InnerPrompt | None,
    ) -> Generator[int, None, Finish]:
        # Taken here and not in `stream`: `finally` does not run in a generator that was never started.
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this decoder is already streaming an answer: finish or close that stream first, or use another Decoder"
            )
        try:
            cache = self._cleared_cache(embeds.shape[1] + max_new_tokens)
            pick = _Picker(sampling, self.device)
            logits = self._forward(embeds.to(self.device, self.dtype), cache, merged)
            for count in range(1, max_new_tokens + 1):
                chosen = pick(logits)
                token = int(chosen)  # the one wait for the device in a step
                if token < 0:
                    raise UserError(self._not_finite(embeds, count))
                if token in stop_ids:
                    return "stop"
                yield token
                if count < max_new_tokens:
                    logits = self._forward(self.embed(chosen.view(1, 1)), cache, merged)
            return "length"
        finally:
            self._lock.release()

    # Inference mode is entered for each step: held across a `yield` it would leak into the caller's code.
    @torch.inference_mode()
    def _forward(self, embeds: Tensor, cache: Any, merged: InnerPrompt | None) -> Tensor:
        """Append `embeds` [1, L, D] to the cache and return the logits [V] after the last of them."""
        # Announced at every step, or the wrapped layers would ask the cache on the device what it holds.
        told = contextlib.nullcontext() if merged is None or self._inner is None else self._inner.prompt(merged)
        with told:
            hidden = self._language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
        return self._lm_head(hidden[:, -1])[0]

    @torch.inference_mode()
    def _cleared_cache(self, length: int) -> Any:
        """The cache of the smallest bucket that holds `length` positions, empty.

        It is cleared before use and not after, so that no way of ending a request matters. Clearing zeroes it: masked
        positions have weight 0, but 0 times a stale NaN is NaN.
        """
        from transformers import StaticCache

        bucket = next(size for size in self.buckets if size >= length)
        if bucket in self._caches:
            self._caches[bucket].reset()
        else:
            self._caches[bucket] = StaticCache(config=self._config, max_cache_len=bucket)
        return self._caches[bucket]

    def _not_finite(self, embeds: Tensor, count: int) -> str:
        if not bool(torch.isfinite(embeds).all()):
            return (
                "the prompt's embeddings hold values that are not finite: check the vision engine with its report.json"
            )
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"the language model's logits are not finite at token {count} in {name}: its activations overflow; "
            "load it in bfloat16 or float32"
        )


class _Picker:
    """Picks one id from logits [V] without waiting for the device: int64 [], -1 if the logits are not finite."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._generator: torch.Generator | None = None
        if not sampling.greedy:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        best = logits.argmax()  # a NaN counts as the largest
        finite = torch.isfinite(logits[best])
        if self._generator is not None:
            # Gumbel-max: argmax(logits - log E), E exponential, follows softmax(logits) and needs no probabilities.
            noise = torch.empty_like(logits).exponential_(generator=self._generator).clamp_min_(1e-30)
            best = (filter_logits(logits, self._sampling) - noise.log_()).argmax()
        return torch.where(finite, best, -1)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits float32 [V] after temperature, top-k and top-p: `softmax` of the result is what is sampled from.

    `sampling` must not be greedy.
    """
    logits = (logits - logits.max()) / sampling.temperature  # the best one is 0, so that none grows to infinity
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ranked, order = logits.sort(descending=True)
        shares = ranked.softmax(-1)
        before = shares.cumsum(-1) - shares  # what the more likely tokens have; 0 for the first, which always stays
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def _buckets(context: int, wanted: Sequence[int] | None) -> tuple[int, ...]:
    if wanted is None:
        doubled = (SMALLEST_BUCKET << n for n in range(max(0, context.bit_length())))
        return (*(size for size in doubled if size < context), context)
    if not wanted or min(wanted) < 1:
        raise ValueError(f"buckets must be positive cache lengths, got {list(wanted)}")
    return tuple(sorted({min(size, context) for size in wanted}))
