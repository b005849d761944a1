"""Islands: what stays fp32 in a graph of half precision, chosen by name, and what each costs.

    --islands default,residual,mlp:20-25        (also spelt --fp16-islands; the same words for fp16 and bf16)

A word is an island, or one of the layered islands with a layer or a range of layers. `default` stands for the four
islands of every half graph by default, `all` for everything, `none` for nothing. Independent of the choice, weights are
read in fp32 and rounded once, the frame plan and the token selection ([F, F] and [F, P] numbers) are fp32, and logits
and softmax of fused attention are internal to the kernel.

A cost is what an island adds to a graph without islands: flops in fp32, extra bytes of weights, and extra bytes of
results, each result counted once (a compiler that fuses writes fewer). Counts are exact and follow from shapes. A
matrix product has 2 flops per multiply-add; per element a layer norm has 7, an RMS norm 4, softmax with received
attention 6, GELU 9, a gate 6 (SiLU 5, and the product), normalising a pixel 2, adding 1. Not in these counts: fp32
attention has no fused kernel in tensorrt-rtx 1.7, so that its matrix of [F, H, T, T] goes through memory.

Notation: F frames, T tokens a frame, D width, I width inside the MLP, H heads, E LLM width, P tokens after pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from builder.precision.words import layers_in, runs_of
from earlytom import flops
from earlytom.errors import UserError
from earlytom.spans import layer_spans

if TYPE_CHECKING:
    from builder.settings.config import BuildConfig
    from runtime.trace import Trace

OPTION = "--islands"
LIST = "list"
ISLANDS = {
    "pixels": "normalising the pixels",
    "norms": "statistics, scale and shift of the norms",
    "softmax": "the explicit attention matrix, received attention",
    "similarity": "the products that compare frames",
    "logits": "query times key of the explicit attention",
    "gelu": "activations of the MLPs and of the projector",
    "residual": "hidden states between the branches, their merging",
    "embeddings": "patches and positions",
    "projector": "the projector and the pooling",
    "attention": "attention with its projections; attention:20-25 for some layers",
    "mlp": "the MLPs; mlp:20-25 for some layers",
}
LAYERED = ("attention", "mlp")
_DEFAULT = ("pixels", "norms", "softmax", "similarity")
_NORM, _RMS, _SOFTMAX, _GELU, _GATE, _PIXEL = 7, 4, 6, 9, 6, 2  # flops per element
_EXTRA = 2  # additional bytes of an fp32 element over a half one


@dataclass(frozen=True)
class Islands:
    """A choice of islands.

    Attributes:
        names: the chosen islands that are not layered.
        attention, mlp: the layers in which that branch is fp32.
    """

    names: frozenset[str] = frozenset(_DEFAULT)
    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @property
    def words(self) -> tuple[str, ...]:
        """The choice as words for `parse`; equal choices have equal words."""
        plain = [name for name in ISLANDS if name in self.names]
        return (*plain, *runs_of("attention", self.attention), *runs_of("mlp", self.mlp))


DEFAULT = Islands()


def check(text: str) -> None:
    """Raise UserError for a word that names no island, whatever the tower."""
    for word in (word.strip().lower() for word in text.split(",")):
        name, colon, _ = word.partition(":")
        if colon and name not in LAYERED:
            raise UserError(f"{OPTION} {word!r}: only {' and '.join(LAYERED)} are chosen by layer, as in mlp:20-25")
        if name not in (*ISLANDS, "default", "all", "none"):
            known = ", ".join(ISLANDS)
            raise UserError(
                f"{OPTION} {text!r}: {word!r} is no island; choose among {known}, or default, all, none "
                f"({OPTION} {LIST} shows what each costs)"
            )


def parse(text: str, depth: int) -> Islands:
    """Parse the option's `text`, for a tower of which `depth` layers run."""
    check(text)
    names: set[str] = set()
    layers: dict[str, set[int]] = {name: set() for name in LAYERED}
    for word in (word.strip().lower() for word in text.split(",")):
        name, colon, where = word.partition(":")
        if colon:
            layers[name] |= set(layers_in(where, word, depth, OPTION))
        elif name in LAYERED:
            layers[name] |= set(range(depth))
        elif name in ISLANDS:
            names.add(name)
        elif name == "default":
            names |= DEFAULT.names
        elif name == "all":
            names |= ISLANDS.keys() - set(LAYERED)
            layers = {name: set(range(depth)) for name in LAYERED}
    return Islands(frozenset(names), *(frozenset(layers[name]) for name in LAYERED))


@dataclass(frozen=True)
class Cost:
    """The cost of an island over a graph without islands.

    Attributes:
        products: flops of its matrix products, fp32 instead of half.
        elementwise: its other flops.
        weight_bytes, activation_bytes: additional bytes of weights and results.
    """

    products: int = 0
    elementwise: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    @property
    def flops(self) -> int:
        return self.products + self.elementwise

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.products + other.products,
            self.elementwise + other.elementwise,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
        )


class Costs:
    """The costs of all islands of a build; `stages`: frames of each stage, if not those of the build."""

    def __init__(self, config: BuildConfig, stages: Sequence[int] | None = None) -> None:
        from earlytom.families import family_of
        from earlytom.methods import method_of

        family, layers = family_of(config.model), config.earlytom.merge_layers
        frame = config.geometry
        self.width, self.inner, self.llm = frame.width, frame.inner, frame.llm_width
        self.heads, self.patch, self.step = frame.heads, frame.patch, frame.step
        self.pairs, self.gated, self.rms = frame.pairs, frame.gated, frame.rms
        self.size, self.patches, self.tokens = frame.size, frame.patches, frame.patches + frame.prefix
        self.pooled, self.stages, self.depth = config.tokens_per_frame, stages or config.stages, config.depth
        self.spans = layer_spans(layers, self.depth)
        self.frames = [self.stages[sum(merge < layer for merge in layers)] for layer in range(self.depth)]
        self.deciding = method_of(config.earlytom).watched(self.depth)
        self.kept = config.tokens if stages is None else config.tokens_of(self.stages[-1])
        self.projector_flops = family.projector_flops(config.model, self.stages[-1])
        self.projector_rows = frame.projector_rows
        self.projector_weights = family.projector_weights(config.model)

    def of(self, name: str) -> Cost:
        """The cost of one island; for a layered one that in all layers."""
        if name in LAYERED:
            return sum((getattr(self, f"_{name}")(layer) for layer in range(self.depth)), Cost())
        cost: Cost = getattr(self, f"_{name}")()
        return cost

    def total(self, islands: Islands) -> Cost:
        """The cost of a choice; matrix products that two islands share count once."""
        total = sum((self.of(name) for name in islands.names), Cost())
        for name in LAYERED:
            total += sum((getattr(self, f"_{name}")(layer) for layer in getattr(islands, name)), Cost())
        if "logits" in islands and self.deciding is not None and self.deciding in islands.attention:
            total += Cost(products=-self._logits().products)
        return total

    def half_share(self, islands: Islands) -> float:
        """Share of the flops of all matrix products whose operands stay half."""
        return 1 - (self.total(islands).products + self.standing) / self.products

    def stage_shares(self, islands: Islands) -> tuple[float, ...]:
        """`half_share` of every stage of a chain."""
        return tuple(1 - wide / products for products, wide in self.stage_products(islands))

    def stage_products(self, islands: Islands) -> list[tuple[int, int]]:
        """(all, fp32) flops of the matrix products of every stage of a chain."""
        return [self._stage_products(stage, islands) for stage in range(len(self.spans))]

    def _stage_products(self, stage: int, islands: Islands) -> tuple[int, int]:
        span, frames, size = self.spans[stage], self.stages[stage], self.tokens * self.width
        products, wide = self._layers(span, islands)
        parts = [("similarity" in islands, 2 * frames**2 * self.patches * self.width)]
        if stage == 0:
            parts.append(("embeddings" in islands, self._embeddings().products))
        if stage < len(self.spans) - 1:
            parts.append(("residual" in islands, 2 * frames**2 * size))  # the merge, padded
        else:
            parts.append(("projector" in islands, self._projector().products))
            parts.append((True, self.standing))
        products += sum(count for _, count in parts)
        return products, wide + sum(count for chosen, count in parts if chosen)

    def chunk_shares(self, islands: Islands) -> tuple[float, float]:
        """`half_share` of a chunked engine's head and rest."""
        (head, wide), (rest, rest_wide) = self.chunk_products(islands)
        return 1 - wide / head, 1 - rest_wide / rest

    def chunk_products(self, islands: Islands) -> list[tuple[int, int]]:
        """`stage_products` of the head and of the rest."""
        products, wide = self._layers(self.spans[0], islands)
        products += self._embeddings().products
        wide += self._embeddings().products * ("embeddings" in islands)
        whole = self.total(islands).products + self.standing
        return [(products, wide), (self.products - products, whole - wide)]

    def _layers(self, span: range, islands: Islands) -> tuple[int, int]:
        """(all, fp32) flops of the matrix products of some encoder layers."""
        products = wide = 0
        for name in LAYERED:
            for layer in span:
                count = getattr(self, f"_{name}")(layer).products
                products += count
                wide += count * (layer in getattr(islands, name))
        deciding = self.deciding
        if "logits" in islands and deciding is not None and deciding in span and deciding not in islands.attention:
            wide += self._logits().products
        return products, wide

    @property
    def products(self) -> int:
        """Flops of all matrix products of the graph."""
        parts = ("embeddings", "attention", "mlp", "projector", "similarity", "residual")
        return sum(self.of(name).products for name in parts) + self.standing

    @property
    def standing(self) -> int:
        """Flops of the products for the bias of kept tokens, which are fp32 in every graph."""
        tokens = self.stages[-1] * self.pooled
        # EarlyTom compares kept tokens with all tokens, cells all with all, before selection.
        compared = self.kept if self.deciding is not None else tokens
        return 2 * tokens * (compared * self.llm + self.kept)

    @property
    def activation(self) -> int:
        """Flops per element of an MLP's activation."""
        return _GATE if self.gated else _GELU

    def _hidden(self, layer: int) -> int:
        return self.frames[layer] * self.tokens * self.width  # elements of the layer's input

    def _pixels(self) -> Cost:
        elements = self.stages[0] * self.step * 3 * math.prod(self.size)
        return Cost(0, _PIXEL * elements, 0, _EXTRA * elements)

    def _norms(self) -> Cost:
        elements = 2 * sum(map(self._hidden, range(self.depth)))
        weights, each = (2, _RMS) if self.rms else (4, _NORM)
        return Cost(0, each * elements, _EXTRA * weights * self.width * self.depth, _EXTRA * elements)

    def _softmax(self) -> Cost:
        if self.deciding is None:  # no attention is written out
            return Cost()
        elements = self.frames[self.deciding] * self.heads * self.tokens**2
        return Cost(0, _SOFTMAX * elements, 0, _EXTRA * elements)

    def _similarity(self) -> Cost:
        if self.deciding is None:  # frames are not compared with all others
            return Cost()
        # Before every merge, and once more for the segments of what is left.
        products = sum(2 * self.patches * n * n * self.width for n in self.stages)
        elements = sum(self.patches * n * (self.width + n) for n in self.stages)
        return Cost(products, 0, 0, _EXTRA * elements)

    def _logits(self) -> Cost:
        if self.deciding is None:
            return Cost()
        matrix = self.frames[self.deciding] * self.tokens**2
        elements = 2 * self._hidden(self.deciding) + self.heads * matrix
        return Cost(2 * matrix * self.width, 0, 0, _EXTRA * elements)

    def _gelu(self) -> Cost:
        layers = self.tokens * self.inner * sum(self.frames)
        projector = self.projector_rows * self.llm * self.stages[-1]
        # Of a gate, what the activation gives and what it is multiplied into.
        wider = (1 + self.gated) * layers + projector
        return Cost(0, self.activation * layers + _GELU * projector, 0, _EXTRA * wider)

    def _residual(self) -> Cost:
        size = self.tokens * self.width
        merges = sum(2 * a * b * size for a, b in pairwise(self.stages))
        adds = 2 * sum(map(self._hidden, range(self.depth)))
        kept = self.stages[0] * size + adds + sum(self.stages[1:]) * size
        return Cost(merges, adds, 0, _EXTRA * kept)

    def _embeddings(self) -> Cost:
        area = 3 * self.step * self.patch**2
        elements = self.stages[0] * self.patches * self.width
        weights = self.width * (area + 1 + self.tokens)
        return Cost(2 * area * elements, elements, _EXTRA * weights, _EXTRA * elements)

    def _projector(self) -> Cost:
        rows = self.projector_rows
        elements = self.stages[-1] * self.llm * (3 * rows + (0 if rows == self.pooled else self.pooled))
        gelu = _GELU * self.stages[-1] * rows * self.llm
        return Cost(self.projector_flops, gelu, _EXTRA * self.projector_weights, _EXTRA * elements)

    def _attention(self, layer: int) -> Cost:
        pairs = None if self.pairs is None else self.pairs[layer]
        products = flops.encoder_layer(self.tokens, self.width, 0, pairs=pairs) * self.frames[layer]
        weights = 4 * self.width * (self.width + 1)
        return Cost(products, 0, _EXTRA * weights, _EXTRA * 5 * self._hidden(layer))

    def _mlp(self, layer: int) -> Cost:
        rows = self.frames[layer] * self.tokens
        into = 1 + self.gated  # products of what enters
        weights = (into + 1) * self.width * self.inner + self.width + into * self.inner
        elements = rows * (2 * into * self.inner + self.width)
        products = flops.mlp(rows, self.width, self.inner, gated=self.gated)
        return Cost(products, self.activation * rows * self.inner, _EXTRA * weights, _EXTRA * elements)


def record(config: BuildConfig) -> dict[str, Any]:
    """The cost of every island, and the choice, in plain JSON types."""
    costs = Costs(config)
    every = {
        name: {"what": what, "flops": cost.flops, **asdict(cost)}
        for name, what, cost in ((name, what, costs.of(name)) for name, what in ISLANDS.items())
    }
    chosen = config.islands
    return {"chosen": list(chosen.words), "half_share": costs.half_share(chosen), "islands": every}


def show(trace: Trace, config: BuildConfig) -> None:
    """Show every island with its cost, and the choice."""
    costs, rows = Costs(config), []
    for name, what in ISLANDS.items():
        cost = costs.of(name)
        sizes = [f"{cost.flops / 1e9:.2f}", *(f"{n / 2**20:.2f}" for n in (cost.weight_bytes, cost.activation_bytes))]
        rows.append((name, what, *sizes, f"{cost.products / costs.products:.2%}", _chosen(name, config.islands)))
    columns = ("island", "in fp32", "GFLOP", "weights MiB", "results MiB", "of products", "chosen")
    trace.table(columns, rows)
    trace.line(f"fp32 stay: {','.join(config.islands.words) or 'none'} ({OPTION} chooses)")
    trace.line(f"matrix products in {config.dtype}: {costs.half_share(config.islands):.2%}")


def _chosen(name: str, islands: Islands) -> str:
    if name not in LAYERED:
        return "yes" if name in islands else ""
    return ",".join(word.partition(":")[2] for word in runs_of(name, getattr(islands, name)))
