"""Where the layers of a method cut a tower, and what the values between them are called. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from earlytom.config import EarlyTomConfig


def layer_spans(layers: Sequence[int], depth: int) -> list[range]:
    """The layers between those of a method, in a tower of which `depth` run: all spans but the last end with one."""
    return [range(*edges) for edges in pairwise((0, *(layer + 1 for layer in layers), depth))]


def trace_names(config: EarlyTomConfig, layers: int | None = None) -> list[str]:
    """The keys of a trace that `earlytom.encoder.encode` fills with EarlyTom, in the order in which they are computed.

    `layers`: how many run, for the trace of every layer; None for that of the merge layers.
    """
    names: list[str] = []
    for layer in config.merge_layers if layers is None else range(layers):
        names.append(f"hidden_{layer}")
        if layer in config.merge_layers:
            names += [f"similarity_{layer}", f"weights_{layer}"]
    names.append("static")
    if layers is not None:
        names.append("projected")
    return [*names, "features", "relevance", "tokens", "positions", "sources", "place", "bias"]
