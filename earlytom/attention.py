"""Explicit attention, and the attention that every token receives.

Only the layer whose received attention a method uses needs the explicit matrix (see `earlytom.towers`).

Notation: F frames, H heads, T tokens a frame, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_matrix(query: Tensor, key: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """`query, key [F, H, T, d]` to softmax(scale q k^T) in `dtype`, [F, H, T, T].

    The query is scaled before the product, so that half precision overflows later.
    """
    logits = (query * scale) @ key.transpose(2, 3)
    # Not softmax(dtype=...): the ONNX exporter turns that into a half-precision softmax and a cast.
    return torch.softmax(logits.to(dtype), dim=-1)


def column_means(attention: Tensor) -> Tensor:
    """`attention [F, H, T, T]` to received attention, the mean over heads and queries, [F, T] fp32."""
    return attention.mean(2).mean(1).float()
