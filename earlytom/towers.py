"""Adapters: what the encoder must know about a Hugging Face vision tower, and nothing more.

A tower says how pixels become tokens, which modules are its layers, how many leading tokens are not patches, and how
one layer runs around a given attention. The merge hook in `earlytom.encoder` is written against `Tower` alone, so a new
family is one small class here. Supported: SigLIP, SigLIP2 (fixed resolution), CLIP, DINOv2 of transformers.

Notation: F frames, S = g*g patch tokens, T = S + prefix tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from earlytom import ops
from earlytom.attention import attention_matrix, column_means
from earlytom.errors import UserError


class Tower:
    """One vision tower seen as patches, layers and attention.

    Attributes:
        layers: the encoder layers, in order.
        prefix: number of leading tokens that are not patches (class token).
        residual_dtype: of the hidden states between the branches, from the embeddings on.
        logits_dtype: of query and key of the explicit attention matrix.
        matrix_dtype: of that matrix, after the logits.

    A dtype of None stands for that of the input.
    """

    prefix = 0
    residual_dtype: torch.dtype | None = None
    logits_dtype: torch.dtype | None = None
    matrix_dtype: torch.dtype | None = torch.float32

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.layers: Sequence[Any] = model.encoder.layers  # type: ignore[union-attr, assignment]

    def embed(self, pixels: Tensor) -> Tensor:
        """[F, 3, H, W] normalised pixels to the hidden states [F, T, D] that enter layer 0."""
        return self.model.embeddings(pixels)

    def attention_input(self, layer: Any, hidden: Tensor) -> tuple[Any, Tensor]:
        """The attention module of a layer and what enters it, [F, T, D]."""
        return layer.self_attn, layer.layer_norm1(hidden)

    def received(self, layer: Any, hidden: Tensor) -> Tensor:
        """Received attention of the patch tokens in a layer that `hidden [F, T, D]` enters, [F, S] fp32, on its own."""
        module, entering = self.attention_input(layer, hidden)
        query, key = (_heads(module, projection(entering)) for projection in (module.q_proj, module.k_proj))
        return self._received(query, key, module.head_dim**-0.5)

    def run_layer(self, layer: Any, hidden: Tensor, *, receive: bool = False) -> tuple[Tensor, Tensor | None]:
        """One encoder layer on `hidden [F, T, D]`.

        Returns the new hidden states [F, T, D] and, when `receive` is set, the received attention of the patch tokens
        [F, S] in fp32 (else None).
        """
        attended, received = self.attention(*self.attention_input(layer, hidden), receive)
        hidden = _add(hidden, layer.self_attn.out_proj(attended))
        return _add(hidden, layer.mlp(layer.layer_norm2(hidden))), received

    def attention(self, module: Any, hidden: Tensor, receive: bool) -> tuple[Tensor, Tensor | None]:
        """Self-attention up to, not including, the output projection: [F, T, D] to [F, T, D].

        `scaled_dot_product_attention` unless received attention is asked for. Then, on a CPU and in the exported graph,
        the attention matrix is formed, once; on a GPU the output is that of the fused kernel all the same and received
        attention has a kernel of its own, so that the matrix never goes through memory.
        """
        scale = module.head_dim**-0.5
        projections = (module.q_proj, module.k_proj, module.v_proj)
        query, key, value = (_heads(module, projection(hidden)) for projection in projections)
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

    def _received(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Received attention of the patch tokens: on a GPU by the operator, else in what every exporter knows."""
        means = ops.received_attention if query.is_cuda else lambda *given: column_means(self._matrix(*given))
        return means(query, key, scale)[:, self.prefix :]

    def _matrix(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        query, key = (x.to(self.logits_dtype or x.dtype) for x in (query, key))
        return attention_matrix(query, key, scale, self.matrix_dtype or query.dtype)


def _heads(module: Any, projected: Tensor) -> Tensor:
    """[F, T, D] to [F, H, T, D/H]."""
    return projected.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)


def _add(hidden: Tensor, branch: Tensor) -> Tensor:
    """The residual stream keeps its dtype, whichever its branches have."""
    return (hidden + branch).to(hidden.dtype)


class SiglipTower(Tower):
    """SigLIP: patches only, learned positions."""


class ClipTower(Tower):
    """CLIP: a class token in front and a layer norm before the first layer."""

    prefix = 1

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model.pre_layrnorm(self.model.embeddings(pixels))


class Siglip2Tower(Tower):
    """SigLIP2 at a fixed resolution: every frame has the same grid, so there is no padding and no mask."""

    def embed(self, pixels: Tensor) -> Tensor:
        embeddings = self.model.embeddings
        size = embeddings.patch_size
        rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
        patches = pixels.unflatten(2, (rows, size)).unflatten(4, (columns, size))  # [F, C, r, p, c, p]
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [F, S, p*p*C]
        positions = embeddings.position_embedding.weight
        if rows != columns or rows * columns != positions.shape[0]:
            side = embeddings.position_embedding_size
            positions = embeddings.resize_positional_embeddings(
                positions.reshape(side, side, -1), torch.tensor([[rows, columns]]), max_length=rows * columns
            )[0]
        return embeddings.patch_embedding(patches.to(embeddings.patch_embedding.weight.dtype)) + positions


class Dinov2Tower(Tower):
    """DINOv2: a class token in front, layer scale on both branches."""

    prefix = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = model.encoder.layer  # type: ignore[union-attr, assignment]

    def attention_input(self, layer: Any, hidden: Tensor) -> tuple[Any, Tensor]:
        return layer.attention, layer.norm1(hidden)

    def run_layer(self, layer: Any, hidden: Tensor, *, receive: bool = False) -> tuple[Tensor, Tensor | None]:
        attended, received = self.attention(*self.attention_input(layer, hidden), receive)
        hidden = _add(hidden, layer.layer_scale1(layer.attention.o_proj(attended)))
        return _add(hidden, layer.layer_scale2(layer.mlp(layer.norm2(hidden)))), received


TOWERS: dict[str, type[Tower]] = {
    "siglip_vision_model": SiglipTower,
    "siglip2_vision_model": Siglip2Tower,
    "clip_vision_model": ClipTower,
    "dinov2": Dinov2Tower,
}


def tower_of(vision_model: nn.Module) -> Tower:
    """The adapter of a Hugging Face vision model.

    Raises:
        UserError: the model's family has no adapter.
    """
    family = getattr(getattr(vision_model, "config", None), "model_type", type(vision_model).__name__)
    if family not in TOWERS:
        raise UserError(
            f"vision tower {family!r} is not supported: EarlyTom runs on {', '.join(TOWERS)} "
            "(an adapter is one class in earlytom.towers)"
        )
    return TOWERS[family](vision_model)
