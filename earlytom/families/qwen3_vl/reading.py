"""The inputs of Qwen3-VL's language model besides embeddings: M-RoPE positions and deepstack states.

A text token has the same position on all three axes. A visual token has its frame's time within the span, and its
cell's row and column. A span takes max(rows, columns) positions, however few tokens are kept and however long the video
is. So positions equal transformers' when all tokens are kept, and kept tokens have their original rows and columns.

Notation: B prompts, L tokens, N visual tokens, E width of the language model, K states of earlier layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from earlytom.families.family import ShortPrompt


def axes_of(visual: Sequence[bool], cells: Tensor, grid: Tensor, time: Tensor) -> Tensor:
    """[3, L] int64, positions of a prompt's tokens by time, row and column.

    Args:
        visual: L flags, True for visual tokens; a span's tokens are consecutive, and there is text between spans.
        cells: [N] int64, raster index of each visual token's cell; grid: [N, 2], rows and columns of its frame.
        time: [N] int64, time position relative to the start of the span.
    """
    found, begin, done = [], 0, 0
    for is_visual, group in groupby(visual):
        count = len(list(group))
        if not is_visual:
            found.append(torch.arange(begin, begin + count, device=cells.device).expand(3, -1))
            begin += count
            continue
        span = slice(done, done + count)
        columns = grid[span, 1]
        row, column = torch.div(cells[span], columns, rounding_mode="trunc"), cells[span] % columns
        found.append(torch.stack([time[span], row, column]) + begin)
        begin, done = begin + int(grid[done].max()), done + count
    return torch.cat(found, dim=1)


def positions_of(prompt: ShortPrompt) -> Tensor:
    """[3, B, L] int64; 0 for padding."""
    positions = torch.zeros(3, *prompt.ids.shape, dtype=torch.int64, device=prompt.ids.device)
    done = 0
    for at, (mask, visual) in enumerate(zip(prompt.mask.bool(), prompt.visual, strict=True)):
        count = int(visual.sum())
        span = slice(done, done := done + count)
        positions[:, at, mask] = axes_of(
            visual[mask].tolist(), prompt.cells[span], prompt.grid[span], prompt.time[span]
        )
    return positions


@contextmanager
def reading(model: Any, prompt: ShortPrompt) -> Iterator[dict[str, Any]]:
    """See `Family.reading`."""
    inner = model.model
    layers, width = inner.language_model.layers, inner.language_model.config.hidden_size
    positions = positions_of(prompt)
    delta = positions.amax(dim=(0, 2)) + 1 - prompt.mask.sum(1)

    def prepared(inputs: Tensor, kwargs: dict[str, Any]) -> Tensor:
        text = GenerationMixin._prepare_position_ids_for_generation(model, inputs, kwargs)
        times = len(text) // len(prompt.ids)
        inner.rope_deltas = delta[:, None].repeat_interleave(times, 0)
        return torch.cat([text[None], positions.repeat_interleave(times, 1)])

    with ExitStack() as stack:
        for layer, state in zip(layers, prompt.tokens.split(width, dim=-1)[1:], strict=False):
            stack.callback(layer.register_forward_hook(_adding(prompt.visual, state)).remove)
        model._prepare_position_ids_for_generation = prepared
        stack.callback(delattr, model, "_prepare_position_ids_for_generation")
        yield {"position_ids": positions}


def _adding(visual: Tensor, state: Tensor) -> Any:
    """A hook that adds `state [N, E]` to the visual tokens in a layer's output, in the prefill only."""

    def add(layer: Any, given: Any, hidden: Tensor) -> Tensor:
        if hidden.shape[1] != visual.shape[1]:
            return hidden
        times = len(hidden) // len(visual)  # prompts are repeated for several answers
        each = state.to(hidden).split(visual.sum(1).tolist())
        added = hidden.clone()
        added[visual.repeat_interleave(times, 0)] += torch.cat([one for one in each for _ in range(times)])
        return added

    return add
