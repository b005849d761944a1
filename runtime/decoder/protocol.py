"""The interface of a decoder: PyTorch in this process, or vLLM in this process or elsewhere.

`runtime.decoder.eager.Decoder` documents the methods in full.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.decoder.eager import Finish
from runtime.decoder.sampling import GREEDY, Sampling


class ReadPrompt(Protocol):
    """A prefilled prefix, as its decoder keeps it."""

    @property
    def length(self) -> int:
        """Its number of tokens."""
        ...

    @property
    def bytes(self) -> int:
        """Its memory in this process."""
        ...


class TextDecoder(Protocol):
    """From prompt embeddings to token ids."""

    @property
    def limit(self) -> int:
        """Context length in tokens, prompt and answer together."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of embeddings."""
        ...

    @property
    def concurrent(self) -> int:
        """Number of concurrent streams, each in its own thread."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of token ids int64 [...]."""
        ...

    def prefill(
        self,
        inputs_embeds: Tensor,
        visual: Sequence[int] | None = None,
        *,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> ReadPrompt:
        """Prefill a prompt's prefix [1, L, D], for any number of `stream` calls to continue from."""
        ...

    def stream(
        self,
        inputs_embeds: Tensor,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        visual: Sequence[int] | None = None,
        prefix: Any = None,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Generator[int, None, Finish]:
        """The ids that answer a prompt [1, L, D]; closing it ends the answer. `prefix` is of this decoder's `prefill`.

        Raises:
            DecoderFailed: while iterating, the decoder is elsewhere and has failed.
        """
        ...

    def close(self) -> None:
        """Free resources held elsewhere. No stream may be open; a second call does nothing."""
        ...
