"""Where a prompt's tokens stand and what their keys weigh, if that is not one after the other and all alike.

A prompt may have *positions*, ids for the rotary embedding with gaps and in any order (on A axes, where the model's
embedding goes by several), and a *bias*: bias j is added to
the attention logit of key j in every layer, for every query that may see it. Who may see whom goes by the order of the
tokens, not by their positions. The answer's tokens stand one after the other behind the prompt's last one and have bias
0. m identical keys weigh as much as one of them with bias log m.

The bias goes into attention as transformers' additive mask [1, 1, queries, keys], which any of its decoders takes and
no function of the library has to be replaced for. A key with one more dimension (1 in the query, the bias in the key)
would keep flash attention, but needs another attention function, heads of 136 where they had 128, and another cache.
A mask costs memory instead: it holds `MASK_ELEMENTS` at most, as a longer prompt is read in several passes (at 8,000
tokens in half precision 32 MB and not 128). In a decode step it is one row in a fixed buffer.

In half precision the bias is rounded to it, by at most 0.4 % in bfloat16.

Notation: S tokens in a prefix, L read now, C slots in the cache.
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
_ALIGNED = 8  # the fused kernels copy a mask whose rows do not begin at a multiple of it


class PromptPass(NamedTuple):
    """One pass of the language model over some of a prompt's tokens.

    Attributes:
        tokens: which of them.
        columns: slots of the cache to attend to, the first ones; None for all that there are.
        how: arguments of the language model.
    """

    tokens: slice
    columns: int | None
    how: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Placed:
    """The part of a prompt that is read now.

    Attributes:
        positions: int64 [L] or [A, L], of its tokens.
        bias: fp32 [S + L], of all tokens so far, a copy of what was given; None if all are 0.
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
        """From what a caller gives of L = `length` tokens, and the prefix before them; None if nothing is special."""
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
        """int64 [], the position of the token after the last: on all axes behind the last one's largest."""
        return self.positions[..., -1].max() + 1

    def ids(self, tokens: slice = slice(None)) -> Tensor:
        """int64 [1, L], or [A, 1, L]: what the language model is given of some tokens."""
        return self.positions[..., None, tokens]

    def passes(self, slots: int, dtype: torch.dtype) -> Iterator[PromptPass]:
        """How to read the tokens into a cache of that many slots, which holds the prefix."""
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
    """What is added to the logits of some queries: the bias of keys up to each one's own, and else the least number.

    Args:
        bias: fp32 [S + L].
        queries: their tokens, none beyond the bias.
        columns: keys.

    Returns:
        [1, 1, queries, columns] in `dtype`.
    """
    rows = torch.arange(queries.start, queries.stop, device=bias.device)
    later = torch.arange(columns, device=bias.device) > rows[:, None]
    row = F.pad(bias[:columns], (0, max(0, columns - len(bias)))).to(dtype)
    return row.expand(later.shape).masked_fill(later, torch.finfo(dtype).min)[None, None]


class StepPlaces:
    """What decode steps in a cache of C slots read beside their token, in fixed buffers.

    Attributes:
        kind: "bias" or "positions", for the latter without a bias; with the number of axes where there are several.
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
        """Behind a prompt that was read; None: behind none. The kind must be that of the prompt."""
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
        """Arguments of the language model in a step, which sees its own token."""
        if self._row is None:
            return {"position_ids": self._position}
        self._row.index_fill_(3, self._slot, 0.0)
        return {"position_ids": self._position, "attention_mask": self._row}

    def leave(self) -> None:
        """After a step."""
        self._position.add_(1)
        self._slot.add_(1)
