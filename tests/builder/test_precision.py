"""Precision: half weights with fp32 layer norms, and weights that half cannot hold are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from builder.precision import Float32LayerNorm, set_precision
from earlytom.errors import UserError

HALF = (torch.float16, torch.bfloat16)


def block(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Sequential(nn.LayerNorm(width, eps=1e-3)))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_layer_norms_stay_fp32_and_the_rest_does_not(dtype: torch.dtype) -> None:
    module = set_precision(block(), dtype)
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            assert isinstance(child, Float32LayerNorm)
            assert child.weight.dtype == child.bias.dtype == torch.float32
        elif isinstance(child, nn.Linear):
            assert child.weight.dtype == dtype
    assert module(torch.randn(2, 16, dtype=dtype)).dtype == dtype


def test_statistics_are_taken_in_fp32() -> None:
    """A mean far from zero: the squares of half values overflow, those of fp32 do not."""
    norm = set_precision(nn.LayerNorm(64), torch.float16)
    hidden = 20000 + 100 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    wanted = nn.functional.layer_norm(hidden.half().float(), (64,))
    got = norm(hidden.half())
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=2e-3)
    squares = hidden.half() ** 2
    assert squares.isinf().any()  # what would have gone wrong


def test_layer_norm_keeps_its_own_weights_and_epsilon() -> None:
    module = block()
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.LayerNorm):
                child.weight.copy_(torch.linspace(0.5, 2, 16))
                child.bias.copy_(torch.linspace(-1, 1, 16))
    before = module(torch.ones(1, 16).cumsum(1))
    after = set_precision(module, torch.float32)(torch.ones(1, 16).cumsum(1))
    assert torch.equal(before, after)


@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_names_the_weight_and_the_remedy(sign: int) -> None:
    module = block()
    with torch.no_grad():
        module[0].weight[3, 4] = sign * 7e4  # type: ignore[index]
    with pytest.raises(UserError, match=r"weight 0\.weight holds 7e\+04.*--bf16 or --fp32") as caught:
        set_precision(module, torch.float16)
    assert "\n" not in str(caught.value)


def test_what_overflows_half_fits_in_bf16_and_fp32() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        module = block()
        with torch.no_grad():
            module[0].weight[3, 4] = 7e4  # type: ignore[index]
        assert set_precision(module, dtype)(torch.ones(1, 16, dtype=dtype)).isfinite().all()


def test_large_values_just_inside_half_are_taken() -> None:
    module = block()
    with torch.no_grad():
        module[0].weight[3, 4] = torch.finfo(torch.float16).max  # type: ignore[index]
    assert set_precision(module, torch.float16)[0].weight.isfinite().all()  # type: ignore[index]
