"""Position ids and layer states of a prompt for a language model with three position axes (time, row, column).

A text token has the same position on all axes. A visual token has the time of its frame, and its cell's row and column
added to the start of its span. Where every frame has its own span, its time is that start. Where a video has one span,
its frames' times are `steps` after the start, and a frame keeps its time whatever frames are removed. A span takes
max(rows, columns) of a frame positions, however few of its tokens are kept and however long the video is. So for an
uncompressed video the positions are those of transformers' `generate`: an answer continues after the last text, even if
frames have later times. Tensors only, and no wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from earlytom.transfers import to_device
from runtime.text.prompt import Prompt, Spans

AXES = 3


class OnAxes(NamedTuple):
    """Positions of a prompt.

    Attributes:
        positions: int64 [3, L].
        end: position of the next text, or of the answer.
    """

    positions: Tensor
    end: int


class Told(NamedTuple):
    """Further arguments of the decoder for a prompt; `end` as in `OnAxes`."""

    how: dict[str, Tensor]
    end: int

    def forward(self) -> dict[str, Tensor]:
        """The positions as arguments of the language model's own forward pass."""
        return {"position_ids": self.how["positions"][:, None]}


def told_of(
    prompt: Prompt,
    spans: Spans | None,
    tokens: Tensor,
    place: Tensor,
    cells: tuple[int, int],
    steps: Sequence[int],
    width: int,
    *,
    original: bool = False,
) -> Told:
    """`positions` [3, L] and, if tokens [N, (1 + K) * D] have K > 0, `states` [K, L, D], as arguments of
    `runtime.decoder.eager`; `width` is D, the others as in `on_axes`."""
    positions, end = on_axes(prompt, spans, place, cells, steps, original=original)
    states = states_of(tokens, prompt.visual_span(len(place), spans), positions.shape[1], width)
    return Told({"positions": positions} | ({} if states is None else {"states": states}), end)


def on_axes(
    prompt: Prompt, spans: Spans | None, place: Tensor, cells: tuple[int, int], steps: Sequence[int], *, original: bool
) -> OnAxes:
    """The positions of a prompt's tokens.

    Args:
        spans: of the visual tokens, see `Prompt`.
        place: int64 [N], of each visual token in the video, frame * P + cell.
        cells: (rows, columns) of the P cells of a frame.
        steps: time of every frame of the video, relative to its span's start.
        original: keep the positions that spans have in the uncompressed video; else spans are consecutive.
    """
    (rows, columns), extent = cells, max(cells)
    texts, sizes = zip(*((len(ids), count) for ids, count in prompt.pieces(len(place), spans)), strict=True)
    frame = torch.div(place, rows * columns, rounding_mode="trunc")
    if original and spans is not None:
        assert prompt.names is not None
        names = [texts[0], *(len(prompt.names.before(number)) for number in range(1, len(steps)))]
        begins = [begin + extent * number for number, begin in enumerate(accumulate(names))]
        starts = [begins[span.number] for span in spans]
        start = _numbers(begins, place.device).index_select(0, frame)
        end = begins[-1] + extent
    else:
        starts = [begin + extent * number for number, begin in enumerate(accumulate(texts))]
        each = [start for start, size in zip(starts, sizes, strict=True) for _ in range(size)]
        start = _numbers(each, place.device)
        end = starts[-1] + extent
    cell = place - frame * (rows * columns)
    row = torch.div(cell, columns, rounding_mode="trunc")
    time = start + _numbers(steps, place.device).index_select(0, frame)
    visual = torch.stack([time, start + row, start + cell - row * columns]).split(sizes, dim=1)
    found = []
    for begin, length, seen in zip(starts, texts, visual, strict=True):
        found += [_text(begin - length, length, place.device), seen]
    after = len(prompt.suffix_ids)
    positions = torch.cat([*found, _text(end, after, place.device)], dim=1)
    return OnAxes(positions, end + after)


def following(begin: int, length: int, device: torch.device) -> Tensor:
    """Positions int64 [3, length] of text or an answer after a prompt; `begin` is `OnAxes.end`."""
    return _text(begin, length, device)


def states_of(tokens: Tensor, visual: Sequence[int], length: int, width: int) -> Tensor | None:
    """The layer states in tokens [N, (1 + K) * D], at the tokens' places in a prompt: [K, L, D], 0 for text; None for K
    = 0.

    Args:
        visual: places of the N tokens in the prompt.
        length: L. width: D.
    """
    count = tokens.shape[1] // width - 1
    if not count:
        return None
    states = tokens.new_zeros(count, length, width)
    where = _numbers(visual, tokens.device)
    return states.index_copy(1, where, tokens[:, width:].unflatten(1, (count, width)).transpose(0, 1))


def weights_of(prompt: Prompt, spans: Spans | None, bias: Tensor) -> Tensor:
    """fp32 [L]: `bias [N]` of visual tokens at their places in a prompt, 0 for text."""
    texts, sizes = zip(*((len(ids), count) for ids, count in prompt.pieces(len(bias), spans)), strict=True)
    pieces = zip(texts, bias.split(sizes), strict=True)
    parts = [part for length, own in pieces for part in (bias.new_zeros(length), own)]
    return torch.cat([*parts, bias.new_zeros(len(prompt.suffix_ids))])


def _text(begin: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(begin, begin + length, device=device).expand(AXES, -1)


def _numbers(values: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(list(values), dtype=torch.int64), device)
