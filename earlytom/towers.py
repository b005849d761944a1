"""Adapters: what the encoder must know about a Hugging Face vision tower, and nothing more.

A `Tower` maps pixels to tokens, lists its layers, knows how many leading tokens are not patches, and runs one layer,
with received attention if asked for. `earlytom.encoder` uses `Tower` alone, so a new kind of tower is one small class,
in `earlytom.families.adapters`.

Notation: F frames, S = g*g patch tokens, T = S + prefix tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlytom import ops
from earlytom.attention import attention_matrix, column_means


class LayerParts(NamedTuple):
    """The modules of one encoder layer: each branch and the norm before it."""

    attention_norm: Any
    attention: Any
    mlp_norm: Any
    mlp: Any


class Tower:
    """A vision tower as patches, layers and attention.

    Attributes:
        layers: the encoder layers, in order.
        embeddings: the module that turns pixels into patch tokens.
        prefix: number of leading tokens that are not patches (class token).
        step: pictures per frame; F counts frames.
        streams: layers, ascending, whose states also go to the LLM. `earlytom.encoder` concatenates them to the hidden
            states, [F, T, D * (1 + states so far)], so that merging frames merges them, too.
        full: layers with full attention within a frame, ascending; None: all.
        places_patches: whether layers use a patch's place in the frame, so that patches may not be removed or moved.
        key_bias_cancels: whether a key's bias adds the same to all logits of a query, so that it has no effect.
        residual_dtype: of the residual stream, from the embeddings on.
        logits_dtype: of query and key of the explicit attention matrix.
        matrix_dtype: of that matrix, from the softmax on.

    A dtype of None means that of the input.
    """

    prefix = 0
    step = 1
    streams: tuple[int, ...] = ()
    full: tuple[int, ...] | None = None
    places_patches = False
    key_bias_cancels = True
    residual_dtype: torch.dtype | None = None
    logits_dtype: torch.dtype | None = None
    matrix_dtype: torch.dtype | None = torch.float32

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.layers: Sequence[Any] = model.encoder.layers  # type: ignore[union-attr, assignment]

    @property
    def embeddings(self) -> nn.Module:
        return self.model.embeddings

    def parts(self, layer: Any) -> LayerParts:
        """The modules of a layer."""
        return LayerParts(layer.layer_norm1, layer.self_attn, layer.layer_norm2, layer.mlp)

    def query(self, module: Any, entering: Tensor) -> Tensor:
        """The queries [F, T, D] of all heads in an attention module."""
        return module.q_proj(entering)

    def key(self, module: Any, entering: Tensor) -> Tensor:
        """The keys [F, T, D] of all heads in an attention module."""
        return module.k_proj(entering)

    def embed(self, pixels: Tensor) -> Tensor:
        """[F * step, 3, H, W] normalised pixels to the hidden states [F, T, D] that enter layer 0."""
        return self.model.embeddings(pixels)

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.hidden_size

    def own(self, hidden: Tensor) -> Tensor:
        """The hidden states [F, T, D] without the concatenated `streams`; frames are compared by these."""
        return hidden[..., : self.width] if self.streams else hidden

    def attention_input(self, layer: Any, hidden: Tensor) -> tuple[Any, Tensor]:
        """The attention module of a layer and its input, [F, T, D]."""
        parts = self.parts(layer)
        return parts.attention, parts.attention_norm(hidden)

    def received(self, layer: Any, hidden: Tensor) -> Tensor:
        """Received attention [F, S] fp32 of the patch tokens in a layer with input `hidden [F, T, D]`."""
        module, entering = self.attention_input(layer, hidden)
        return self._received(*self.compared(module, entering), module.head_dim**-0.5)

    def run_layer(self, layer: Any, hidden: Tensor, *, receive: bool = False) -> tuple[Tensor, Tensor | None]:
        """One encoder layer on `hidden [F, T, D]`.

        Returns the new hidden states [F, T, D] and, when `receive` is set, the received attention of the patch tokens
        [F, S] in fp32 (else None).
        """
        attended, received = self.attention(*self.attention_input(layer, hidden), receive)
        hidden = add(hidden, layer.self_attn.out_proj(attended))
        return add(hidden, layer.mlp(layer.layer_norm2(hidden))), received

    def attention(self, module: Any, hidden: Tensor, receive: bool) -> tuple[Tensor, Tensor | None]:
        """Self-attention up to, not including, the output projection: [F, T, D] to [F, T, D].

        `scaled_dot_product_attention`, unless received attention is asked for on a CPU or in an export: then the
        attention matrix is formed, once. On a GPU received attention has its own kernel, beside the fused one, so that
        the matrix is never stored.
        """
        scale = module.head_dim**-0.5
        query, key, value = self.heads(module, hidden)
        received = None
        if receive and not query.is_cuda:
            attention = self._matrix(query, key, scale)
            out = attention.to(value.dtype) @ value
            received = column_means(attention)[:, self.prefix :]
        else:
            out = nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
            if receive:
                received = self._received(query, key, scale)
        return out.transpose(1, 2).flatten(2), received

    def heads(self, module: Any, entering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of an attention module, [F, H, T, D/H] each."""
        return *self.compared(module, entering), by_head(module, module.v_proj(entering))

    def compared(self, module: Any, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key of an attention module, [F, H, T, D/H] each."""
        return by_head(module, self.query(module, entering)), by_head(module, self.key(module, entering))

    def _received(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Received attention [F, S] of the patch tokens: by our operator on a GPU, else by standard operators."""
        means = ops.received_attention if query.is_cuda else lambda *given: column_means(self._matrix(*given))
        return means(query, key, scale)[:, self.prefix :]

    def _matrix(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        query, key = (x.to(self.logits_dtype or x.dtype) for x in (query, key))
        return attention_matrix(query, key, scale, self.matrix_dtype or query.dtype)


def by_head(module: Any, projected: Tensor) -> Tensor:
    """[F, T, D] to [F, H, T, D/H]."""
    return projected.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)


def add(hidden: Tensor, branch: Tensor) -> Tensor:
    """Residual addition in the dtype of the residual stream, whatever the branch's."""
    return (hidden + branch).to(hidden.dtype)
