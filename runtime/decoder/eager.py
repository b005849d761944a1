"""The LLM decoder behind the vision engine: prompt embeddings in, token ids out, one at a time.

It knows nothing of video, prompts or text. It drives any transformers decoder that takes `inputs_embeds` and whose
logits are `lm_head(hidden)` (Qwen2, Llama, Mistral, ...) with a static KV cache: one per length bucket, allocated at
first use and cleared, not reallocated, for each request. Prefill computes logits for the last position only. Greedy
decoding gives the tokens of `generate(inputs_embeds=..., do_sample=False)`; logits processors of a checkpoint's
generation config (such as a repetition penalty) are not applied.

    decoder = Decoder.from_model(model)
    for token in decoder.stream(embeds, max_new_tokens=64, stop_ids=(tokenizer.eos_token_id,)):
        ...

Several questions about one video share a prefix, which is prefilled once:

    prefix = decoder.prefill(embeds)
    for token in decoder.stream(question, prefix=prefix, max_new_tokens=64): ...

A prompt's tokens may have explicit positions and a bias on their keys, see `runtime.decoder.placing`.

A decode step works in fixed buffers, from the token's embedding to the pick of the next one, and on a GPU is a CUDA
graph, one per bucket and kind of prompt (plain, with positions, with a bias): a greedy step allocates nothing, and the
host waits for the token only. With sampling the pick follows the graph, in memory cached by torch. The prefill is not
captured, as lengths differ.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from earlytom.errors import UserError
from earlytom.inner_decoder import InnerPrompt, apply_inner
from earlytom.numbers import real, whole
from earlytom.transfers import to_device
from runtime.decoder.checks import (
    broken_prompt,
    checked_length,
    overflow,
    refuse_long_prefix,
    refuse_places,
    refuse_prefix,
)
from runtime.decoder.picking import Picker, pick_best
from runtime.decoder.placing import Placed, PromptPass
from runtime.decoder.prefix import Prefix
from runtime.decoder.sampling import GREEDY, Sampling
from runtime.decoder.states import adding, checked_states
from runtime.gpu.graphs import Replay, ToHost

SMALLEST_BUCKET = 512
# Why a stream ended: one of the stop ids came, or the token limit was reached.
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class InnerMerge:
    """Merging of visual tokens inside the decoder, before `layer`; `ratio`: share of them to merge away, in [0, 1)."""

    layer: int
    ratio: float = 0.5

    def __post_init__(self) -> None:
        """Raises UserError for what is no number; the decoder checks the range."""
        object.__setattr__(self, "layer", whole("inner layer (--inner-layer)", self.layer))
        object.__setattr__(self, "ratio", real("inner ratio (--inner-ratio)", self.ratio))


class Decoder:
    """One decoder and its caches; one stream at a time.

    Args:
        language_model: the transformer without its head, in the dtype and on the device to run in. Put in eval mode.
        lm_head: hidden states to logits; its first parameter has a row for each of them.
        buckets: cache lengths, in any order; a request uses the smallest that holds prompt and answer. Default: powers
            of two from 512, and the model's context. The largest is the limit if it is below the context.
        inner: merge visual tokens inside the decoder (Qwen2 only); the decoder's layers are wrapped permanently.
        replay: runs the decode steps; default: captures them on a GPU.

    Attributes:
        limit: context length in tokens, prompt and answer together.
        device, dtype: of the model.
        concurrent: number of concurrent streams.
        replay: its `reason` says why decode steps are not CUDA graphs, if they are not. Clear it when weights have
            moved.

    Raises:
        ValueError: a bucket below 1.
        UserError: `inner` does not fit the model.
    """

    concurrent = 1

    def __init__(
        self,
        language_model: nn.Module,
        lm_head: nn.Module,
        *,
        buckets: Sequence[int] | None = None,
        inner: InnerMerge | None = None,
        replay: Replay | None = None,
    ) -> None:
        applied = None if inner is None else apply_inner(language_model, inner.layer, inner.ratio)
        self._inner = applied if applied is not None and applied.ratio > 0 else None  # a ratio of 0 changes nothing
        self._language_model = language_model.eval()
        self._lm_head = lm_head.eval()
        self._embedding: nn.Module = language_model.get_input_embeddings()  # type: ignore[operator]
        self._config = cast(Any, language_model.config)
        weight, head = next(self._embedding.parameters()), next(lm_head.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._width = weight.shape[-1]
        self.buckets = _buckets(self._config.max_position_embeddings, buckets)
        self.limit = self.buckets[-1]
        self.replay = Replay(self.device) if replay is None else replay
        self._caches: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._mark = object()  # marks this decoder's prefixes
        # Read and written by a decode step: the last picked token, and the logits after it.
        self._chosen = torch.zeros((), dtype=torch.int64, device=self.device)
        self._logits = torch.empty(len(head), dtype=head.dtype, device=self.device)
        self._to_host = ToHost(self.device)

    @classmethod
    def from_model(
        cls,
        model: Any,
        *,
        buckets: Sequence[int] | None = None,
        inner: InnerMerge | None = None,
        replay: Replay | None = None,
    ) -> Decoder:
        """The decoder of a transformers model with a language modelling head, for example
        a `Qwen2ForCausalLM` or a video model around one; weights are shared."""
        return cls(model.get_decoder(), model.get_output_embeddings(), buckets=buckets, inner=inner, replay=replay)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of token ids int64 [...]; the caller replaces those of video placeholders."""
        with torch.no_grad():  # not inference_mode: the caller may write the video's tokens into the result
            return self._embedding(to_device(ids, self.device))

    def close(self) -> None:
        """Nothing to do: no resources are held elsewhere."""

    def warm_up(self, lengths: Iterable[int], *, positions: bool = False, bias: bool = False) -> None:
        """Allocate caches, capture decode steps and run each once, so that no request pays for it.

        Args:
            lengths: expected lengths of prompt and answer together, each at least 3; one per bucket is enough.
            positions, bias: whether the prompts will have them.

        Raises:
            ValueError: a length below 3.
            UserError: a length above `limit`, or the model's logits are not finite.
            RuntimeError: a stream has not ended.
        """
        for length in lengths:
            if length < 3:
                raise ValueError(f"a warm-up takes lengths of at least 3 positions, got {length}")
            embeds = torch.zeros(1, length - 2, self._width, dtype=self.dtype, device=self.device)
            places = torch.arange(length - 2, device=self.device) if positions else None
            weights = torch.zeros(length - 2, device=self.device) if bias else None
            for _ in self.stream(embeds, max_new_tokens=2, positions=places, bias=weights):
                pass

    def prefill(
        self,
        inputs_embeds: Tensor,
        visual: Sequence[int] | None = None,
        *,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Prefix:
        """Prefill a prompt's prefix, for any number of `stream` calls to continue from, each at the cost of a copy.

        Logits after prefix and rest equal those of the whole prompt up to rounding, as sums run in another order.

        Args:
            inputs_embeds: [1, L, D]; converted as in `stream`.
            visual, positions, bias, states: as in `stream`.

        Raises:
            ValueError: embeddings, positions, a bias or states of another shape.
            UserError: it leaves no room in `limit` for a question and an answer; embeddings that are not finite;
                visual tokens for inner merging, which needs the question; a model whose layers cannot be kept, or
                take no positions or bias.
            RuntimeError: a stream has not ended.
        """
        length = checked_length(inputs_embeds, self._width)
        refuse_prefix(merging=self._merges(visual))
        placed = self._placed(length, positions, bias, states=states)
        refuse_long_prefix(length, self.limit)
        with self._alone(), torch.inference_mode():
            cache = self._cleared_cache(length, placed)
            self._hidden(inputs_embeds.to(self.device, self.dtype), cache, None, 0, placed)
            prefix = cache.take(length, self._mark, placed)
            # Checked here, so that a later question does not blame the model; last, since the host waits.
            if (broken := broken_prompt(inputs_embeds, placed)) is not None:
                raise UserError(broken)
            return prefix

    def stream(
        self,
        inputs_embeds: Tensor,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        visual: Sequence[int] | None = None,
        prefix: Prefix | None = None,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
        states: Tensor | None = None,
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
            prefix: the beginning of the prompt, from `prefill`; `inputs_embeds` are what comes after it.
            positions: int64 [L] position ids of `inputs_embeds`; the answer's continue from the last. [A, L] for a
                model whose rotary embedding has A axes: the answer's continue from the largest of the last. Default:
                consecutive, from 0 or from the prefix's end.
            bias: fp32 [L], added to the attention logits of each token's key, in all layers. The prefix has its own
                bias, the answer none.
            states: [K, L, D], added to the outputs of the first K layers.

        Yields:
            token ids.

        Returns:
            (as the generator's value) "stop" or "length".

        Raises:
            ValueError: a prompt, positions, a bias or states of another shape.
            UserError: prompt and answer do not fit in `limit`; a prefix of another decoder, or one together with
                visual tokens for inner merging; a bias together with these; a model whose attention takes no positions
                or bias; while iterating, logits that are not finite.
            RuntimeError: while iterating, another stream of this decoder has not ended.
        """
        length = checked_length(inputs_embeds, self._width)
        max_new_tokens = whole("max_new_tokens (--max-new-tokens)", max_new_tokens, 1)
        before, rest = "", length
        if prefix is not None:
            if prefix.maker is not self._mark:
                raise UserError("this prefix was made by another decoder: make it anew with this one's prefill")
            refuse_prefix(merging=self._merges(visual))
            before, length = f" ({prefix.length} of them a prefix)", length + prefix.length
        if length + max_new_tokens > self.limit:
            raise UserError(
                f"a prompt of {length} tokens{before} and {max_new_tokens} new ones need {length + max_new_tokens} "
                f"positions, the decoder has {self.limit}: lower --max-new-tokens, or use an engine with fewer frames "
                "or tokens"
            )
        placed = self._placed(rest, positions, bias, prefix, visual, states)
        # The body is a generator of its own so that the checks above fail here and not at the first `next`.
        merged: InnerPrompt | None = None
        if visual and self._merges(visual):
            mask = torch.zeros(1, length, dtype=torch.bool)
            mask[0, list(visual)] = True
            merged = InnerPrompt.of(mask)
        return self._generate(inputs_embeds, max_new_tokens, frozenset(stop_ids), sampling, merged, prefix, placed)

    def _generate(
        self,
        embeds: Tensor,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        sampling: Sampling,
        merged: InnerPrompt | None,
        prefix: Prefix | None,
        placed: Placed | None,
    ) -> Generator[int, None, Finish]:
        # Entered here, not in `stream`: a generator that is never started would not release it.
        with self._alone():
            start = 0 if prefix is None else prefix.length
            cache = self._cleared_cache(start + embeds.shape[1] + max_new_tokens, placed)
            pick = Picker(sampling, self.device)
            self._read_prompt(embeds.to(self.device, self.dtype), cache, merged, prefix, placed)
            for count in range(1, max_new_tokens + 1):
                if count > 1:
                    self._advance(cache, merged)
                if count == 1 or not pick.greedy:  # a decode step itself picks greedily
                    self._choose(pick)
                token = self._to_host(self._chosen)  # the one wait for the device in a step
                if token < 0:
                    raise UserError(broken_prompt(embeds, placed) or overflow(self.dtype, count))
                if token in stop_ids:
                    return "stop"
                yield token
            return "length"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Exclusive use of the caches within the block. Raises RuntimeError if they are in use."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this decoder is already streaming an answer: finish or close that stream first, or use another Decoder"
            )
        try:
            yield
        finally:
            self._lock.release()

    # Inference mode is entered for each step: held across a `yield` it would leak into the caller's code.
    @torch.inference_mode()
    def _read_prompt(
        self,
        embeds: Tensor,
        cache: Any,
        merged: InnerPrompt | None,
        prefix: Prefix | None,
        placed: Placed | None = None,
    ) -> None:
        """Put prefix and `embeds` [1, L, D] into an empty cache, and the logits after them into their buffer."""
        start = 0
        if prefix is not None:
            cache.restore(prefix)
            start = prefix.length
        self._logits.copy_(self._forward(embeds, cache, merged, start, placed))
        if cache.steps is not None:
            cache.steps.begin(placed)

    @torch.inference_mode()
    def _choose(self, pick: Picker) -> None:
        self._chosen.copy_(pick(self._logits))

    @torch.inference_mode()
    def _advance(self, cache: Any, merged: InnerPrompt | None) -> None:
        """One decode step, as a graph where there is one."""
        step = functools.partial(self._step, cache, merged)
        if merged is None:
            self.replay(cache.key, step)
        else:
            step()  # not a graph: the merged prompt's mask differs in every request

    def _step(self, cache: Any, merged: InnerPrompt | None) -> None:
        """Append the picked token to the cache; write the next logits and their best id to the fixed buffers."""
        embeds = self._embedding(self._chosen.view(1, 1))
        self._logits.copy_(self._forward(embeds, cache, merged))
        self._chosen.copy_(pick_best(self._logits))
        if cache.steps is not None:
            cache.steps.leave()

    @torch.inference_mode()
    def _forward(
        self,
        embeds: Tensor,
        cache: Any,
        merged: InnerPrompt | None,
        start: int | None = None,
        placed: Placed | None = None,
    ) -> Tensor:
        """The logits [V] after the last of `embeds`; otherwise as `_hidden`."""
        return self._lm_head(self._hidden(embeds, cache, merged, start, placed)[:, -1])[0]

    @torch.inference_mode()
    def _hidden(
        self, embeds: Tensor, cache: Any, merged: InnerPrompt | None, start: int | None, placed: Placed | None
    ) -> Tensor:
        """Append `embeds` [1, L, D] to the cache, from slot `start` on; returns the hidden states of the last pass.

        None for `start`: a decode step, after the cache's last token.
        """
        # Announced at every step, else the wrapped layers would read the cache's length from the device.
        told = contextlib.nullcontext() if merged is None or self._inner is None else self._inner.prompt(merged)
        hidden = embeds
        states = None if placed is None else placed.states
        with told:
            for tokens, columns, how in self._passes(cache, start, placed):
                reading = cache.reading(None if start is None else start + tokens.start, columns)
                with reading, adding(self._language_model, states, tokens):
                    hidden = self._language_model(
                        inputs_embeds=embeds[:, tokens], past_key_values=cache, use_cache=True, **how
                    ).last_hidden_state
        return hidden

    def _passes(self, cache: Any, start: int | None, placed: Placed | None) -> Iterable[PromptPass]:
        """The passes to run: several for a long prompt with a bias, else one."""
        if placed is not None:
            return placed.passes(cache.bucket, self.dtype)
        how = cache.steps.enter() if start is None and cache.steps is not None else {}
        return [PromptPass(slice(0, None), None, how)]

    @torch.inference_mode()
    def _cleared_cache(self, length: int, placed: Placed | None = None) -> Any:
        """The cache of the smallest bucket that holds `length` positions, empty, its decode step captured.

        It is cleared before use, not after, so that it does not matter how the last request ended.
        """
        from runtime.decoder.cache import DecoderCache

        bucket = next(size for size in self.buckets if size >= length)
        if bucket not in self._caches:
            self._caches[bucket] = DecoderCache(self._config, bucket)
        cache = self._caches[bucket]
        if not cache.on_device:
            self.replay.refuse(
                "this language model has layers (sliding windows, linear attention) that keep count on the host"
            )
        cache.prepare_steps(placed, self.dtype, self.device)

        def rewind() -> None:
            cache.reset()
            self._chosen.zero_()  # a valid id: the last answer may have ended with -1

        self.replay.prepare(cache.key, functools.partial(self._step, cache, None), rewind)
        cache.reset()
        return cache

    def _placed(
        self,
        length: int,
        positions: Tensor | None,
        bias: Tensor | None,
        prefix: Prefix | None = None,
        visual: Sequence[int] | None = None,
        states: Tensor | None = None,
    ) -> Placed | None:
        """The placing of the `length` tokens of a prompt after a prefix. Raises UserError if it is not supported."""
        if states is not None:
            states = checked_states(states, self._language_model, length, self._width).to(self.device, self.dtype)
        placed = Placed.of(length, positions, bias, prefix, self.device, states)
        if placed is not None:
            refuse_places(placed, self._config, merging=self._merges(visual))
        return placed

    def _merges(self, visual: Sequence[int] | None) -> bool:
        return self._inner is not None and bool(visual)


def _buckets(context: int, wanted: Sequence[int] | None) -> tuple[int, ...]:
    if wanted is None:
        doubled = (SMALLEST_BUCKET << n for n in range(max(0, context.bit_length())))
        return (*(size for size in doubled if size < context), context)
    if not wanted or min(wanted) < 1:
        raise ValueError(f"buckets must be positive cache lengths, got {list(wanted)}")
    return tuple(sorted({min(size, context) for size in wanted}))
