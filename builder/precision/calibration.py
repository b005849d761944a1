"""int8 calibration: from real frames to each product's quantisation scale and smoothing, and the products kept wider.

A product is a matrix product that may be int8. The tower runs once, in fp32, layer by layer on all frames, without
merging. For each product, smoothing strength and clipping limit of its input are those that change its output least on
a sample of rows, among `STRENGTHS` and `PERCENTILES`. Outliers are rare, and other clips may have more of them than the
sample: clipping is chosen only if its error is smaller by the factor `DOUBT`. Then each product alone is run in int8 on
frames of all clips; the change of its layer's output is the product's noise.

"auto" keeps products wider, those with the most noise per weight first, and as few as are needed (by bisection) for the
features, with all other products in int8, to be within `MOST_ERROR` of their fp32 values.
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
MOST_ERROR = 0.05  # root mean square error of the features, relative to their root mean square
DOUBT = 2.0  # clipping must reduce the error by this factor, so that it is better on other clips, too
MOST_ROWS = 2**16  # most patches to calibrate on: 89 frames of 729
_AT_ONCE = 8  # frames per run of a layer, which bounds memory
_FEW = 8  # frames to measure noise and error on
_ROWS = 256  # rows of a product's sample
_LEAST = 1e-6  # floor of a channel's largest magnitude, relative to the largest channel's


@dataclass(frozen=True)
class Site:
    """One product's calibration.

    Attributes:
        limit: magnitude at which the smoothed input is clipped.
        smooth: fp32 [K], divisor of each input channel; None for no smoothing.
        noise: mean square error of the layer's output with only this product in int8, over the output's variance.
    """

    limit: float
    smooth: Tensor | None
    noise: float = 0.0


@dataclass(frozen=True)
class Int8Plan:
    """Which products are int8, and their calibration.

    Attributes:
        sites: calibration of every product that may be int8, in the order in which they run.
        kept: the products that stay wider.
        error: root mean square error of the features, relative to their root mean square.
        clips: names of the calibration clips.
    """

    sites: dict[Product, Site]
    kept: frozenset[Product] = frozenset()
    error: float = 0.0
    clips: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the products kept wider, every product's figures, and the clips."""
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
    """Replace the chosen products of an fp32 vision tower and projector by int8 layers, in place.

    `layers`: the tower's; `dtype`: of the rest of the graph; `unsigned`: see `Int8Linear`.
    """
    for product in plan.chosen:
        smooth = plan.sites[product].smooth
        if smooth is not None and folds(product):
            fold(layers, projector, product, smooth)
    for product in plan.chosen:  # after all folding, which also changes weights of other products
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
    """The product's linear layers in int8; smoothing that can be folded must have been."""
    smooth = None if folds(product) else site.smooth
    linears = [place.linear for place in places(layers, projector, product)]
    return [
        Int8Linear(
            one.weight.data, None if one.bias is None else one.bias.data, site.limit, dtype, smooth, unsigned=unsigned
        )
        for one in linears
    ]


class Calibration:
    """Runs the calibration, and holds its results.

    Args:
        vision, projector: in fp32; smoothed in place, which does not change their function.
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
        """The plan that keeps the products `kept` wider."""
        return Int8Plan(self.sites, frozenset(kept), self.error(kept))

    def search(self, most: float = MOST_ERROR) -> Int8Plan:
        """The plan with the fewest products kept wider for a feature error of at most `most`; at worst with all."""
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
        """Relative root mean square error of the features with all products but `kept` in int8."""
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
        """Within the block the products are int8."""
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
        """Calibrate the products of a layer on its input `hidden`; returns its fp32 output."""
        layer, tower = self.layers[index], self.vision.tower
        ours = [product for product in self.products if product.layer == index]
        # Attention's output first: its smoothing changes the weights of the value projection.
        ours.sort(key=lambda product: product.name != "out")
        with self._watched(ours) as seen:
            after = torch.cat([tower.run_layer(layer, part)[0] for part in hidden.split(_AT_ONCE)])
        self._settle(ours, seen)
        few = few_of(hidden)
        self._measure(ours, lambda: tower.run_layer(layer, few)[0])
        return after

    def _project(self, hidden: Tensor) -> None:
        """Calibrate the products of the projector on its input `hidden` (without prefix tokens)."""
        ours = [product for product in self.products if product.name not in LAYERED]
        with self._watched(ours) as seen:
            for part in hidden.split(_AT_ONCE):
                self.vision.features(part, None)
        self._settle(ours, seen)
        few = few_of(hidden)
        self._measure(ours, lambda: self.vision.features(few, None).features)

    @contextmanager
    def _watched(self, products: Sequence[Product]) -> Iterator[dict[Product, Entered]]:
        """Within the block, record the input of each product."""
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
        """Measure the noise of each product, with `run` giving the layer's output."""
        exact = run()
        variance = exact.var()
        for product in products:
            with self._replaced([product]):
                noise = float((run() - exact).square().mean() / variance)
            self.sites[product] = replace(self.sites[product], noise=noise)


def few_of(frames: Tensor) -> Tensor:
    """At most `_FEW` frames, spread evenly over all clips, which differ."""
    return frames[:: -(-len(frames) // _FEW)]


class Entered:
    """Statistics of a product's input: the largest magnitude of every channel [K], and a sample of rows [R, K]."""

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
        """The sample, spread evenly over all frames."""
        every = torch.cat(self.samples)
        return every[:: -(-len(every) // _ROWS)]


def settle(seen: Entered, weights: Sequence[Tensor]) -> Site:
    """The smoothing and the clipping limit with the least error of a product's output.

    Args:
        seen: statistics of its input.
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
    """Divisor of each channel, [K], of geometric mean 1: strength 1 gives all channels the same largest magnitude, 0
    leaves them unchanged."""
    if strength == 0:
        return torch.ones_like(largest)
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    loud, heavy = (values.clamp(min=_LEAST * float(values.max())) for values in (largest, columns))
    smooth = loud**strength / heavy ** (1 - strength)
    return smooth / smooth.log().mean().exp()


def limits(entering: Tensor, largest: float) -> list[float]:
    """Candidate clipping limits: `PERCENTILES` of the sample's magnitudes, 100 standing for `largest`."""
    magnitudes = entering.abs().flatten()
    found = []
    for percentile in PERCENTILES:
        place = max(1, math.ceil(len(magnitudes) * percentile / 100))
        found.append(largest if percentile == 100 else float(magnitudes.kthvalue(place).values))
    return [limit for limit in found if limit > 0] or [1.0]  # an all-zero input


def _rounded(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).round().clamp(-LIMIT, LIMIT) * scale


def _cost(modules: Sequence[Int8Linear]) -> int:
    return sum(module.weight.numel() for module in modules)
