"""The received attention kernels against `earlytom.attention` in fp32 on the same numbers."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install .[plugin])")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.attention import attention_matrix, column_means
from earlytom.kernels.received_attention import launches, received_attention, width_blocks
from tests.earlytom.kernels.compiled import resources

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Shape = tuple[int, int, int, int]
LAYOUTS = ("tokens before heads", "heads before tokens", "packed", "every other frame", "width before tokens")


def drawn(layout: str, shape: Shape, dtype: torch.dtype, device: str, seed: int, spread: float = 1.0) -> Tensor:
    """[F, H, T, d] normal numbers, as queries and keys lie in memory in one model or another."""
    frames, heads, tokens, width = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return (spread * torch.randn(size, generator=generator)).to(device, dtype)

    if layout == "tokens before heads":
        return draw(frames, tokens, heads, width).transpose(1, 2)
    if layout == "packed":
        return draw(frames, tokens, 3, heads, width)[:, :, 1].transpose(1, 2)
    if layout == "every other frame":
        return draw(2 * frames, heads, tokens, width)[::2]
    if layout == "width before tokens":
        return draw(frames, heads, width, tokens).transpose(2, 3)
    return draw(frames, heads, tokens, width)


def pair(shape: Shape, dtype: torch.dtype, device: str, layout: str = "tokens before heads") -> tuple[Tensor, Tensor]:
    return drawn(layout, shape, dtype, device, 0), drawn(layout, shape, dtype, device, 1)


def reference(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return column_means(attention_matrix(query.float(), key.float(), scale))


def assert_close(got: Tensor, want: Tensor) -> None:
    """Within 5e-5 of each token's share, and sums of one."""
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert torch.allclose(got, want, rtol=5e-5, atol=1e-8)
    assert torch.allclose(got.sum(1), torch.ones_like(got[:, 0]), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    frames=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 5, 31, 32, 33, 70]),
    width=st.sampled_from([8, 16, 72]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 2**32 - 2),
)
def test_equals_the_reference(
    device: str,
    layouts: tuple[str, str],
    frames: int,
    heads: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    spread: float,
    seed: int,
) -> None:
    shape = (frames, heads, tokens, width)
    query, key = (drawn(layout, shape, dtype, device, seed + n, spread) for n, layout in enumerate(layouts))
    scale = width**-0.5
    assert_close(received_attention(query, key, scale), reference(query, key, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 40, 80])
def test_several_blocks_of_halves_and_other_widths(device: str, dtype: torch.dtype, width: int) -> None:
    query, key = pair((1, 2, 135, width), dtype, device)
    rows, columns = launches(query, key, 0.2)
    assert rows.grid[0] > 1
    assert columns.grid[0] > 2
    assert_close(received_attention(query, key, 0.2), reference(query, key, 0.2))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of keys past the end, not stored
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_stay_finite(device: str, dtype: torch.dtype) -> None:
    """Logits of plus and minus 1e4: a query divides its attention among the keys of its own sign."""
    signs = torch.tensor([1, 1, 1, 1, 1, -1, -1, -1], device=device)
    vectors = (25.0 * signs[None, None, :, None]).expand(1, 2, 8, 16).to(dtype)
    got = received_attention(vectors, vectors, 1.0)
    assert torch.isfinite(got).all()
    assert torch.allclose(got, torch.full_like(got, 1 / 8), rtol=5e-4)
    # All keys of a sign: the largest logit of some rows is -1e4.
    keys = vectors[:, :, :1].expand_as(vectors)
    assert torch.allclose(received_attention(vectors, keys, 1.0), torch.full_like(got, 1 / 8), rtol=5e-4)
    # Only one key of a sign: it takes all that queries of its sign give.
    signs[:] = torch.tensor([-1, 1, 1, 1, 1, 1, 1, 1], device=device)
    lonely = (25.0 * signs[None, None, :, None]).expand(1, 2, 8, 16).to(dtype)
    got = received_attention(vectors, lonely, 1.0)
    assert torch.allclose(got[0, 0], torch.tensor(3 / 8, device=device), rtol=5e-4)
    assert torch.allclose(got[0, 1:], torch.tensor(5 / 8 / 7, device=device), rtol=5e-4)


@pytest.mark.parametrize("level", [-40.0, 0.0, 40.0])
def test_a_row_of_equal_logits_is_shared_alike(device: str, level: float) -> None:
    """Keys past the end, zero in the tile, take nothing, though their logit may be the largest or the lowest of all."""
    query = torch.full((2, 1, 37, 8), level / 8, device=device)
    got = received_attention(query, torch.ones_like(query), 1.0)
    assert torch.allclose(got, torch.full_like(got, 1 / 37), rtol=2e-6)


def test_a_frame_is_the_same_bits_alone_and_among_others(device: str) -> None:
    query, key = pair((3, 2, 40, 72), torch.float16, device)
    together = received_attention(query, key, 0.1)
    assert torch.equal(together, received_attention(query, key, 0.1))
    for frame in range(3):
        only = slice(frame, frame + 1)
        assert torch.equal(received_attention(query[only], key[only], 0.1), together[only])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter, of the NaN
def test_a_nan_stays_in_its_frame(device: str) -> None:
    query, key = pair((3, 2, 40, 8), torch.float32, device)
    clean = received_attention(query, key, 0.3)
    for spoilt in (query, key):
        kept = spoilt[1, 1, 3, 5].clone()
        spoilt[1, 1, 3, 5] = float("nan")
        got = received_attention(query, key, 0.3)
        assert torch.isnan(got[1]).all()
        assert torch.isnan(reference(query, key, 0.3)[1]).all()
        assert torch.equal(got[::2], clean[::2])
        spoilt[1, 1, 3, 5] = kept


def test_other_inputs_give_other_results(device: str) -> None:
    """Negative control: what is given is not what is received, and one query, one key or the scale matter."""
    query, key = pair((2, 2, 20, 16), torch.float32, device)
    got = received_attention(query, key, 0.25)
    assert not torch.allclose(got, reference(key, query, 0.25), rtol=1e-3)
    assert not torch.allclose(got, reference(query, key, 0.3), rtol=1e-3)
    for changed in (query, key):
        before = changed[1, 0, 7].clone()
        changed[1, 0, 7] += 2
        again = received_attention(query, key, 0.25)
        assert torch.equal(again[0], got[0])
        assert not torch.allclose(again[1], got[1], rtol=1e-3)
        changed[1, 0, 7] = before


def test_no_memory_that_grows_with_the_square_of_the_tokens(device: str) -> None:
    sizes = []
    for tokens in (128, 256):
        query, key = pair((1, 1, tokens, 8), torch.float16, device)
        with patch("torch.empty", wraps=torch.empty) as empty:
            received_attention(query, key, 0.3)
        sizes.append(sum(torch.Size(call.args).numel() for call in empty.call_args_list))
    assert sizes == [2 * 128, 2 * 256]


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_views_are_read_in_place(device: str, layout: str) -> None:
    query, key = pair((2, 2, 5, 8), torch.float32, device, layout)
    with patch.object(Tensor, "contiguous", side_effect=AssertionError("a copy")):
        received_attention(query, key, 0.3)


def test_blocks_cover_a_head_with_as_few_columns_as_powers_of_two_allow() -> None:
    assert [width_blocks(width) for width in (1, 8, 16, 17, 56, 64, 72, 80, 88, 96, 128)] == [
        (16, 0),
        (16, 0),
        (16, 0),
        (32, 0),
        (64, 0),
        (64, 0),
        (64, 16),
        (64, 16),
        (64, 32),
        (64, 32),
        (128, 0),
    ]
    powers = (16, 32, 64, 128, 256)
    for width in range(1, 257):
        block, tail = width_blocks(width)
        assert block in powers
        assert tail in (0, *powers)
        least = min(first + second for first in powers for second in (0, *powers) if first + second >= width)
        assert width <= block + tail == least


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 3, 8)}, "must be alike"),
        ({"key": torch.ones(2, 2, 4, 8)}, r"got torch.float32 \[2, 2, 3, 8\] and torch.float32 \[2, 2, 4, 8\]"),
        ({"key": torch.ones(2, 2, 3, 8).half()}, "must be alike"),
        ({"query": torch.ones(2, 2, 3, 8).double(), "key": torch.ones(2, 2, 3, 8).double()}, "fp16, bf16 or fp32"),
        ({"scale": 0.0}, "scale must be above zero, got 0.0"),
        ({"scale": float("nan")}, "scale must be above zero, got nan"),
    ],
)
def test_refused_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"query": torch.ones(2, 2, 3, 8), "key": torch.ones(2, 2, 3, 8), "scale": 0.3}
    with pytest.raises(UserError, match=message):
        received_attention(**(arguments | change))


def test_compiled_kernels_fit_a_multiprocessor() -> None:
    """At SigLIP's size nothing is spilled, and there is room for two programs or more beside each other."""
    starts = []
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        query = torch.empty(18, 729, 16, 72, dtype=dtype, device="meta").transpose(1, 2)
        rows, columns = launches(query, query, 72**-0.5)
        starts += [(rows, [pointer, pointer, "*fp32"]), (columns, [pointer, pointer, "*fp32", "*fp32"])]
    found = resources(starts, aligned=[True])
    assert len(found) == 2 * len(starts)
    for one in found:
        assert one.spilled == 0, one
        assert one.shared <= 80 * 1024, one
        assert one.registers <= 168, one
