"""The decoder's KV cache: transformers' static cache, from which a `Prefix` can be copied and into which it can be put.

Everything that depends on how transformers' layers keep their keys and values is here. The cache counts its tokens on
the device; `reading` gives it the numbers that the host knows, so that no prefill waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import LinearAttentionLayer, StaticLayer, StaticSlidingWindowLayer

from earlytom.errors import UserError
from runtime.decoder.placing import Placed, StepPlaces
from runtime.decoder.prefix import Prefix


class DecoderCache(StaticCache):
    """Keys and values of up to `bucket` tokens; allocated by the first pass, or by `restore`.

    Attributes:
        bucket: capacity in tokens.
        steps: position and bias buffers of the current request's decode steps; None for none.
    """

    def __init__(self, config: Any, bucket: int) -> None:
        super().__init__(config=config, max_cache_len=bucket)
        self.bucket = bucket
        self._offset: int | None = None
        self._columns: int | None = None
        self.steps: StepPlaces | None = None
        self._steps: dict[tuple[bool, tuple[int, ...]], StepPlaces] = {}  # by whether there is a bias, and the axes

    @property
    def on_device(self) -> bool:
        """Whether a decode step is the same work on the device whatever the cache holds, as a CUDA graph needs.

        Not so with sliding windows, whose layers count on the host and change once a window is full, nor with linear
        attention, whose layers track on the host whether they have a state.
        """
        return all(type(layer) is StaticLayer for layer in self.layers)

    @property
    def _attending(self) -> list[Any]:
        return [layer for layer in cast(list[Any], self.layers) if not isinstance(layer, LinearAttentionLayer)]

    @property
    def _linear(self) -> list[Any]:
        return [layer for layer in cast(list[Any], self.layers) if isinstance(layer, LinearAttentionLayer)]

    @property
    def key(self) -> Hashable:
        """The key of the decode step's CUDA graph, which reads these buffers."""
        return self.bucket if self.steps is None else (self.bucket, self.steps.kind)

    def reset(self) -> None:
        """Empty the cache. It is zeroed: masked positions have weight 0, but 0 times a stale NaN is NaN."""
        super().reset()
        if self.steps is not None:
            self.steps.begin(None)
        self._earlytom_inner = None  # the record of a merged prompt, see `earlytom.inner_decoder`

    def prepare_steps(self, placed: Placed | None, dtype: torch.dtype, device: torch.device) -> None:
        """Choose `steps` for the next prompt; buffers are reused, so their addresses stay the same."""
        if placed is None:
            self.steps = None
            return
        kind = biased, axes = placed.bias is not None, tuple(placed.positions.shape[:-1])
        if kind not in self._steps:
            self._steps[kind] = StepPlaces(self.bucket, dtype, device, biased=biased, axes=axes)
        self.steps = self._steps[kind]

    @contextlib.contextmanager
    def reading(self, offset: int | None, columns: int | None = None) -> Iterator[None]:
        """Within the block a pass writes tokens to slots from `offset` on (None: only the device knows) and attends to
        the first `columns` slots (None: all). Not for layers that are not `on_device`.
        """
        self._offset, self._columns = offset, columns
        try:
            yield
        finally:
            self._offset = self._columns = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a pass's keys and values of one layer; returns those to attend to."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._columns is None:
            return keys, values
        return keys[:, :, : self._columns], values[:, :, : self._columns]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The first slot of this pass, as transformers' mask functions need it."""
        return super().get_query_offset(layer_idx) if self._offset is None else self._offset

    def take(self, length: int, maker: object, placed: Placed | None = None) -> Prefix:
        """A copy of the keys and values of the `length` tokens since the last `reset`; `placed` is their placing."""
        for layer in self.layers:
            if type(layer) not in (StaticLayer, StaticSlidingWindowLayer, LinearAttentionLayer):
                raise UserError(
                    f"this language model has layers ({type(layer).__name__}) of which no prefix can be kept: ask "
                    "without one"
                )
        keys, values = (
            tuple(_copied(getattr(layer, name), length) for layer in self._attending) for name in ("keys", "values")
        )
        ends = tuple((layer.conv_states[0].clone(), layer.recurrent_states[0].clone()) for layer in self._linear)
        position, bias = (None, None) if placed is None else (placed.next, placed.bias)
        return Prefix(keys, values, length, maker, position, bias, ends)

    def restore(self, prefix: Prefix) -> None:
        """Put a prefix into the empty cache, which must have room for it, as if it had just been prefilled."""
        for layer, (conv, state) in zip(self._linear, prefix.ends, strict=True):
            if not layer.is_conv_states_initialized[0]:
                layer.lazy_initialization(conv_states=conv, recurrent_states=state)
            layer.conv_states[0].copy_(conv)
            layer.recurrent_states[0].copy_(state)
            layer.has_previous_state[0] = True
        for layer, keys, values in zip(self._attending, prefix.keys, prefix.values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            held = keys.shape[2]
            layer.keys[:, :, :held].copy_(keys)
            layer.values[:, :, :held].copy_(values)
            layer.cumulative_length.fill_(held)
            if isinstance(layer, StaticSlidingWindowLayer):
                layer.cumulative_length_int = prefix.length


def _copied(tensor: Tensor, length: int) -> Tensor:
    """A copy of the first `length` tokens of [1, H, C, d], or of all C: a full sliding window is in order from 0 on."""
    return tensor[:, :, :length].clone(memory_format=torch.contiguous_format)
