"""Weight-only int8 quantisation of a decoder on a CPU: half of bf16's memory and memory traffic.

    y = (x W^T) s + b          W int8 [N, K];  s bf16 [N], each row's largest magnitude / 127

It covers the linear layers of the language model and, unless tied to the embeddings, the head. Activations stay bf16,
so there is no calibration. A decode step's few rows use torch's `_weight_int8pack_mm`; for a prompt's rows W is
dequantised one layer at a time and multiplied as usual. torch's kernel is slow for fp32 and fp16, and torchao 0.18
dequantises W at every step, which takes 10 times as long as bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlytom.errors import UserError

DTYPE = torch.bfloat16  # of activations, scales and other weights
_LIMIT = 127
_FEW = 32  # the most rows for the int8 kernel: with more, dequantising is faster on one core with AVX-512
_MULTIPLE = 32  # of K: for others torch 2.13's kernel reads out of bounds, and may end the process
_AT_ONCE = 1 << 22  # weights quantised at a time, in fp32


class NarrowLinear(nn.Module):
    """A linear layer with weights in int8, bf16 [..., K] to [..., N].

    Attributes:
        scale: [N] bf16; the first parameter, from which callers take a head's number of logits and dtype.
        weight: int8 [N, K].
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = narrowed(linear.weight.data)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        rows = input.flatten(0, -2)
        if len(rows) <= _FEW and self.weight.shape[1] % _MULTIPLE == 0:
            out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            out = F.linear(rows, self.weight.to(rows.dtype)) * self.scale
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, input.shape[:-1])


def narrowed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] quantised to int8 [N, K], and its scale bf16 [N]; on the meta device without values."""
    if weight.is_meta:
        return torch.empty_like(weight, dtype=torch.int8), torch.empty(len(weight), dtype=DTYPE, device="meta")
    values = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=DTYPE)
    step = max(1, _AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = weight[first : first + step].float()
        own = (rows.abs().amax(1) / _LIMIT).clamp(min=torch.finfo(DTYPE).tiny).to(DTYPE)
        scale[first : first + step] = own
        values[first : first + step] = (rows / own.float()[:, None]).round().clamp(-_LIMIT, _LIMIT).to(torch.int8)
    return values, scale


def narrow(model: Any) -> None:
    """Quantise a video model's decoder in place: one loaded in bf16, or one on the meta device, to be loaded afterwards
    (`scale_of` lists the int8 tensors)."""
    layers, embeddings, head = model.get_decoder().layers, model.get_input_embeddings(), model.get_output_embeddings()
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, NarrowLinear(child))
    if head.weight is not embeddings.weight:
        model.set_output_embeddings(NarrowLinear(head))


def scale_of(model: Any) -> dict[str, str]:
    """Names of int8 weights to names of their scales."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, NarrowLinear)}
    return {f"{name}.weight": f"{name}.scale" for name in found}


def check_narrow(decoder_dtype: Any, decoder: str, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Raise UserError for an invalid `decoder_dtype`, or int8 where it is not supported; None is always valid."""
    if decoder_dtype is None:
        return
    if decoder_dtype != "int8":
        raise UserError(f"decoder_dtype (--decoder-dtype) is int8 or nothing, got {decoder_dtype!r}")
    if decoder != "torch":
        raise UserError(f"--decoder-dtype int8 is for the PyTorch decoder, not for {decoder}: use --decoder torch")
    if device is not None and device.type != "cpu":
        raise UserError(f"--decoder-dtype int8 runs on a CPU, not on {device}: use --device cpu")
    if dtype not in (None, DTYPE):
        raise UserError(f"--decoder-dtype int8 computes in bf16, not in {dtype}: use --dtype bf16, or leave it out")
