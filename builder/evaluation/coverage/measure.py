"""Coverage: the cosine of each feature of the uncompressed video with its best match among those kept.

* of a frame: the mean over its cells, each with its best match at the same cell of the merged frames: merging loss.
* of a cell: with its best match among all kept tokens: the loss of merging and selection.

Features are those that reach the language model, less their mean over the video, as they are all similar otherwise: 1
is an equal direction, 0 an unrelated one. The most changed cells are the tenth of a video's cells that differ most from
the same cell of the frame before, as brief things are lost first.

It needs no decoder and no questions, so any tower and video will do, but only values of one tower are comparable. It
does not say whether an answer survives.

Notation: F frames, F' frames left, P tokens a frame after pooling, E width of the decoder, N tokens kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from builder.evaluation.passes import ClipPasses
from earlytom.config import EarlyTomConfig
from earlytom.merge import SIMILARITY_STEPS
from earlytom.method import Method
from earlytom.methods.controls import EvenFrames
from earlytom.methods.earlytom import EarlyTom

CHANGED_SHARE = 0.1


@dataclass(frozen=True)
class Coverage:
    """One method on one video.

    Attributes:
        title: of the method. stages: frames before the first merge and after each one. tokens: N.
        frames: [F], of every frame. cells: [F, P], of every cell.
        changed: [F, P] bool, the most changed cells.
    """

    title: str
    stages: tuple[int, ...]
    tokens: int
    frames: Tensor
    cells: Tensor
    changed: Tensor

    @property
    def changed_mean(self) -> float:
        """Mean coverage of the most changed cells; of all cells of a single frame."""
        return float(self.cells[self.changed].mean() if self.changed.any() else self.cells.mean())

    def to_dict(self) -> dict[str, Any]:
        """The figures, in plain JSON types."""
        worst, worst_cells = int(self.frames.argmin()), int(self.cells.mean(1).argmin())
        return {
            "method": self.title,
            "frames": self.stages[-1],
            "tokens": self.tokens,
            "frame_mean": float(self.frames.mean()),
            "frame_worst": float(self.frames[worst]),
            "frame_worst_at": worst,
            "cell_mean": float(self.cells.mean()),
            "cell_worst_frame": float(self.cells[worst_cells].mean()),
            "cell_worst_frame_at": worst_cells,
            "cell_changed": self.changed_mean,
        }


def measure_coverage(clip: ClipPasses, methods: Sequence[tuple[str, Method]]) -> list[Coverage]:
    """The coverage of each method on one video, and of the fewest evenly spaced whole frames with at least as many
    tokens as the first method keeps.

    Args:
        methods: titles and methods, at least one.
    """
    whole = EarlyTom(EarlyTomConfig(1.0, (), schedule="budget"))
    full = clip.run(whole).features
    changed = most_changed(full)
    found = []
    for title, method in methods:
        done = clip.run(method)
        tokens = done.choose(method).tokens
        found.append(Coverage(title, done.stages, len(tokens), *covered(full, done.features, tokens), changed))
    even = EvenFrames(math.ceil(found[0].tokens / clip.cells)).frames(len(full))
    some = full[list(even)]
    values = covered(full, some, some.flatten(0, 1))
    return [*found, Coverage("uniform frame dropping", (len(even),), len(even) * clip.cells, *values, changed)]


def covered(full: Tensor, merged: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The coverage of every frame, [F], and of every cell, [F, P], fp32.

    Args:
        full: [F, P, E] features without merging.
        merged: [F', P, E] features of the merged frames.
        kept: [N, E] kept tokens.
    """
    mean = full.float().mean((0, 1))
    all_cells, left, tokens = (normalize(x.float() - mean, dim=-1) for x in (full, merged, kept))
    in_place = all_cells.transpose(0, 1) @ left.permute(1, 2, 0)  # [P, F, F']
    return in_place.amax(-1).mean(0), (all_cells @ tokens.T).amax(-1)


def most_changed(full: Tensor) -> Tensor:
    """[F, P] bool: the tenth of the cells of `full [F, P, E]`, at least one, that differ most from the same cell of the
    frame before, ties to the earlier; none of frame 0."""
    mean = full.float().mean((0, 1))
    direction = normalize(full.float() - mean, dim=-1)
    change = torch.round((1 - (direction[1:] * direction[:-1]).sum(-1)) * SIMILARITY_STEPS)  # noise decides nothing
    chosen = torch.zeros(full.shape[:2], dtype=torch.bool)
    if len(change):
        count = max(1, round(CHANGED_SHARE * full.shape[0] * full.shape[1]))
        best = change.flatten().argsort(descending=True, stable=True)[:count]
        chosen[1:].view(-1)[best] = True
    return chosen
