"""Frames of videos above heat maps of each method's coverage of their cells, as a PNG. matplotlib is imported only to
draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from builder.evaluation.coverage.measure import Coverage
from runtime.show.figure import new_figure, save
from runtime.show.png import thumbnail

MOST_VIDEOS = 6
_WIDTH, _LABELS, _DPI = 13.0, 2.5, 110  # inches, of which labels and colour bar take some
_THUMBNAIL = 96  # pixels at most


def draw_coverage(
    videos: Sequence[tuple[str, Tensor, Sequence[Coverage]]], cells: tuple[int, int], path: Path, *, caption: str
) -> None:
    """Write the picture.

    Args:
        videos: name, frames uint8 [F, 3, H, W] and coverage, with the same methods each; the first `MOST_VIDEOS` are
            drawn.
        cells: (rows, columns) of the P tokens of a frame.
        path: the PNG file.
    """
    drawn = videos[:MOST_VIDEOS]
    rows = sum(1 + len(found) for _, _, found in drawn)
    high = min(max((_WIDTH - _LABELS) / len(drawn[0][1]), 0.5), 1.5)  # inches of a row, for frames that are square
    figure, every = new_figure(1, rows, size=(_WIDTH, high * rows + 0.6), dpi=_DPI)
    lines = iter(every)
    low = min(float(one.cells.min()) for _, _, found in drawn for one in found)
    image: Any = None
    for name, frames, found in drawn:
        small = np.stack([thumbnail(frame, _THUMBNAIL) for frame in frames.numpy()])
        _show(next(lines), _side_by_side(small, 255), name)
        for one in found:
            grid = one.cells.unflatten(1, cells).numpy()
            label = f"{one.title}\n{one.tokens} tokens\nchanged {one.changed_mean:.2f}"
            image = _show(next(lines), _side_by_side(grid, np.nan), label, cmap="magma", vmin=low, vmax=1.0)
    figure.colorbar(image, ax=list(every), shrink=0.6, aspect=40, label="cosine with the best kept token")
    figure.suptitle(caption, fontsize="medium")
    save(figure, path)


def _side_by_side(images: NDArray[Any], gap: float) -> NDArray[Any]:
    """[F, h, w, ...] as one image, with gaps between."""
    room = max(1, images.shape[2] // 12)
    padding = [(0, 0), (0, 0), (0, room), *[(0, 0)] * (images.ndim - 3)]
    return np.concatenate(np.pad(images, padding, constant_values=gap), axis=1)


def _show(axes: Any, image: NDArray[Any], label: str, **how: Any) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize="x-small")
    return axes.imshow(image, aspect="auto", interpolation="nearest", **how)
