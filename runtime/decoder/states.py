"""States that a prompt brings along for the first layers of the language model, beside its embeddings.

Some models give it what earlier layers of their vision tower made of a frame: state k of a token is added to what layer
k makes of it. [K, L, D], zeros for text; a sum with zeros is the same to the last bit, and nothing waits for the device
to say which tokens are visual. Decode steps have none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def checked_states(states: Tensor, language_model: Any, length: int, width: int) -> Tensor:
    """`states` for a prompt of L = `length` tokens. Raises ValueError unless they are floats [K, L, D], K layers or
    fewer."""
    layers = len(language_model.layers)
    shape = tuple(states.shape)
    if not states.is_floating_point() or states.dim() != 3 or shape[1:] != (length, width) or shape[0] > layers:
        raise ValueError(
            f"states must be floats [K, {length}, {width}] for up to {layers} layers, got {states.dtype} {list(shape)}"
        )
    return states


@contextlib.contextmanager
def adding(language_model: Any, states: Tensor | None, tokens: slice) -> Iterator[None]:
    """Within the block the language model reads these `tokens` of a prompt, whose `states` are added; None: none."""
    with contextlib.ExitStack() as stack:
        if states is not None:
            for layer, state in zip(language_model.layers, states[:, None, tokens], strict=False):
                stack.callback(layer.register_forward_hook(_sum(state)).remove)
        yield


def _sum(state: Tensor) -> Any:
    return lambda layer, given, hidden: hidden + state
