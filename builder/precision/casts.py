"""The precision of the exported graph: half where it is safe, fp32 islands where it is not.

TensorRT 11 has no FP16 flag and every network is strongly typed, so the precision of an engine is that of its ONNX
graph. Weights, matrix products and the residual stream are half. In fp32 by default: pixel normalisation, norms, the
softmax and received attention of the one explicit attention layer, frame similarity, and both decisions;
`builder.precision.islands` names these and other islands. (Each other attention layer is one fused operator, whose
softmax accumulates in fp32 inside the kernel.)

A key's bias adds the same number to all logits of a query, so softmax is invariant to it; but trained biases can be so
large that half loses the rest of the logit, or overflows. So half graphs are exported without it.

Casts follow one rule: a product takes its operands in the dtype of its weights; a norm computes in the dtype of its
weights and returns that of the branch after it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from builder.precision.int8 import Int8Linear
from builder.precision.islands import DEFAULT, Islands
from earlytom.errors import UserError
from earlytom.families import DEFAULT_FAMILY, Family


class TypedLayerNorm(nn.LayerNorm):
    """A layer norm in the dtype of its weights, whatever the input's; returns dtype `result`, or that of the input."""

    result: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        normed = super().forward(input.to(self.weight.dtype))
        return normed.to(self.result or input.dtype)


class TypedRMSNorm(nn.Module):
    """The same for transformers' RMS norm: a single operator, where theirs mixes two dtypes in half precision."""

    weight: nn.Parameter
    variance_epsilon: float
    result: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        entering = input.to(self.weight.dtype)
        normed = nn.functional.rms_norm(entering, self.weight.shape, self.weight, self.variance_epsilon)
        return normed.to(self.result or input.dtype)


class TypedLinear(nn.Linear):
    """A linear layer that casts its input to the dtype of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


NORMS = (TypedLayerNorm, TypedRMSNorm)


class Float32(nn.Module):
    """An activation function in fp32; returns fp32."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input.float())


def set_precision(
    module: nn.Module, dtype: torch.dtype, *, wide: Collection[str] = (), norms: bool = True
) -> nn.Module:
    """Convert `module` in place to `dtype`, except int8 layers.

    Args:
        module: in fp32.
        wide: names of submodules that stay in fp32 ("" is the module itself).
        norms: whether layer norms and RMS norms stay in fp32, too.
    """
    for name, child in module.named_modules():
        if isinstance(child, Int8Linear):
            continue
        if isinstance(child, nn.LayerNorm):
            child.__class__ = TypedLayerNorm
        elif hasattr(child, "variance_epsilon"):  # RMS norm, a different class in each model
            child.__class__ = TypedRMSNorm
        elif type(child) is nn.Linear:
            child.__class__ = TypedLinear
        if (norms and isinstance(child, NORMS)) or any(f"{name}.".startswith(f"{w}." if w else w) for w in wide):
            continue
        for key, parameter in child.named_parameters(prefix=name, recurse=False):
            _check_range(key, parameter.detach(), dtype)
            parameter.data = parameter.data.to(dtype)
        for key, buffer in child.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(child, key, buffer.to(dtype))
    return module


def set_vision_precision(
    tower: nn.Module,
    projector: nn.Module,
    dtype: torch.dtype,
    islands: Islands = DEFAULT,
    family: Family = DEFAULT_FAMILY,
) -> None:
    """Convert a `family`'s vision tower and projector in place to `dtype`, with `islands` in fp32."""
    if dtype == torch.float32:
        islands = DEFAULT  # all is fp32 anyway
    adapter = family.tower(tower)
    layers = [adapter.parts(layer) for layer in adapter.layers]
    for parts in layers if dtype != torch.float32 and adapter.key_bias_cancels else ():
        if (bias := parts.attention.k_proj.bias) is not None:
            bias.data = torch.zeros_like(bias)
    if "gelu" in islands:
        for module in (*(parts.mlp for parts in layers), projector):
            _widen_activations(module)
    kept = [layers[layer].attention for layer in islands.attention] + [layers[layer].mlp for layer in islands.mlp]
    kept += [adapter.embeddings] * ("embeddings" in islands)
    names = {module: name for name, module in tower.named_modules()}
    set_precision(tower, dtype, wide=[names[module] for module in kept], norms="norms" in islands)
    set_precision(projector, dtype, wide=[""] * ("projector" in islands))
    for index, parts in enumerate(layers):
        for norm, wide in ((parts.attention_norm, islands.attention), (parts.mlp_norm, islands.mlp)):
            if isinstance(norm, NORMS):  # any other kind returns the dtype of its input
                norm.result = torch.float32 if index in wide else dtype


def _widen_activations(module: nn.Module) -> None:
    """Put a module's activation functions (children without weights) into fp32."""
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Dropout | nn.Identity) and next(child.parameters(), None) is None:
            setattr(module, name, Float32(child))


def _check_range(name: str, weight: Tensor, dtype: torch.dtype) -> None:
    if weight.dtype.itemsize <= dtype.itemsize:
        return
    largest, limit = float(weight.abs().amax()), torch.finfo(dtype).max
    if largest > limit:
        raise UserError(
            f"weight {name} holds {largest:.3g}, more than {dtype} can ({limit:.3g}): build with --bf16 or --fp32, or "
            "keep it in fp32 with --islands"
        )
