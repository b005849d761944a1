"""Conversions between the pictures of a video and the patches of transformers' processor.

Notation: F frames of two pictures each, patches of p x p pixels, tokens of m x m patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlytom.families.qwen3_vl.grid import SIDE, STEP


def frame_patches(pixels: Tensor, patch: int) -> Tensor:
    """[F * 2, 3, H, W] to the tower's patches [F, S, 3, 2, p, p]; a token's patches are consecutive."""
    _, colours, height, width = pixels.shape
    blocks = pixels.flatten(0, 1).unflatten(2, (width // patch // SIDE, SIDE, patch))  # TensorRT has up to 8 dimensions
    blocks = blocks.unflatten(1, (height // patch // SIDE, SIDE, patch))  # [F * 2 * 3, rows, m, p, columns, m, p]
    blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6).flatten(1, 4).flatten(2)  # [F * 2 * 3, S, p * p]
    patches = blocks.unflatten(0, (-1, STEP, colours)).permute(0, 3, 2, 1, 4)  # [F, S, 3, 2, p * p]
    return patches.unflatten(4, (patch, patch))


def packed(pixels: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """One video [F * 2, 3, H, W] in the processor's form: patches [F * S, 3 * 2 * p * p] and grid [1, 3]: frames, rows,
    columns."""
    patches = frame_patches(pixels, patch)
    rows, columns = (side // patch for side in pixels.shape[2:])
    return patches.flatten(2).flatten(0, 1), torch.tensor([[len(patches), rows, columns]], device=pixels.device)


def unpacked(patches: Tensor, grid: Tensor, patch: int) -> list[Tensor]:
    """The inverse of `packed` for n concatenated videos, `grid` [n, 3]: each [F * 2, 3, H, W]."""
    videos = []
    sizes = [(int(frames), int(rows), int(columns)) for frames, rows, columns in grid.tolist()]
    for some, (frames, rows, columns) in zip(patches.split([f * r * c for f, r, c in sizes]), sizes, strict=True):
        blocks = some.view(frames, rows // SIDE, columns // SIDE, SIDE, SIDE, -1, STEP, patch, patch)
        blocks = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)  # [F, 2, 3, rows, m, p, columns, m, p]
        videos.append(blocks.reshape(frames * STEP, -1, rows * patch, columns * patch))
    return videos
