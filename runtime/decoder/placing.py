"""Position ids and attention bias of a prompt, where these are not the defaults 0, 1, 2, ... and 0.

A prompt may have *positions*, ids for the rotary embedding with gaps and in any order (on A axes, if the model's rotary
embedding has several), and a *bias*: bias j is added to the attention logit of key j in every layer, for every query
that may attend to it. The causal order is that of the tokens, not of their positions. The answer's tokens have
consecutive positions after the prompt's last and bias 0. m identical keys weigh as much as one with bias log m.

The bias is passed as transformers' additive mask [1, 1, queries, keys], which all its decoders take without any
function of the library being replaced. An extra key dimension (1 in the query, the bias in the key) would keep flash
attention, but needs another attention function, heads of 136 instead of 128, and another KV cache. A mask costs memory
instead: at most `MASK_ELEMENTS`, as a longer prompt is prefilled in several passes (at 8,000 tokens in half precision
32 MB instead of 128). In a decode step it is one row in a fixed buffer.

In half precision the bias is rounded, by at most 0.4 % in bfloat16.

Notation: S tokens in a prefix, L prefilled now, C slots in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from earlytom.transfers import to_device
from runtime.decoder.prefix import Prefix

MASK_ELEMENTS = 1 << 24
_ALIGNED = 8  # the fused kernels copy a mask whose row length is no multiple of this


class PromptPass(NamedTuple):
    """One pass of the language model over some of a prompt's tokens.

    Attributes:
        tokens: the tokens of this pass.
        columns: number of leading cache slots to attend to; None for all.
        how: further arguments of the language model.
    """

    tokens: slice
    columns: int | None
    how: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Placed:
    """Positions and bias of the part of a prompt that is prefilled now.

    Attributes:
        positions: int64 [L] or [A, L], of its tokens.
        bias: fp32 [S + L], of all tokens so far, a copy; None if all are 0.
        states: [K, L, D], see `runtime.decoder.states`; None if there are none.
    """

    positions: Tensor
    bias: Tensor | None
    states: Tensor | None = None

    @classmethod
    def of(
        cls,
        length: int,
        positions: Tensor | None,
        bias: Tensor | None,
        prefix: Prefix | None,
        device: torch.device,
        states: Tensor | None = None,
    ) -> Self | None:
        """From a caller's arguments for L = `length` tokens, and the prefix before them; None if all are defaults."""
        if positions is not None and (
            positions.dtype != torch.int64 or positions.dim() > 2 or positions.shape[-1:] != (length,)
        ):
            raise ValueError(f"positions must be int64 [{length}], got {positions.dtype} {list(positions.shape)}")
        if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (length,)):
            raise ValueError(f"the bias must be float32 [{length}], got {bias.dtype} {list(bias.shape)}")
        start, behind, before = (0, None, None) if prefix is None else (prefix.length, prefix.position, prefix.bias)
        if positions is None and bias is None and behind is None and states is None:
            return None
        if positions is None:
            positions = torch.arange(length, device=device) + (start if behind is None else behind)
        weights = None
        if before is not None or bias is not None:
            before = torch.zeros(start, device=device) if before is None else before
            after = torch.zeros(length, device=device) if bias is None else to_device(bias.detach(), device).float()
            weights = torch.cat((before, after))
        return cls(to_device(positions, device), weights, states)

    @property
    def next(self) -> Tensor:
        """int64 [], the position of the next token, on all axes: 1 + the largest of the last token's."""
        return self.positions[..., -1].max() + 1

    def ids(self, tokens: slice = slice(None)) -> Tensor:
        """int64 [1, L], or [A, 1, L]: the language model's position ids of some tokens."""
        return self.positions[..., None, tokens]

    def passes(self, slots: int, dtype: torch.dtype) -> Iterator[PromptPass]:
        """The passes that prefill the tokens into a cache of that many slots, which holds the prefix."""
        length = self.positions.shape[-1]
        if self.bias is None:
            yield PromptPass(slice(0, length), None, {"position_ids": self.ids()})
            return
        start = len(self.bias) - length
        rows = max(1, MASK_ELEMENTS // len(self.bias))
        for first in range(0, length, rows):
            tokens = slice(first, min(first + rows, length))
            columns = min(slots, -(-(start + tokens.stop) // _ALIGNED) * _ALIGNED)
            mask = causal_bias(self.bias, range(start + first, start + tokens.stop), columns, dtype)
            yield PromptPass(tokens, columns, {"position_ids": self.ids(tokens), "attention_mask": mask})


def causal_bias(bias: Tensor, queries: range, columns: int, dtype: torch.dtype) -> Tensor:
    """The additive mask of some queries: the bias of keys up to each one's own, and the least number for later keys.

    Args:
        bias: fp32 [S + L].
        queries: indices of their tokens, below S + L.
        columns: number of keys.

    Returns:
        [1, 1, queries, columns] in `dtype`.
    """
    rows = torch.arange(queries.start, queries.stop, device=bias.device)
    later = torch.arange(columns, device=bias.device) > rows[:, None]
    row = F.pad(bias[:columns], (0, max(0, columns - len(bias)))).to(dtype)
    return row.expand(later.shape).masked_fill(later, torch.finfo(dtype).min)[None, None]


class StepPlaces:
    """Position and mask row of decode steps in a cache of C slots, in fixed buffers.

    Attributes:
        kind: "bias" or (without a bias) "positions"; with the number of axes where there are several.
    """

    def __init__(
        self, slots: int, dtype: torch.dtype, device: torch.device, *, biased: bool, axes: tuple[int, ...] = ()
    ) -> None:
        self.kind = "-".join(["bias" if biased else "positions", *map(str, axes)])
        self._position = torch.zeros(*axes, 1, 1, dtype=torch.int64, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._row = torch.empty(1, 1, 1, slots, dtype=dtype, device=device) if biased else None
        self.begin(None)

    def begin(self, placed: Placed | None) -> None:
        """Start after a prefilled prompt of the same kind; None: reset."""
        if placed is None:
            self._position.zero_()
        else:
            self._position.copy_(placed.next)
        if self._row is not None:
            bias = None if placed is None else placed.bias
            length = 0 if bias is None else len(bias)
            self._row.fill_(torch.finfo(self._row.dtype).min)
            if bias is not None:
                self._row[..., :length].copy_(bias)
            self._slot.fill_(length)

    def enter(self) -> dict[str, Any]:
        """Arguments of the language model in a step; unmasks the step's own token."""
        if self._row is None:
            return {"position_ids": self._position}
        self._row.index_fill_(3, self._slot, 0.0)
        return {"position_ids": self._position, "attention_mask": self._row}

    def leave(self) -> None:
        """Advance to the next step."""
        self._position.add_(1)
        self._slot.add_(1)
