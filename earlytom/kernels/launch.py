"""A kernel launch: everything but the tensors.

PyTorch launches through Triton; the TensorRT plugin compiles ahead of time with the same constants and the same grid.
So both run the same code on the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel for fixed shapes.

    Attributes:
        kernel: the `triton.jit` function. Its parameters are the tensors (inputs, then outputs), then the constants.
        grid: programs in x, y and z.
        constants: the value of every `constexpr` parameter, and None for a tensor that is left out.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline of loops over memory.
    """

    kernel: Any
    grid: tuple[int, int, int]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on tensors of one device, in the order of the kernel's parameters, with the strides of its constants.

        Without fused multiply-adds: decisions compare sums of products, and must be the same as in PyTorch.
        """
        with torch.cuda.device_of(tensors[0]):
            self.kernel[self.grid](
                *tensors,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                enable_fp_fusion=False,
            )
