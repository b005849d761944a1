"""The beginning of a prompt, read once: keys and values that answers to several questions start from.

    prefix = decoder.prefill(embeds)  # chat template, visual tokens, newline
    for question in questions:
        for token in decoder.stream(question, prefix=prefix, max_new_tokens=64): ...

It is a copy: no stream changes it, and it stays valid however the decoder's own caches are used. It belongs to the
decoder that made it, as keys and values mean nothing to other weights. Nothing here knows of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a decoder holds of a prompt's first tokens; made by `Decoder.prefill`, and not to be written to.

    Attributes:
        keys, values: of each layer that has them, in turn, [1, H, L, d] (H key/value heads), contiguous, on the
            decoder's device and in its dtype. Layers with a sliding window hold the last tokens only, at most a window
            of them.
        length: L, positions that it takes in a prompt.
        maker: identifies the decoder that made it, and does not keep it alive.
        position: int64 [], of the token that comes after it; None if that is L.
        bias: fp32 [L], added to the attention logits of its keys; None if all are 0.
        ends: of each layer that has no keys and values, what it keeps at the prefix's end: its convolution's last
            inputs, and its state.
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
        """Memory that its tensors take."""
        ends = (tensor for end in self.ends for tensor in end)
        tensors = (*self.keys, *self.values, self.position, self.bias, *ends)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __repr__(self) -> str:
        return f"Prefix(length={self.length}, layers={len(self.keys)}, bytes={self.bytes})"
