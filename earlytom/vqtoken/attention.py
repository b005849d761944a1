"""VQToken's attention of the token hash over the codebook, with trained weights.

The released path to the language model does not use it. It refuses to run before weights are loaded.

Notation: T frames, S tokens a frame, K codes, D width, n = max(T, K).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from earlytom.errors import UserError

HEADS, INNER, EPS = 8, 2048, 1e-5


class VQAttention(nn.Module):
    """One post-norm transformer decoder layer.

    Args:
        tokens: S; width: D, a multiple of 8.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        if width % HEADS:
            raise UserError(f"VQ-attention has {HEADS} heads, which do not divide a width of {width}")
        self.to_q_proj = nn.Linear(tokens, width)
        layer = nn.TransformerDecoderLayer(width, HEADS, INNER, dropout=0.1, activation="relu", layer_norm_eps=EPS)
        self.transformer_decoder = nn.TransformerDecoder(layer, 1)
        self.trained = False
        self.register_load_state_dict_post_hook(_loaded)
        self.eval()

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> VQAttention:
        """The module with a checkpoint's weights, by PyTorch's names."""
        query = weights.get("to_q_proj.weight")
        if query is None or query.dim() != 2:
            raise UserError("these are no weights of VQ-attention: to_q_proj.weight [D, S] is missing")
        module = cls(query.shape[1], query.shape[0])
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"these are no weights of VQ-attention: {' '.join(str(error).split())}") from error
        return module

    def forward(self, labels: Tensor, codes: Tensor) -> Tensor:
        """`labels [T, S]`, the token hash, and `codes [K, D]` to [n, D]. Both are tiled to n rows, so the first n mod K
        codes count once more."""
        if not self.trained:
            raise UserError("VQ-attention is trained and has no weights yet: make it with VQAttention.from_weights")
        rows = torch.arange(max(len(labels), len(codes)), device=codes.device)
        query = self.to_q_proj(labels[rows % len(labels)].to(codes.dtype))
        return self.transformer_decoder(query, codes[rows % len(codes)])


def _loaded(module: Any, incompatible: Any) -> None:
    """The hook after `load_state_dict`: a missing weight leaves the module untrained."""
    module.trained = not incompatible.missing_keys
