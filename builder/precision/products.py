"""Products: the matrix products that may be int8, chosen by name, and the cost of keeping each wider.

    --int8-keep fc2:0-3,projector-out

A word is a product, or one of the layered products with a layer or a range of layers, in the words of
`builder.precision.islands`. `none` keeps nothing, `auto` what `builder.precision.calibration` finds too sensitive. A
product inside an fp32 island stays fp32. Attention's own two products, similarities, merging, the decisions and the
patches are never int8.

Notation: D width, I width inside the MLP.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from builder.precision.islands import Costs, Islands
from builder.precision.words import layers_in, runs_of
from earlytom.errors import UserError

OPTION = "--int8-keep"
AUTO, NONE, LIST = "auto", "none", "list"
PRODUCTS = {
    "qkv": "queries, keys and values",
    "out": "output of attention",
    "fc1": "first product of the MLPs",
    "fc2": "second product of the MLPs",
    "projector-in": "first product of the projector",
    "projector-out": "second product of the projector",
}
LAYERED = ("qkv", "out", "fc1", "fc2")
_ISLAND_OF = {"qkv": "attention", "out": "attention", "fc1": "mlp", "fc2": "mlp"}


@dataclass(frozen=True, order=True)
class Product:
    """One product: its name and its layer; -1 outside the tower."""

    name: str
    layer: int = -1

    def __str__(self) -> str:
        return self.name if self.layer < 0 else f"{self.name}:{self.layer}"


def check(text: str) -> None:
    """Raise UserError for a word that names no product, whatever the tower."""
    words = [word.strip().lower() for word in text.split(",")]
    for word in words:
        name, colon, _ = word.partition(":")
        if colon and name not in LAYERED:
            raise UserError(f"{OPTION} {word!r}: only {', '.join(LAYERED)} are chosen by layer, as in fc2:0-3")
        if word in (AUTO, NONE, LIST) and len(words) == 1:
            continue
        if name not in PRODUCTS:
            raise UserError(
                f"{OPTION} {text!r}: {word!r} is no product; choose among {', '.join(PRODUCTS)}, or give {AUTO}, "
                f"{NONE} or {LIST} alone ({OPTION} {LIST} shows what each costs)"
            )


def parse(text: str, depth: int) -> frozenset[Product]:
    """The products that `text` keeps wider than int8, for a tower of which `depth` layers run; not for `auto`."""
    check(text)
    found: set[Product] = set()
    for word in (word.strip().lower() for word in text.split(",")):
        name, colon, where = word.partition(":")
        if name in LAYERED:
            layers = layers_in(where, word, depth, OPTION) if colon else range(depth)
            found |= {Product(name, layer) for layer in layers}
        elif name in PRODUCTS:
            found.add(Product(name))
    return frozenset(found)


def choice(text: str | None, depth: int) -> tuple[str, ...]:
    """The normalised words of `text`, equal for equal choices; ("auto",) where the calibration decides."""
    return (AUTO,) if text in (None, AUTO, LIST) else words(parse(str(text), depth))


def words(products: Collection[Product]) -> tuple[str, ...]:
    """Products as words for `parse`; equal choices have equal words."""
    found: list[str] = []
    for name in PRODUCTS:
        layers = [product.layer for product in products if product.name == name]
        found += runs_of(name, layers) if name in LAYERED else [name] * len(layers)
    return tuple(found)


def every(depth: int, islands: Islands) -> tuple[Product, ...]:
    """The products that may be int8: all but those inside an fp32 island, in the order in which they run."""
    layered = [Product(name, layer) for layer in range(depth) for name in LAYERED]
    inside = [p for p in layered if p.layer not in getattr(islands, _ISLAND_OF[p.name])]
    outside = [Product(name) for name in PRODUCTS if name not in LAYERED and "projector" not in islands]
    return (*inside, *outside)


def nearest(in_layer: bool) -> tuple[str, ...]:
    """The names of the products in a layer, or of those after the last."""
    return tuple(name for name in PRODUCTS if (name in LAYERED) == in_layer)


def flops_of(costs: Costs, product: Product) -> int:
    """Flops of the product, 2 per multiply-add."""
    frames = costs.stages[-1] if product.layer < 0 else costs.frames[product.layer]
    return 2 * frames * costs.tokens * elements_of(costs, product)


def elements_of(costs: Costs, product: Product) -> int:
    """Weights of the product, biases left out."""
    sizes = {
        "qkv": 3 * costs.width**2,
        "out": costs.width**2,
        "fc1": costs.width * costs.inner,
        "fc2": costs.inner * costs.width,
        "projector-in": costs.width * costs.llm,
        "projector-out": costs.llm**2,
    }
    return int(sizes[product.name])


def share(costs: Costs, products: Iterable[Product]) -> float:
    """Share of the flops of all matrix products."""
    return sum(flops_of(costs, product) for product in products) / costs.products


def part_shares(
    costs: Costs, products: Iterable[Product], parts: Sequence[int], ends: Sequence[int]
) -> tuple[float, ...]:
    """`share` of every part of an engine in stages.

    Args:
        parts: flops of all matrix products of each part.
        ends: the layer with which each part but the last ends.
    """
    counts = [0] * len(parts)
    for product in products:
        part = len(parts) - 1 if product.layer < 0 else sum(product.layer > end for end in ends)
        counts[part] += flops_of(costs, product)
    return tuple(count / whole for count, whole in zip(counts, parts, strict=True))
