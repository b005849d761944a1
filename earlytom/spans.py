"""Layer spans between a method's layers, the names of traced values, and a check of the watched layer. Needs no
PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from earlytom.errors import UserError
from earlytom.settings import MethodSettings


def layer_spans(layers: Sequence[int], depth: int) -> list[range]:
    """Split `depth` layers after each of the method's `layers`: every span but the last ends with one of them."""
    return [range(*edges) for edges in pairwise((0, *(layer + 1 for layer in layers), depth))]


OF_MERGES = ("similarity", "weights", "member", "taken")
"""Values that methods note at a merge layer, as "weights_6" and so on."""
_NOTED = {
    "earlytom": (("similarity", "weights"), ("static",), ("relevance",)),
    "cells": (("weights", "member", "taken"), (), ()),
}
"""What each method notes at a merge, after the layers, and with the features."""
_UNTOUCHED = {False: ((), (), ()), True: ((), (), ("relevance",))}
"""The same for methods that do not change the tower, by whether they use received attention."""


def trace_names(config: MethodSettings, layers: int | None = None) -> list[str]:
    """The keys of a trace that `earlytom.encoder.encode` fills, in the order in which they are computed.

    Args:
        config: settings of the method.
        layers: number of layers that run, for the trace of every layer; None: of the merge layers only.
    """
    at_merges, behind, of_features = _NOTED.get(config.method, _UNTOUCHED[config.watches])
    names: list[str] = []
    for layer in config.merge_layers if layers is None else range(layers):
        names.append(f"hidden_{layer}")
        if layer in config.merge_layers:
            names += [f"{what}_{layer}" for what in at_merges]
    names += behind
    if layers is not None:
        names.append("projected")
    return [*names, "features", *of_features, "tokens", "positions", "sources", "place", "bias"]


def check_watched(layer: int | None, full: Sequence[int] | None) -> None:
    """Raise UserError if the watched layer has no full attention; `full` lists those that have (None: all)."""
    if layer is None or full is None or layer in full:
        return
    raise UserError(
        f"layer {layer} of this tower attends within windows, so it cannot say which tokens of a frame matter: let "
        f"--merge-layers end with one of {', '.join(map(str, full))}"
    )
