"""A prompt's prefix, prefilled once: the keys and values that several questions continue from.

    prefix = decoder.prefill(embeds)  # chat template, visual tokens, newline
    for question in questions:
        for token in decoder.stream(question, prefix=prefix, max_new_tokens=64): ...

It is a copy: no stream changes it, and it stays valid whatever happens to the decoder's KV cache. It is valid only for
the decoder that made it, as keys and values depend on the weights. Nothing here knows of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """The cached state of a prompt's first tokens; made by `Decoder.prefill`, read-only.

    Attributes:
        keys, values: of each attention layer, [1, H, L, d] (H key/value heads), contiguous, on the decoder's device and
            in its dtype. Layers with a sliding window hold at most the last window of tokens.
        length: L, its tokens.
        maker: identifies the decoder that made it, without keeping it alive.
        position: int64 [], position of the next token; None if that is L.
        bias: fp32 [L], added to the attention logits of its keys; None if all are 0.
        ends: of each linear-attention layer, its convolution's last inputs and its state at the prefix's end.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: int
    maker: object = field(repr=False)
    position: Tensor | None = None
    bias: Tensor | None = None
    ends: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        ends = (tensor for end in self.ends for tensor in end)
        tensors = (*self.keys, *self.values, self.position, self.bias, *ends)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __repr__(self) -> str:
        return f"Prefix(length={self.length}, layers={len(self.keys)}, bytes={self.bytes})"
