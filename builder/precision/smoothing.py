"""Locates the products in a vision tower and projector, and smooths them: moves outliers from inputs to weights.

An int8 product has one scale for its whole input, so one outlier channel costs the others their precision. Dividing
each input channel by a number and multiplying its weights by the same number leaves the product unchanged (SmoothQuant,
Xiao et al. 2023). The division is folded into the preceding module where that is linear: the layer norm before queries,
keys and values and before an MLP's first product; the value projection before attention's output projection. An MLP's
second product and the projector have none, so the division stays in the graph, where compilers fuse it with the
activation before it or the quantisation after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from builder.precision.products import Product


class LinearPlace(NamedTuple):
    """A linear layer's place in a model: its parent module, and its name there."""

    parent: nn.Module
    name: str

    @property
    def linear(self) -> Any:
        return getattr(self.parent, self.name)


def places(layers: Sequence[Any], projector: nn.Module, product: Product) -> list[LinearPlace]:
    """The linear layers of a product, all with the same input."""
    if product.layer < 0:
        return [LinearPlace(projector, {"projector-in": "linear_1", "projector-out": "linear_2"}[product.name])]
    layer = layers[product.layer]
    if product.name == "qkv":
        return [LinearPlace(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    if product.name == "out":
        return [LinearPlace(layer.self_attn, "out_proj")]
    return [LinearPlace(layer.mlp, product.name)]


def folds(product: Product) -> bool:
    """Whether the product's smoothing can be folded into the module before it."""
    return product.name in ("qkv", "out", "fc1")


def fold(layers: Sequence[Any], projector: nn.Module, product: Product, smooth: Tensor) -> None:
    """Fold `smooth` [K] into the module before a product that `folds` and into the product's weights, in place; the
    function stays the same."""
    for place in places(layers, projector, product):
        place.linear.weight.data = place.linear.weight.data * smooth
    layer = layers[product.layer]
    before = {"qkv": "layer_norm1", "fc1": "layer_norm2"}
    source = layer.self_attn.v_proj if product.name == "out" else getattr(layer, before[product.name])
    rows = smooth[:, None] if source.weight.dim() == 2 else smooth
    source.weight.data = source.weight.data / rows
    if source.bias is not None:
        source.bias.data = source.bias.data / smooth
