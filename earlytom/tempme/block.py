"""TempMe's block: a transformer layer that joins clips and merges tokens across them, and merges again after attention.

Tokens carry sizes: the number of original tokens in each. A key of size s counts as s keys (proportional attention),
and means are weighted by size.

Notation: B entries (clips of all videos), n tokens, c of them protected, D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from earlytom.bipartite import Matching, match
from earlytom.tempme.schedule import LayerMerge


@dataclass(frozen=True)
class BlockForm:
    """The parameters in which encoders differ.

    Attributes:
        heads: H.
        eps: of the layer norms.
        activation: of the feed-forward.
        proportional: whether attention is proportional to size.
        faithful: a clip that merges nothing before attention gets no temporal embedding.
    """

    heads: int
    eps: float
    activation: Callable[[Tensor], Tensor]
    proportional: bool = True
    faithful: bool = False


Note = Callable[[str, Matching], None]
"""A callback for each decision: "cross" or "intra", and the matching."""


def join(values: Tensor, group: int, protected: int) -> Tensor:
    """Join each `group` neighbouring entries, [B, n, D] to [B / group, n * group, D]: all protected tokens first, then
    the others."""
    values = values.unflatten(0, (-1, group))
    return torch.cat([values[:, :, :protected].flatten(1, 2), values[:, :, protected:].flatten(1, 2)], 1)


def block(
    hidden: Tensor,
    size: Tensor,
    weights: Mapping[str, Tensor],
    form: BlockForm,
    merge: LayerMerge,
    *,
    protected: int = 0,
    temporal: Tensor | None = None,
    note: Note = lambda *_: None,
) -> tuple[Tensor, Tensor]:
    """One layer.

    Args:
        hidden: [B, n, D]; size: [B, n] fp32.
        weights: of the layer: qkv_w [3D, D], qkv_b, lora_a [R, D] and lora_b [3D, R] (both or neither), out_w, out_b,
            ln1_w, ln1_b, ln2_w, ln2_b, fc_w, fc_b, pr_w, pr_b.
        merge: the layer's part of the schedule.
        protected: c of each entry.
        temporal: [B, D], added to all tokens of an entry before clips are joined and merged.

    Returns:
        hidden and size after merging.
    """
    if merge.group > 1:
        hidden, size = across(hidden, size, merge, protected, temporal, form.faithful, note)
    normal = functional.layer_norm(hidden, hidden.shape[-1:], weights["ln1_w"], weights["ln1_b"], form.eps)
    attended, key = attention(normal, size, weights, form)
    hidden = hidden + attended
    if merge.within > 0:
        found = match(key, merge.within, protected=merge.protected)
        note("intra", found)
        hidden, size = found.merge(hidden, size)
    normal = functional.layer_norm(hidden, hidden.shape[-1:], weights["ln2_w"], weights["ln2_b"], form.eps)
    inner = form.activation(functional.linear(normal, weights["fc_w"], weights["fc_b"]))
    return hidden + functional.linear(inner, weights["pr_w"], weights["pr_b"]), size


def across(
    hidden: Tensor,
    size: Tensor,
    merge: LayerMerge,
    protected: int,
    temporal: Tensor | None,
    faithful: bool,
    note: Note = lambda *_: None,
) -> tuple[Tensor, Tensor]:
    """Join neighbouring clips and merge across them, by hidden states; arguments as in `block`."""
    placed = hidden
    if temporal is not None and (merge.across > 0 or not faithful):
        placed = hidden + temporal[:, None]
    joined, placed = join(hidden, merge.group, protected), join(placed, merge.group, protected)
    size = join(size[..., None], merge.group, protected)[..., 0]
    if merge.across <= 0:
        return placed, size
    found = match(joined, merge.across, protected=merge.protected)  # decided without the temporal embedding
    note("cross", found)
    return found.merge(placed, size)


def attention(normal: Tensor, size: Tensor, weights: Mapping[str, Tensor], form: BlockForm) -> tuple[Tensor, Tensor]:
    """Self-attention of `normal [B, n, D]`: its output [B, n, D] and the keys' mean over heads [B, n, K]."""
    projected = functional.linear(normal, weights["qkv_w"], weights["qkv_b"])
    if "lora_a" in weights:
        projected = projected + functional.linear(functional.linear(normal, weights["lora_a"]), weights["lora_b"])
    query, key, value = projected.unflatten(-1, (3, form.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, n, K] each
    bias = size.log()[:, None, None].to(query.dtype) if form.proportional else None
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return functional.linear(out.transpose(1, 2).flatten(2), weights["out_w"], weights["out_b"]), key.mean(1)
