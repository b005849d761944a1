"""What the server is told of a model: the cells of its frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from runtime.serve.backend import grid_of


def manifest(size: tuple[int, int], tokens: int, family: str = "llava_onevision", patch: int = 8) -> Any:
    model = SimpleNamespace(family=family, patch_size=patch, preprocessing=SimpleNamespace(size=size))
    return SimpleNamespace(model=model, tokens_per_frame=tokens)


@pytest.mark.parametrize(
    ("size", "tokens", "grid"),
    [
        ((72, 72), 25, (5, 5)),
        ((72, 144), 45, (5, 9)),  # 9 x 18 patches, pooled by two
        ((144, 72), 45, (9, 5)),
        ((64, 256), 64, (4, 16)),  # as many as a square of 8 x 8 would have
        ((72, 72), 24, None),
    ],
)
def test_cells_are_the_family_s(size: tuple[int, int], tokens: int, grid: tuple[int, int] | None) -> None:
    assert grid_of(manifest(size, tokens)) == grid
