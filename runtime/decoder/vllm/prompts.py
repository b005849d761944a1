"""The base class of vLLM decoders: prompts are sent as embeddings, token ids come back.

Text is embedded here, so only the language model's embeddings are loaded. A prefix is kept as embeddings; vLLM finds
its KV cache by content (automatic prefix caching). Replies are validated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from earlytom.errors import UserError
from earlytom.numbers import whole
from earlytom.transfers import to_device
from runtime.decoder.checks import broken_prompt, checked_length, refuse_long_prefix
from runtime.decoder.eager import Finish
from runtime.decoder.naming import PLACES
from runtime.decoder.sampling import GREEDY, Sampling
from runtime.errors import DecoderFailed

CONCURRENT = 32  # the most answers under way, which vLLM batches


@dataclass(frozen=True, eq=False)
class EmbeddedPrompt:
    """The prefix of a prompt.

    Attributes:
        values: [1, L, D]; never written to.
        maker: the decoder that made it.
    """

    values: Tensor
    maker: object = field(repr=False)

    @property
    def length(self) -> int:
        """L."""
        return int(self.values.shape[1])

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.values.nbytes


@dataclass(frozen=True)
class Step:
    """The next token ids of an answer, and its finish reason; None before the end."""

    ids: Sequence[int]
    finish: Finish | None = None


class VllmDecoder(ABC):
    """A decoder whose layers run in vLLM; see `runtime.decoder.protocol.TextDecoder`.

    Args:
        embeddings: [V, D] of the language model; prompts are made on their device and in their dtype.
        limit: the most positions of a prompt with its answer.
        concurrent: the most answers under way.
    """

    def __init__(self, embeddings: Tensor, limit: int, *, concurrent: int = CONCURRENT) -> None:
        self._embeddings = embeddings
        self.limit, self.concurrent = limit, concurrent
        self.device, self.dtype = embeddings.device, embeddings.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of token ids [...] int64."""
        return F.embedding(to_device(ids, self.device), self._embeddings)

    def prefill(
        self,
        inputs_embeds: Tensor,
        visual: Sequence[int] | None = None,
        *,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> EmbeddedPrompt:
        """Keep the prefix [1, L, D] of a prompt; vLLM prefills it with the first question."""
        length = checked_length(inputs_embeds, self._width)
        _refuse_places(positions, bias)
        refuse_long_prefix(length, self.limit)
        _refuse_broken(inputs_embeds)
        return EmbeddedPrompt(inputs_embeds.to(self.device, self.dtype, copy=True), self)

    def stream(
        self,
        inputs_embeds: Tensor,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        visual: Sequence[int] | None = None,
        prefix: EmbeddedPrompt | None = None,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Generator[int, None, Finish]:
        """Generate token ids as `runtime.decoder.eager.Decoder.stream` does; greedy ones are the same."""
        checked_length(inputs_embeds, self._width)
        max_new_tokens = whole("max_new_tokens (--max-new-tokens)", max_new_tokens, 1)
        _refuse_places(positions, bias)
        embeds = inputs_embeds.to(self.device, self.dtype)
        if prefix is not None:
            if prefix.maker is not self:
                raise UserError("this prefix was made by another decoder: make it anew with this one's prefill")
            embeds = torch.cat((prefix.values, embeds), dim=1)
        length = embeds.shape[1]
        if length + max_new_tokens > self.limit:
            raise UserError(
                f"a prompt of {length} tokens and {max_new_tokens} new ones need {length + max_new_tokens} positions, "
                f"the decoder has {self.limit}: lower --max-new-tokens, or start vLLM with a larger --max-model-len"
            )
        return self._generate(embeds[0], max_new_tokens, frozenset(stop_ids), sampling)

    def _generate(
        self, embeds: Tensor, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Generator[int, None, Finish]:
        _refuse_broken(embeds)
        count = 0
        with closing(self.steps(embeds, max_new_tokens, stop_ids, sampling)) as steps:
            for step in steps:
                for token in step.ids:
                    if token in stop_ids:
                        return "stop"
                    if not 0 <= token < len(self._embeddings):
                        raise DecoderFailed(f"the decoder answered with token {token} of {len(self._embeddings)}")
                    if (count := count + 1) > max_new_tokens:
                        raise DecoderFailed(
                            f"the decoder answered with more than the {max_new_tokens} tokens asked for"
                        )
                    yield token
                if step.finish is not None:
                    return step.finish
        raise DecoderFailed("the decoder's answer ended before its end")

    @abstractmethod
    def steps(
        self, embeds: Tensor, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling
    ) -> Generator[Step, None, None]:
        """Stream the answer to a prompt [L, D]; closing the generator also ends the answer in vLLM.

        Raises:
            DecoderFailed: while iterating.
        """

    def close(self) -> None:  # noqa: B027 - a hook
        """Free resources outside this process. A second call does nothing."""

    @property
    def _width(self) -> int:
        return int(self._embeddings.shape[1])


def ids_of(value: object) -> list[int]:
    """`value` as token ids of a step. Raises DecoderFailed if it is no list of int."""
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise DecoderFailed("the decoder answered without token ids: is it a vLLM server that knows return_token_ids?")
    return value


def finish_of(value: object) -> Finish | None:
    """vLLM's finish reason; None before the end. Raises DecoderFailed for other reasons than "stop" and "length"."""
    if value is None:
        return None
    if value == "stop":
        return "stop"
    if value == "length":
        return "length"
    raise DecoderFailed(f"the decoder ended an answer with {str(value)[:40]!r}")


def _refuse_places(positions: Tensor | None, bias: Tensor | None) -> None:
    if positions is not None or bias is not None:
        raise UserError(PLACES)


def _refuse_broken(embeds: Tensor) -> None:
    if (broken := broken_prompt(embeds, None)) is not None:
        raise UserError(broken)
