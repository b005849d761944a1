"""int8 matrix products: weights and inputs are quantised to -127..127, everything else keeps its dtype.

    y = (Q(x) s) @ (W c) r + b          Q(x) = round(x / s), int8;  W int8 [K, N];  r [N]

The input scale s is per tensor, the weight scale c r per column. In the exported graph these are QuantizeLinear and
DequantizeLinear around a MatMul, which compilers fuse into one int8 product. W is stored as int8.

The pattern works around limits of the backends:
* Half graphs dequantise the weights with the single scale c and multiply by r after the product: with per-column scales
  tensorrt-rtx 1.7.1 writes the integer sums (up to K 127^2) as half, whose largest number is 65504, and scales them
  afterwards; with one scale it scales first. fp32 graphs use per-column scales, which saves ONNX Runtime a pass.
* In graphs for ONNX Runtime alone the input is uint8 with zero point 128 (`unsigned`): its integer products on x86 take
  no int8 input, and where several products share one QuantizeLinear (query, key, value) it does not convert it, but
  widens their weights at every run.
* The bias is [1, 1, N], not a vector: ONNX Runtime 1.31 fuses a MatMul and a vector Add into a Gemm, which it cannot
  run in int8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LIMIT = 127  # symmetric: -128 is not used
_LEAST = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-100, torch.float32: 2.0**-100}  # normal numbers
_HALF = (torch.float16, torch.bfloat16)


class Int8Linear(nn.Module):
    """A linear layer in int8, [F, T, K] to [F, T, N]. Outside an export it rounds its operands as the graph does.

    Args:
        weight: fp32 [N, K], as in `nn.Linear`.
        bias: fp32 [N], or None.
        limit: magnitude at which the input (after `smooth`) is clipped.
        dtype: of the graph around it.
        smooth: fp32 [K], divisor of each input channel, by which the weights are multiplied; None for no smoothing.
        unsigned: quantise the input to uint8 with zero point 128 in the graph; the values are the same.
    """

    factor: Tensor | None
    unsmooth: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        limit: float,
        dtype: torch.dtype,
        smooth: Tensor | None = None,
        *,
        unsigned: bool = False,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        least = _LEAST[dtype]
        self.input_scale = nn.Buffer(torch.tensor(max(limit / LIMIT, least)).to(dtype))
        self.zero = nn.Buffer(torch.tensor(128, dtype=torch.uint8) if unsigned else torch.zeros((), dtype=torch.int8))
        if smooth is not None:
            weight = weight * smooth
        columns = weight.abs().amax(1) / LIMIT  # [N]
        if dtype in _HALF:
            common = columns.median().clamp(min=least).to(dtype)
            factor = (columns / common.float()).clamp(min=least).to(dtype)
            columns = common.float() * factor.float()
            self.weight_scale = nn.Buffer(common)
            self.register_buffer("factor", factor)
        else:
            columns = columns.clamp(min=least)
            self.weight_scale = nn.Buffer(columns)
            self.register_buffer("factor", None)
        whole = (weight / columns[:, None]).round().clamp(-LIMIT, LIMIT).to(torch.int8)
        self.weight = nn.Buffer(whole.T.contiguous())  # [K, N]
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype)[None, None], requires_grad=False)
        self.register_buffer("unsmooth", None if smooth is None else (1 / smooth).to(dtype))

    def forward(self, input: Tensor) -> Tensor:
        values = input.to(self.dtype)
        if self.unsmooth is not None:
            values = values * self.unsmooth
        out = (self._symbols if torch.compiler.is_exporting() else self._numbers)(values)
        if self.factor is not None:
            out = out * self.factor
        return out if self.bias is None else out + self.bias

    def _symbols(self, values: Tensor) -> Tensor:
        """The product before factor and bias, for the exporter."""
        whole = _symbol("QuantizeLinear", (values, self.input_scale, self.zero), self.zero.dtype, values)
        entering = _symbol("DequantizeLinear", (whole, self.input_scale, self.zero), self.dtype, values)
        axis = {} if self.weight_scale.dim() == 0 else {"axis": 1}
        weight = _symbol("DequantizeLinear", (self.weight, self.weight_scale), self.dtype, self.weight, **axis)
        return entering @ weight

    def _numbers(self, values: Tensor) -> Tensor:
        scale = self.input_scale.float()
        whole = (values.float() / scale).round().clamp(-LIMIT - 1, LIMIT)
        out = whole @ self.weight.float() * (scale * self.weight_scale.float())
        return out.to(self.dtype)


def _symbol(name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, like: Tensor, **attributes: int) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, dict(attributes), dtype=dtype, shape=like.shape)
