"""The precision of the exported graph: half where it is safe, fp32 islands where it is not.

TensorRT 11 has no FP16 flag and every network is strongly typed, so the precision of an engine is the precision of its
ONNX graph. Weights, matrix products and the residual stream are half. fp32 stay: normalising the pixels, layer norms,
the softmax and the received attention of the one explicit attention layer, frame similarity, and both decisions.
(Attention layers are one fused operator each, whose softmax accumulates in fp32 inside the kernel.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from earlytom.errors import UserError


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm whose statistics, scale and shift are fp32 whatever the input; returns the dtype of the input."""

    def forward(self, input: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(input.float(), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.to(input.dtype)


def set_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert `module` in place to `dtype` with its layer norms kept in fp32.

    Raises:
        UserError: a weight is too large for `dtype`.
    """
    for name, parameter in module.named_parameters():
        limit = torch.finfo(dtype).max
        if parameter.dtype.itemsize > dtype.itemsize and float(parameter.detach().abs().amax()) > limit:
            raise UserError(
                f"weight {name} holds {float(parameter.detach().abs().amax()):.3g}, more than {dtype} can "
                f"({limit:.3g}): build with --bf16 or --fp32"
            )
    module.to(dtype)
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            child.float()
            child.__class__ = Float32LayerNorm
    return module
