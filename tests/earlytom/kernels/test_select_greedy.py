"""The kernel of greedy selection against `earlytom.cells.select.select_greedy`: the same tokens for any values."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install .[plugin])")

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.cells import select
from earlytom.kernels.select_greedy import MAX_TOKENS, launch, select_greedy
from tests.earlytom.kernels.compiled import resources

KINDS = ("distinct", "tied", "equal", "copies", "zeros", "not finite")


def problem(kind: str, tokens: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Saliency [M] and likeness [M, M]."""
    rng = np.random.default_rng(seed)
    salient, alike = rng.random(tokens), rng.random((tokens, tokens)) ** 3
    if kind == "tied":
        salient, alike = rng.integers(0, 3, tokens) / 4, rng.integers(0, 3, (tokens, tokens)) / 2
    elif kind == "equal":
        salient, alike = np.full(tokens, rng.choice([0.0, 0.25])), np.full((tokens, tokens), rng.choice([0.0, 0.5, 1]))
    elif kind == "copies":  # each token twice
        twin = np.arange(tokens) // 2
        salient, alike = salient[twin], np.maximum(alike[twin][:, twin], np.equal.outer(twin, twin))
    elif kind == "zeros":  # of both signs
        salient = rng.choice([0.0, -0.0], tokens)
    elif kind == "not finite":
        salient[rng.random(tokens) < 0.3] = rng.choice([np.nan, np.inf])
        alike[rng.random(alike.shape) < rng.choice([0.0, 0.2])] = np.nan
    return tuple(torch.from_numpy(x.astype(np.float32)).to(device) for x in (salient, alike))  # type: ignore[return-value]


def assert_equal_to_reference(salient: Tensor, alike: Tensor, count: int) -> None:
    taken = select_greedy(salient, alike, count)
    assert taken.dtype == torch.int64
    assert taken.tolist() == select.select_greedy(salient, alike, count).tolist()


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 33, 64])
@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(KINDS), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_selection_equals_the_reference(device: str, tokens: int, kind: str, share: float, seed: int) -> None:
    assert_equal_to_reference(*problem(kind, tokens, seed, device), 1 + round(share * (tokens - 1)))


@pytest.mark.parametrize(("tokens", "count"), [pytest.param(2744, 40, id="llava-onevision"), (1025, 17), (512, 90)])
def test_real_sizes(device: str, tokens: int, count: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 24, generator=generator).to(device)
    affine = select.affinity(x, torch.arange(tokens, device=device).float() // 64, 44)
    assert_equal_to_reference(select.saliency(x), select.likeness(affine), count)


def test_values_that_differ_in_the_last_bit_only(device: str) -> None:
    last_bits = torch.tensor([3, 0, 2, 1, 2, 3, 0, 1], dtype=torch.int32)
    salient = (torch.tensor(0.01).view(torch.int32) + last_bits).view(torch.float32).to(device)
    alike = torch.zeros(8, 8, device=device)
    for count in range(1, 9):
        assert_equal_to_reference(salient, alike, count)
    assert select_greedy(salient, alike, 3).tolist() == [0, 2, 5]


def test_views_are_read_as_they_are(device: str) -> None:
    salient, alike = problem("distinct", 20, 3, device)
    assert_equal_to_reference(salient[::2], alike.t()[::2, ::2], 6)


def test_another_likeness_gives_another_choice(device: str) -> None:
    """Negative control: one number of the matrix changed; and the row of the token taken is read, not its column."""
    salient = torch.tensor([0.9, 0.8, 0.7], device=device)
    alike = torch.eye(3, device=device)
    assert select_greedy(salient, alike, 2).tolist() == [0, 1]
    alike[1, 0] = 1
    assert select_greedy(salient, alike, 2).tolist() == [0, 1]
    alike[0, 1] = 1
    assert select_greedy(salient, alike, 2).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("tokens", "count", "message"),
    [
        (MAX_TOKENS + 1, 1, f"takes 1 to {MAX_TOKENS} tokens, got {MAX_TOKENS + 1}"),
        (4, 0, "count must be between 1 and 4"),
        (4, 5, "count must be between 1 and 4"),
    ],
)
def test_refused_sizes(tokens: int, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_greedy(torch.zeros(tokens), torch.zeros(1, 1).expand(tokens, tokens), count)


def test_refused_tensors() -> None:
    salient, alike = torch.zeros(4), torch.zeros(4, 4)
    for wrong in ((salient[0], alike), (salient, alike[0]), (salient[:3], alike), (salient, alike.half())):
        with pytest.raises(UserError, match="saliency must be fp32"):
            select_greedy(*wrong, 2)


def test_compiled_kernels_keep_all_values_in_registers() -> None:
    """Ahead of time for the A100 and the H100, for tensors of any alignment: nothing is spilled, one block fits a
    multiprocessor, and no sum or product is fused."""
    starts = [(launch(*size), ["*fp32", "*fp32", "*i64"]) for size in ((14 * 196, 630), (175, 42), (MAX_TOKENS, 630))]
    for one, (start, _) in zip(resources(starts, aligned=[False]), [s for s in starts for _ in range(2)], strict=True):
        assert one.spilled == 0, one
        assert one.shared <= 2048, one
        assert one.registers * 32 * start.num_warps <= 65536, one
        assert not one.loose, one
