"""Calibration of int8: from real frames to the scales of every product, its smoothing, and what stays wider.

The tower runs once, in fp32, layer by layer on all frames; no frames are merged, so that every product sees whole
frames. For each product the strength of its smoothing and the magnitude at which what enters is cut off are those that
change its result least, among a few (`STRENGTHS`, `PERCENTILES`), on a sample of rows. What is large is rare, and a
sample has less of it than other clips have: so something is cut off only where that is better by `DOUBT`. Then each
product alone is run in int8, on frames of all clips, and what that changes behind its layer is its noise.

`auto` keeps products wider until the features of the whole, everything else in int8, are within `MOST_ERROR` of what
they were: those with the most noise for the arithmetic that they cost, as few as do (by halving).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from builder.precision.int8 import LIMIT, Int8Linear
from builder.precision.products import LAYERED, Product, words
from builder.precision.smoothing import LinearPlace, fold, folds, places
from earlytom.encoder import embed
from earlytom.families import Vision

STRENGTHS = (0.0, 0.35, 0.5, 0.65, 0.8, 0.9)
PERCENTILES = (99.9, 99.99, 100.0)  # of magnitudes
MOST_ERROR = 0.05  # of features, root mean square against theirs
DOUBT = 2.0  # times less error: from there on cutting off is better on other clips, too
MOST_ROWS = 2**16  # patches that are calibrated on, at most: 89 frames of 729
_AT_ONCE = 8  # frames, which bounds the memory
_FEW = 8  # frames that noise and error are measured on
_ROWS = 256  # of a product's sample
_LEAST = 1e-6  # of a channel's largest magnitude, as a share of the largest


@dataclass(frozen=True)
class Site:
    """What int8 needs to know of a product.

    Attributes:
        limit: largest magnitude of what enters, smoothed, that is not cut off.
        smooth: fp32 [K], what each channel that enters is divided by; None for nothing.
        noise: mean square of what int8 in this product alone changes behind its layer, over the variance there.
    """

    limit: float
    smooth: Tensor | None
    noise: float = 0.0


@dataclass(frozen=True)
class Int8Plan:
    """Which products are int8, and how.

    Attributes:
        sites: of every product that could be, in the order in which they run.
        kept: which of them stay wider.
        error: root mean square of what int8 changes in the features, over theirs.
        clips: the names of those that it was measured on.
    """

    sites: dict[Product, Site]
    kept: frozenset[Product] = frozenset()
    error: float = 0.0
    clips: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: what stays wider, every product with its figures, and the clips."""
        rows = {
            str(product): {"limit": site.limit, "smoothed": site.smooth is not None, "noise": site.noise}
            for product, site in self.sites.items()
        }
        return {"kept": list(words(self.kept)), "error": self.error, "products": rows, "clips": list(self.clips)}

    @property
    def chosen(self) -> tuple[Product, ...]:
        """The products that are int8."""
        return tuple(product for product in self.sites if product not in self.kept)


def put_in(
    layers: Sequence[Any], projector: nn.Module, plan: Int8Plan, dtype: torch.dtype, *, unsigned: bool = False
) -> None:
    """Put int8 into a vision part in fp32, in place; `dtype` is that of the graph around the products.

    `layers`: of its tower. `unsigned`: as `Int8Linear` has it.
    """
    for product in plan.chosen:
        smooth = plan.sites[product].smooth
        if smooth is not None and folds(product):
            fold(layers, projector, product, smooth)
    for product in plan.chosen:  # now: folding one product's changes another's weights
        for place, module in zip(
            places(layers, projector, product),
            narrow(layers, projector, product, plan.sites[product], dtype, unsigned=unsigned),
            strict=True,
        ):
            setattr(place.parent, place.name, module)


def narrow(
    layers: Sequence[Any],
    projector: nn.Module,
    product: Product,
    site: Site,
    dtype: torch.dtype,
    *,
    unsigned: bool = False,
) -> list[Int8Linear]:
    """The product's linear layers in int8, after what can be folded is."""
    smooth = None if folds(product) else site.smooth
    linears = [place.linear for place in places(layers, projector, product)]
    return [
        Int8Linear(
            one.weight.data, None if one.bias is None else one.bias.data, site.limit, dtype, smooth, unsigned=unsigned
        )
        for one in linears
    ]


class Calibration:
    """The run, and what it found.

    Args:
        vision, projector: in fp32; smoothed in place, which leaves their function.
        pixels: normalised frames [n, 3, H, W].
        depth: layers that run.
        products: in the order in which they run (`builder.precision.products.every`).
    """

    @torch.no_grad()
    def __init__(
        self, vision: Vision, projector: nn.Module, pixels: Tensor, depth: int, products: Sequence[Product]
    ) -> None:
        self.vision, self.projector, self.depth = vision, projector, depth
        self.layers = list(vision.tower.layers)
        self.products = products
        self.few = embed(vision.tower, few_of(pixels))
        self.sites: dict[Product, Site] = {}
        self.modules: dict[Product, list[Int8Linear]] = {}
        hidden = embed(vision.tower, pixels)
        for index in range(depth):
            hidden = self._layer(index, hidden)
        self._project(hidden[:, vision.tower.prefix :])
        self.exact = self._features(())

    def plan(self, kept: Collection[Product] = ()) -> Int8Plan:
        """With `kept` wider."""
        return Int8Plan(self.sites, frozenset(kept), self.error(kept))

    def search(self, most: float = MOST_ERROR) -> Int8Plan:
        """With as few products wider as the features need to be within `most`, if all of them are enough."""
        order = sorted(self.products, key=lambda p: self.sites[p].noise / _cost(self.modules[p]), reverse=True)
        few, many = -1, len(order)  # too few, enough
        if (error := self.error(())) <= most:
            return Int8Plan(self.sites, frozenset(), error)
        few = 0
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if self.error(order[:middle]) <= most else (middle, many)
        return self.plan(order[:many])

    @torch.no_grad()
    def error(self, kept: Collection[Product]) -> float:
        """Root mean square of what int8 in all products but `kept` changes in the features, over theirs."""
        changed = self._features([product for product in self.products if product not in kept])
        return float(((changed - self.exact).square().mean() / self.exact.square().mean()).sqrt())

    def _features(self, products: Collection[Product]) -> Tensor:
        hidden = self.few
        with self._replaced(products):
            for layer in self.layers[: self.depth]:
                hidden, _ = self.vision.tower.run_layer(layer, hidden)
            return self.vision.features(hidden[:, self.vision.tower.prefix :], None).features

    @contextmanager
    def _replaced(self, products: Collection[Product]) -> Iterator[None]:
        """The products in int8, as long as it lasts."""
        found = [place for product in products for place in self._places(product)]
        wide = [place.linear for place in found]
        try:
            narrow = [module for product in products for module in self.modules[product]]
            for place, module in zip(found, narrow, strict=True):
                setattr(place.parent, place.name, module)
            yield
        finally:
            for place, linear in zip(found, wide, strict=True):
                setattr(place.parent, place.name, linear)

    def _places(self, product: Product) -> list[LinearPlace]:
        return places(self.layers, self.projector, product)

    def _layer(self, index: int, hidden: Tensor) -> Tensor:
        """Settle the products of a layer that `hidden` enters; returns what leaves it."""
        layer, tower = self.layers[index], self.vision.tower
        ours = [product for product in self.products if product.layer == index]
        # Attention's output first: its smoothing changes the values' projection.
        ours.sort(key=lambda product: product.name != "out")
        with self._watched(ours) as seen:
            after = torch.cat([tower.run_layer(layer, part)[0] for part in hidden.split(_AT_ONCE)])
        self._settle(ours, seen)
        few = few_of(hidden)
        self._measure(ours, lambda: tower.run_layer(layer, few)[0])
        return after

    def _project(self, hidden: Tensor) -> None:
        """Settle the products of the projector, which `hidden` without its prefix enters."""
        ours = [product for product in self.products if product.name not in LAYERED]
        with self._watched(ours) as seen:
            for part in hidden.split(_AT_ONCE):
                self.vision.features(part, None)
        self._settle(ours, seen)
        few = few_of(hidden)
        self._measure(ours, lambda: self.vision.features(few, None).features)

    @contextmanager
    def _watched(self, products: Sequence[Product]) -> Iterator[dict[Product, Entered]]:
        """What enters each product, as long as it lasts."""
        seen = {product: Entered() for product in products}
        hooks = [
            self._places(product)[0].linear.register_forward_pre_hook(lambda _, given, to=found: to.add(given[0]))
            for product, found in seen.items()
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _settle(self, products: Sequence[Product], seen: dict[Product, Entered]) -> None:
        for product in products:
            site = settle(seen[product], [place.linear.weight.data for place in self._places(product)])
            self.sites[product] = site
            if site.smooth is not None and folds(product):
                fold(self.layers, self.projector, product, site.smooth)
        for product in products:
            site = self.sites[product]
            self.modules[product] = narrow(self.layers, self.projector, product, site, torch.float32)

    def _measure(self, products: Sequence[Product], run: Callable[[], Tensor]) -> None:
        """The noise of each product, by what `run` returns."""
        exact = run()
        variance = exact.var()
        for product in products:
            with self._replaced([product]):
                noise = float((run() - exact).square().mean() / variance)
            self.sites[product] = replace(self.sites[product], noise=noise)


def few_of(frames: Tensor) -> Tensor:
    """`_FEW` frames at most, evenly of all: those of one clip do not have what others have."""
    return frames[:: -(-len(frames) // _FEW)]


class Entered:
    """What entered a product: the largest magnitude of every channel [K], and a sample of rows [R, K]."""

    def __init__(self) -> None:
        self.largest: Tensor | None = None
        self.samples: list[Tensor] = []

    def add(self, entering: Tensor) -> None:
        rows = entering.flatten(0, -2)
        largest = rows.abs().amax(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.samples.append(rows[:: -(-len(rows) // _ROWS)].clone())

    @property
    def rows(self) -> Tensor:
        """Evenly of all frames."""
        every = torch.cat(self.samples)
        return every[:: -(-len(every) // _ROWS)]


def settle(seen: Entered, weights: Sequence[Tensor]) -> Site:
    """The smoothing and the limit that change a product least.

    Args:
        seen: what entered it.
        weights: of its linear layers, [N, K] each.
    """
    rows, largest = seen.rows, seen.largest
    assert largest is not None
    wanted = [rows @ weight.T for weight in weights]
    best, least = Site(float(largest.max()), None), math.inf
    for strength in STRENGTHS:
        smooth = smoothing(largest, weights, strength)
        entering = rows / smooth
        columns = [
            _rounded(weight * smooth, (weight * smooth).abs().amax(1, keepdim=True) / LIMIT) for weight in weights
        ]
        whole_range = float((largest / smooth).max())
        for limit in dict.fromkeys(limits(entering, whole_range)):
            whole = _rounded(entering, torch.tensor(limit / LIMIT))
            error = sum(
                float((whole @ column.T - right).square().sum() / right.square().sum())
                for column, right in zip(columns, wanted, strict=True)
            )
            error *= 1 if limit >= whole_range else DOUBT
            if error < least:
                best, least = Site(limit, None if strength == 0 else smooth), error
    return best


def smoothing(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """What each channel is divided by, [K], of geometric mean 1: with strength 1 all channels become equally loud, with
    0 they stay as they are."""
    if strength == 0:
        return torch.ones_like(largest)
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    loud, heavy = (values.clamp(min=_LEAST * float(values.max())) for values in (largest, columns))
    smooth = loud**strength / heavy ** (1 - strength)
    return smooth / smooth.log().mean().exp()


def limits(entering: Tensor, largest: float) -> list[float]:
    """Where magnitudes may be cut off: `PERCENTILES` of the sample's, 100 standing for the largest of all."""
    magnitudes = entering.abs().flatten()
    found = []
    for percentile in PERCENTILES:
        place = max(1, math.ceil(len(magnitudes) * percentile / 100))
        found.append(largest if percentile == 100 else float(magnitudes.kthvalue(place).values))
    return [limit for limit in found if limit > 0] or [1.0]  # nothing entered but zeros


def _rounded(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).round().clamp(-LIMIT, LIMIT) * scale


def _cost(modules: Sequence[Int8Linear]) -> int:
    return sum(module.weight.numel() for module in modules)
