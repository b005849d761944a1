"""The sizes at which `builder.kernels` measures the operators."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSize:
    """What is encoded: frames of `grid` x `grid` patches, a tower, and the width of the LLM behind it."""

    frames: int
    grid: int
    patch: int
    width: int
    heads: int
    intermediate: int
    layers: int
    merge_layers: tuple[int, ...]
    llm_width: int

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def cells(self) -> int:
        """P, tokens of a frame after pooling."""
        from earlytom.families.llava_onevision import pooled_side  # which imports PyTorch

        return pooled_side(self.grid) ** 2


SIZES = {
    "so400m": KernelSize(32, 27, 14, 1152, 16, 4304, 26, (6, 14, 20), 3584),
    "tiny": KernelSize(8, 5, 4, 32, 2, 64, 4, (0, 1, 2), 24),
}
