"""A Q-Former: learned queries that read a question by self-attention and a context by cross-attention.

A post-norm BERT. Queries and text attend to each other; in every other layer the queries also attend to the context;
queries and text have separate feed-forwards. It is always made from trained weights.

Notation: B entries, q queries, L text tokens, N context vectors, h hidden width, C context width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from earlytom.errors import UserError

EPS = 1e-12
MASKED = -10000.0  # added to the logits of text that is padding
CROSS_EVERY = 2  # layers

_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.")


class QFormer:
    """A Q-Former.

    Args:
        weights: by BERT's names, `*_query` for the queries' feed-forwards; and `query [q, h]`.
        heads: of attention.
    """

    def __init__(self, weights: Mapping[str, Tensor], heads: int) -> None:
        self.weights, self.heads = weights, heads
        numbers = [int(found[1]) for name in weights if (found := _LAYER.match(name))]
        self.layers = max(numbers, default=-1) + 1
        missing = [name for name in self._names() if name not in weights]
        if missing or not self.layers:
            lacks = missing[0] if missing else "bert.encoder.layer.0"
            raise UserError(f"a Q-Former is trained and has no {lacks!r}: load the weights of a checkpoint")

    def __call__(self, ids: Tensor, mask: Tensor, context: Tensor, *, queries: int | None = None) -> Tensor:
        """The queries' final hidden states, [B, q, h].

        Args:
            ids: [B, L] int64 of the question; mask: [B, L], 0 for padding.
            context: [B, N, C].
            queries: number of queries to run, the first ones; default: all.
        """
        w = self.weights
        query = w["query"][:queries]
        asked = len(query)
        text = w["bert.embeddings.word_embeddings.weight"][ids]
        text = text + w["bert.embeddings.position_embeddings.weight"][: ids.shape[1]]
        hidden = self._norm("bert.embeddings", torch.cat([query.expand(len(ids), -1, -1), text], 1))
        shown = torch.cat([mask.new_ones(len(mask), asked), mask], 1)
        bias = ((1 - shown.to(hidden.dtype)) * MASKED)[:, None, None]
        for number in range(self.layers):
            name = f"bert.encoder.layer.{number}"
            hidden = self._attend(f"{name}.attention", hidden, hidden, bias)
            query, text = hidden[:, :asked], hidden[:, asked:]
            if number % CROSS_EVERY == 0:
                query = self._attend(f"{name}.crossattention", query, context, None)
            hidden = torch.cat([self._feed(name, "_query", query), self._feed(name, "", text)], 1)
        return hidden[:, :asked]

    def _names(self) -> list[str]:
        """Names of all weights used."""
        names = ["query", *(f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position"))]
        modules = ["bert.embeddings.LayerNorm"]
        for number in range(self.layers):
            name = f"bert.encoder.layer.{number}"
            kinds = ["attention", *(["crossattention"] if number % CROSS_EVERY == 0 else [])]
            for kind in kinds:
                modules += [f"{name}.{kind}.self.{part}" for part in ("query", "key", "value")]
                modules += [f"{name}.{kind}.output.{part}" for part in ("dense", "LayerNorm")]
            for suffix in ("", "_query"):
                modules += [f"{name}.intermediate{suffix}.dense", f"{name}.output{suffix}.dense"]
                modules += [f"{name}.output{suffix}.LayerNorm"]
        return names + [f"{module}.{part}" for module in modules for part in ("weight", "bias")]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        gain, shift = (self.weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return functional.layer_norm(x, x.shape[-1:], gain, shift, EPS)

    def _attend(self, name: str, hidden: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        query, key, value = (
            self._linear(f"{name}.self.{part}", x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, x in (("query", hidden), ("key", context), ("value", context))
        )
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        return self._norm(f"{name}.output", self._linear(f"{name}.output.dense", out) + hidden)

    def _feed(self, name: str, suffix: str, x: Tensor) -> Tensor:
        inner = functional.gelu(self._linear(f"{name}.intermediate{suffix}.dense", x))
        return self._norm(f"{name}.output{suffix}", self._linear(f"{name}.output{suffix}.dense", inner) + x)
