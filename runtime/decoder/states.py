"""Adds a prompt's layer states to the outputs of the language model's first layers.

Some models also give the LLM states of earlier layers of their vision tower: state k of a token is added to the output
of layer k. States are [K, L, D], zeros for text; adding zeros changes no bit, so nothing has to wait for the device to
know which tokens are visual. Decode steps have none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def checked_states(states: Tensor, language_model: Any, length: int, width: int) -> Tensor:
    """Return `states`; ValueError unless they are floats [K, L, D] for L = `length` and K up to the model's layers."""
    layers = len(language_model.layers)
    shape = tuple(states.shape)
    if not states.is_floating_point() or states.dim() != 3 or shape[1:] != (length, width) or shape[0] > layers:
        raise ValueError(
            f"states must be floats [K, {length}, {width}] for up to {layers} layers, got {states.dtype} {list(shape)}"
        )
    return states


@contextlib.contextmanager
def adding(language_model: Any, states: Tensor | None, tokens: slice) -> Iterator[None]:
    """Within the block the language model prefills these `tokens` of a prompt with their `states` added; None: none."""
    with contextlib.ExitStack() as stack:
        if states is not None:
            for layer, state in zip(language_model.layers, states[:, None, tokens], strict=False):
                stack.callback(layer.register_forward_hook(_sum(state)).remove)
        yield


def _sum(state: Tensor) -> Any:
    return lambda layer, given, hidden: hidden + state
