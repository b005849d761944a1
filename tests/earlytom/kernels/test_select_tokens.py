"""The selection kernel against `earlytom.select.select_fixed`: the same tokens, to the bit, and the same positions."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install .[plugin])")

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.kernels.select_tokens import launch, select_tokens
from earlytom.select import keep_mask, select_fixed, window_of_cell
from tests.earlytom.kernels.compiled import resources

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("distinct", "tied", "equal", "signed", "peaked", "not finite")

# (P, k): one token, all, windows of equal and of two sizes, one place, a warp and a bit; powers of two and not.
SHAPES = ((1, 1), (2, 1), (5, 5), (7, 3), (16, 4), (9, 8), (12, 1), (33, 14))


def random_received(kind: str, frames: int, per_frame: int, rng: np.random.Generator) -> Tensor:
    """[F', P] fp32."""
    shape = (frames, per_frame)
    if kind == "distinct":
        values = rng.random(shape)
    elif kind == "tied":
        values = rng.integers(0, 3, shape) / 4
    elif kind == "equal":
        values = np.full(shape, rng.choice([0.0, 0.25, -1.0]))
    elif kind == "signed":
        values = rng.integers(-2, 3, shape) / 2 * rng.choice([-1.0, 1.0], shape)  # both zeros
    elif kind == "peaked":  # numbers of every size
        values = np.exp2(rng.integers(-12, 12, shape))
    else:
        values = rng.integers(-1, 2, shape).astype(np.float64)
        hit = rng.random(shape) < rng.choice([0.1, 0.5, 1.0])
        values[hit] = rng.choice([np.nan, np.nan, np.inf, -np.inf], hit.sum())
    return torch.from_numpy(values.astype(np.float32))


def assert_equal_to_reference(features: Tensor, received: Tensor, static: Tensor, places: int) -> None:
    tokens, positions = select_tokens(features, received, static, places)
    want_tokens, want_positions = select_fixed(features, received, static, places)
    assert positions.dtype == torch.int64
    assert positions.tolist() == want_positions.tolist()
    assert tokens.dtype == features.dtype
    assert torch.equal(tokens, want_tokens)


@pytest.mark.parametrize(("per_frame", "places"), SHAPES)
@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    static=st.lists(st.booleans(), min_size=2, max_size=2),
    dtype=st.sampled_from(DTYPES),
    relevance=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_selection_equals_the_reference(
    device: str,
    per_frame: int,
    places: int,
    kind: str,
    static: list[bool],
    dtype: torch.dtype,
    relevance: torch.dtype,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.standard_normal((len(static), per_frame, 6))).to(device, dtype)
    received = random_received(kind, len(static), per_frame, rng).to(device, relevance)
    assert_equal_to_reference(features, received, torch.tensor(static, device=device), places)


@pytest.mark.parametrize("width", [1, 3, 8, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_is_copied_whole(device: str, width: int, dtype: torch.dtype) -> None:
    """Also in several pieces, from and to addresses that are not those of whole words, and with every bit kept."""
    generator = torch.Generator().manual_seed(width)
    for offset in (0, 1):
        bits = torch.randint(-(2**15), 2**15, (2 * 5 * width + offset,), generator=generator)
        stored = bits.to(torch.int16).view(dtype) if dtype.itemsize == 2 else bits.float()
        features = stored.to(device)[offset:].view(2, 5, width)
        received = torch.rand(2, 5, generator=generator).to(device)
        static = torch.tensor([True, False], device=device)
        tokens, positions = select_tokens(features, received, static, 2)
        want = features.flatten(0, 1)[select_fixed(features, received, static, 2)[1]]
        assert torch.equal(_bits(tokens), _bits(want))
        assert len(positions) == 4


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.dtype.itemsize == 2 else torch.int32)


def test_a_token_longer_than_a_piece(device: str) -> None:
    width = 2 * launch(1, 3, 10**6, 2).constants["COLUMNS"] + 8
    features = torch.arange(3 * width, dtype=torch.float32, device=device).view(1, 3, width)
    received = torch.tensor([[0.5, 0.1, 0.3]], device=device)
    tokens, positions = select_tokens(features, received, torch.tensor([False], device=device), 2)
    assert positions.tolist() == [0, 2]
    assert torch.equal(tokens, features[0, [0, 2]])


@pytest.mark.parametrize(
    ("frames", "per_frame", "places"),
    [
        pytest.param(2, 196, 46, id="llava-onevision"),
        pytest.param(2, 1024, 300, id="largest"),
        pytest.param(1, 1024, 1, id="one-of-many"),
    ],
)
def test_real_sizes(device: str, frames: int, per_frame: int, places: int) -> None:
    rng = np.random.default_rng(places)
    features = torch.arange(frames * per_frame * 4, dtype=torch.float32, device=device).view(frames, per_frame, 4)
    received = random_received("tied", frames, per_frame, rng) + random_received("peaked", frames, per_frame, rng)
    static = torch.arange(frames) % 2 == 1
    assert_equal_to_reference(features, received.to(device), static.to(device), places)


def test_values_that_differ_in_the_last_bit_only(device: str) -> None:
    """The search ends at the last bit, not before."""
    last_bits = torch.tensor([3, 0, 2, 1, 2, 3, 0, 1], dtype=torch.int32)
    received = (torch.tensor(0.01).view(torch.int32) + last_bits).view(torch.float32)[None].to(device)
    features = torch.arange(8.0, device=device).view(1, 8, 1)
    static = torch.tensor([False], device=device)
    for places in range(1, 9):
        assert_equal_to_reference(features, received, static, places)
    assert select_tokens(features, received, static, 3)[1].tolist() == [0, 2, 5]


def test_both_zeros_are_one_value(device: str) -> None:
    for dtype in DTYPES:
        received = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0, -2.0]], device=device, dtype=dtype)
        features = torch.zeros(1, 6, 1, device=device)
        for static in (False, True):
            for places in (1, 2, 3):
                assert_equal_to_reference(features, received, torch.tensor([static], device=device), places)
        assert select_tokens(features, received, torch.tensor([False], device=device), 1)[1].tolist() == [1]


def test_views_are_read_as_they_are(device: str) -> None:
    rng = np.random.default_rng(3)
    features = torch.from_numpy(rng.standard_normal((4, 9, 3)).astype(np.float32)).to(device).transpose(0, 2)
    received = torch.from_numpy(rng.random((9, 3)).astype(np.float32)).to(device).t()
    static = torch.tensor([True, False, False, True, False, True], device=device)[::2]
    assert not features.is_contiguous()
    assert_equal_to_reference(features, received, static, 4)


def test_another_input_gives_another_selection(device: str) -> None:
    """Negative control: the comparisons above see one swapped token, and the two rules apart."""
    features = torch.arange(9.0, device=device).view(1, 9, 1)
    received = torch.tensor([[9.0, 8.0, 7.0, 1.0, 2.0, 3.0, 4.0, 6.0, 5.0]], device=device)
    static = torch.tensor([False], device=device)
    _, positions = select_tokens(features, received, static, 3)
    assert positions.tolist() == [0, 1, 2]
    received[0, 3] = 7.5
    assert select_tokens(features, received, static, 3)[1].tolist() == [0, 1, 3]
    assert select_tokens(features, received, ~static, 3)[1].tolist() == [0, 3, 7]


def test_more_nan_than_places(device: str) -> None:
    """What the reference does with NaN, spelled out: they all stay, and the first k of what stays are taken."""
    nan = float("nan")
    received = torch.tensor([[0.1, nan, 0.9, nan, nan, 0.5]], device=device)
    static = torch.tensor([False], device=device)
    assert keep_mask(received.cpu(), static.cpu(), 2, 2)[0].tolist() == [False, True, True, True, True, True]
    features = torch.zeros(1, 6, 1, device=device)
    assert select_tokens(features, received, static, 2)[1].tolist() == [1, 2]
    assert_equal_to_reference(features, received, static, 2)


def test_one_launch_covers_every_place() -> None:
    """Programs together have a row for each place and no row of another program's."""
    for frames, per_frame, places in [(14, 196, 46), (1, 1, 1), (128, 1024, 1024), (3, 7, 5)]:
        start = launch(frames, per_frame, 3584, places)
        rows = start.constants["ROWS"]
        assert start.grid[0] == frames
        assert start.grid[1] * rows >= places > (start.grid[1] - 1) * rows


def test_windows_are_those_of_the_reference() -> None:
    """Widest window, as the kernel's block has to hold it."""
    for per_frame, places in [*SHAPES, (196, 46), (1024, 1023)]:
        widest = int(window_of_cell(per_frame, places).bincount().max())
        block = launch(1, per_frame, 8, places).constants["WIDEST"]
        assert block >= widest > block // 2


@pytest.mark.parametrize(
    ("shape", "places", "message"),
    [
        ((2, 1025, 4), 1, "1 to 1024 tokens"),
        ((0, 4, 4), 1, "a frame or more"),
        ((2, 4, 4), 0, "places must be between 1 and 4"),
        ((2, 4, 4), 5, "places must be between 1 and 4"),
    ],
)
def test_refused_sizes(shape: tuple[int, int, int], places: int, message: str) -> None:
    frames, per_frame, _ = shape
    with pytest.raises(UserError, match=message):
        select_tokens(torch.zeros(shape), torch.zeros(frames, per_frame), torch.zeros(frames, dtype=torch.bool), places)


def test_refused_tensors() -> None:
    features, received, static = torch.zeros(2, 4, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool)
    for wrong in (
        (features[0], received, static),
        (features, received[:1], static),
        (features, received, static[:1]),
        (features.double(), received, static),
        (features, received.double(), static),
        (features, received, static.long()),
    ):
        with pytest.raises(UserError, match="features must be"):
            select_tokens(*wrong, 2)


def test_compiled_kernels_fit_a_multiprocessor() -> None:
    """Ahead of time for the A100 and the H100, for tensors of any alignment (as in a plugin) and for aligned ones:
    nothing is spilled, and shared memory stays below what a kernel has without asking for more."""
    sizes = [((14, 196, 3584, 46), "*fp16"), ((14, 196, 3584, 196), "*fp32"), ((14, 1024, 3584, 240), "*bf16")]
    starts = [(launch(*size), [kind, "*fp32", "*i1", kind, "*i64"]) for size, kind in sizes]
    found = resources(starts, aligned=[False]) + resources(starts[:1], aligned=[True])
    assert [one.aligned for one in found] == [False] * 6 + [True] * 2
    for one in found:
        assert one.spilled == 0, one
        assert one.shared <= 48 * 1024, one
        assert one.registers <= 128, one
        assert max(one.stores) == (16 if one.aligned else 8), one
