"""The decoder's key/value cache: transformers' static one, which a `Prefix` can be taken from and put into.

Everything that depends on how transformers' layers keep their keys and values is here. The cache counts its tokens on
the device; `reading` tells it what the host knows anyway, so that no prefill waits for the device to be told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from earlytom.errors import UserError
from runtime.decoder.prefix import Prefix


class DecoderCache(StaticCache):
    """Room for the keys and values of `bucket` tokens; allocated by the first pass, or by `restore`.

    Attributes:
        bucket: tokens that it holds at most.
    """

    def __init__(self, config: Any, bucket: int) -> None:
        super().__init__(config=config, max_cache_len=bucket)
        self.bucket = bucket
        self._offset: int | None = None

    @property
    def on_device(self) -> bool:
        """Whether a decode step is the same work on the device whatever the cache holds.

        Not so with sliding windows: their layers count on the host, and do other things once a window is full.
        """
        return all(type(layer) is StaticLayer for layer in self.layers)

    def reset(self) -> None:
        """Empty it. Zeroed, and not only rewound: masked positions have weight 0, but 0 times a stale NaN is NaN."""
        super().reset()
        self._earlytom_inner = None  # of a merged prompt, see `earlytom.inner_decoder`: it is gone, too

    @contextlib.contextmanager
    def reading(self, offset: int | None) -> Iterator[None]:
        """Within the block a pass reads tokens from position `offset` on; None: the device alone knows."""
        self._offset = offset
        try:
            yield
        finally:
            self._offset = None

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Where the tokens of this pass begin; transformers' masks ask."""
        return super().get_query_offset(layer_idx) if self._offset is None else self._offset

    def take(self, length: int, maker: object) -> Prefix:
        """A copy of the `length` tokens that were read since the last `reset`.

        Raises:
            UserError: the model has layers that keep something else than keys and values.
        """
        for layer in self.layers:
            if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
                raise UserError(
                    f"this language model has layers ({type(layer).__name__}) of which no prefix can be kept: ask "
                    "without one"
                )
        keys, values = (
            tuple(_copied(getattr(layer, name), length) for layer in self.layers) for name in ("keys", "values")
        )
        return Prefix(keys, values, length, maker)

    def restore(self, prefix: Prefix) -> None:
        """Put a prefix into the empty cache, which must have room for it: as if its tokens had just been read."""
        layers = cast(list[Any], self.layers)
        for layer, keys, values in zip(layers, prefix.keys, prefix.values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            held = keys.shape[2]
            layer.keys[:, :, :held].copy_(keys)
            layer.values[:, :, :held].copy_(values)
            layer.cumulative_length.fill_(held)
            if isinstance(layer, StaticSlidingWindowLayer):
                layer.cumulative_length_int = prefix.length


def _copied(tensor: Tensor, length: int) -> Tensor:
    """The first `length` tokens of [1, H, C, d], or all C: a sliding window that is full is in order from 0 on."""
    return tensor[:, :, :length].clone(memory_format=torch.contiguous_format)
