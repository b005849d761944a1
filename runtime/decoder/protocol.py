"""What answering needs of a decoder, whoever decodes: PyTorch in this process, or vLLM here or elsewhere.

`runtime.decoder.eager.Decoder` is the first of them, and says at length what each of these does.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.decoder.eager import Finish
from runtime.decoder.sampling import GREEDY, Sampling


class ReadPrompt(Protocol):
    """The beginning of a prompt as its decoder keeps it, to go on from."""

    @property
    def length(self) -> int:
        """Tokens of it."""
        ...

    @property
    def bytes(self) -> int:
        """Memory that it takes here."""
        ...


class TextDecoder(Protocol):
    """From prompt embeddings to token ids."""

    @property
    def limit(self) -> int:
        """The most positions that a prompt and its answer may take together."""
        ...

    @property
    def device(self) -> torch.device:
        """Of embeddings."""
        ...

    @property
    def concurrent(self) -> int:
        """Streams that may be under way at a time, each in a thread of its own."""
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
        """The beginning [1, L, D] of a prompt, for `stream` to go on from any number of times."""
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
        """Let go of what is held elsewhere. No stream may be under way; a second call does nothing."""
        ...
