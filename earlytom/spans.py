"""Where the layers of a method cut a tower, which one it may watch, and what the values between them are called. Needs
no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from earlytom.errors import UserError
from earlytom.settings import MethodSettings


def layer_spans(layers: Sequence[int], depth: int) -> list[range]:
    """The layers between those of a method, in a tower of which `depth` run: all spans but the last end with one."""
    return [range(*edges) for edges in pairwise((0, *(layer + 1 for layer in layers), depth))]


OF_MERGES = ("similarity", "weights", "member", "taken")
"""What methods note at a merge layer: "weights_6" and so on."""
_NOTED = {
    "earlytom": (("similarity", "weights"), ("static",), ("relevance",)),
    "cells": (("weights", "member", "taken"), (), ()),
}
"""Of each method: what it notes at a merge, behind the layers, and of features."""
_UNTOUCHED = {False: ((), (), ()), True: ((), (), ("relevance",))}
"""Of one that leaves the tower as it is, by whether it goes by received attention."""


def trace_names(config: MethodSettings, layers: int | None = None) -> list[str]:
    """The keys of a trace that `earlytom.encoder.encode` fills, in the order in which they are computed.

    Args:
        config: settings of the method.
        layers: how many run, for the trace of every layer; None for that of the merge layers.
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
    """Raise UserError if a method needs received attention of a layer that is not among the `full` ones (None: all)."""
    if layer is None or full is None or layer in full:
        return
    raise UserError(
        f"layer {layer} of this tower attends within windows, so it cannot say which tokens of a frame matter: let "
        f"--merge-layers end with one of {', '.join(map(str, full))}"
    )
