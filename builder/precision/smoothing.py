"""Where the products of a vision part are, and how outliers are moved out of what enters them and into their weights.

A product in int8 has one scale for everything that enters it, so one loud channel leaves the others no digits. Dividing
what enters by a number a channel, and multiplying the columns of the weights by it, changes nothing but that. (The idea
is SmoothQuant's, Xiao et al. 2023.) The division is folded into what comes before where that is linear: the layer norm
of queries, keys, values and of an MLP's first product, the values' projection of attention's output. Before an MLP's
second product and in the projector there is none, so the division stays in the graph, where compilers fuse it with the
activation before or the quantising behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from builder.precision.products import Product


class LinearPlace(NamedTuple):
    """A linear layer in a model: the module that has it, and its name there."""

    parent: nn.Module
    name: str

    @property
    def linear(self) -> Any:
        return getattr(self.parent, self.name)


def places(layers: Sequence[Any], projector: nn.Module, product: Product) -> list[LinearPlace]:
    """The linear layers of a product, which all take the same input."""
    if product.layer < 0:
        return [LinearPlace(projector, {"projector-in": "linear_1", "projector-out": "linear_2"}[product.name])]
    layer = layers[product.layer]
    if product.name == "qkv":
        return [LinearPlace(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    if product.name == "out":
        return [LinearPlace(layer.self_attn, "out_proj")]
    return [LinearPlace(layer.mlp, product.name)]


def folds(product: Product) -> bool:
    """Whether what comes before the product can do the division."""
    return product.name in ("qkv", "out", "fc1")


def fold(layers: Sequence[Any], projector: nn.Module, product: Product, smooth: Tensor) -> None:
    """Divide what enters a product that `folds` by `smooth` [K] and multiply its weights by it, in place; the function
    stays."""
    for place in places(layers, projector, product):
        place.linear.weight.data = place.linear.weight.data * smooth
    layer = layers[product.layer]
    before = {"qkv": "layer_norm1", "fc1": "layer_norm2"}
    source = layer.self_attn.v_proj if product.name == "out" else getattr(layer, before[product.name])
    rows = smooth[:, None] if source.weight.dim() == 2 else smooth
    source.weight.data = source.weight.data / rows
    if source.bias is not None:
        source.bias.data = source.bias.data / smooth
