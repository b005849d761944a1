"""The frame similarity kernels against `earlytom.merge.frame_similarity`, which sums in another order: equal up to one
step of the grid."""

from __future__ import annotations

from unittest.mock import patch

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install .[plugin])")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.kernels.frame_similarity import MAX_FRAMES, SMS, frame_similarity, launches
from earlytom.merge import SIMILARITY_STEPS, plan_similarity
from earlytom.merge import frame_similarity as reference
from tests.earlytom.kernels.compiled import resources

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "after class tokens", "tokens before frames", "every other frame", "width before tokens")
KINDS = ("noise", "scenes", "still", "copies", "zeros", "large", "small")


def made(kind: str, frames: int, tokens: int, width: int, seed: int = 0) -> Tensor:
    """[F, S, D] fp32 hidden states of a made-up video."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(frames, tokens, width, generator=generator)
    if kind == "scenes":
        scene = torch.rand(frames, generator=generator).lt(0.3).cumsum(0)
        return noise[scene % frames] + 0.2 * noise
    if kind == "still":
        return noise[:1] + 0.01 * noise
    if kind == "copies":
        return noise[torch.randint(frames, (frames,), generator=generator)]
    if kind == "zeros":
        return noise * torch.rand(frames, tokens, 1, generator=generator).gt(0.5)
    return noise * {"noise": 1.0, "large": 1e4, "small": 1e-7}[kind]


def laid_out(hidden: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if layout == "after class tokens":
        return torch.cat([hidden[:, :1] + 1, hidden], dim=1)[:, 1:]
    if layout == "tokens before frames":
        return hidden.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every other frame":
        return torch.stack([hidden, hidden + 1], dim=1).flatten(0, 1)[::2]
    if layout == "width before tokens":
        return hidden.transpose(1, 2).contiguous().transpose(1, 2)
    return hidden


def assert_one_step(got: Tensor, hidden: Tensor) -> None:
    """On the grid, within a step of the reference in fp32, and symmetric.

    A GPU sums [i, j] and [j, i] in one order. The interpreter's products are the CPU's BLAS, which need not (one for an
    older processor than this one's does not), so there they may fall on two sides of a step.
    """
    want = reference(hidden.float())
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    steps = got * SIMILARITY_STEPS
    assert float((steps - steps.T).abs().max()) <= (0 if got.is_cuda else 1)
    assert torch.equal(steps, steps.round())
    assert float((steps - want * SIMILARITY_STEPS).abs().max()) <= 1


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(LAYOUTS),
    frames=st.sampled_from([1, 2, 3, 15, 16, 17]),
    tokens=st.sampled_from([1, 2, 7]),
    width=st.sampled_from([1, 7, 16, 33, 128, 130]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_reference(
    device: str, kind: str, layout: str, frames: int, tokens: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    hidden = laid_out(made(kind, frames, tokens, width, seed).to(device, dtype), layout)
    assert_one_step(frame_similarity(hidden), hidden)


@pytest.mark.parametrize(
    ("frames", "tokens", "dtype"),
    [
        (2, 327, torch.float16),
        (33, 3, torch.bfloat16),
        (65, 3, torch.float32),
        (70, 109, torch.float16),
        (MAX_FRAMES, 2, torch.float16),
    ],
)
def test_several_tokens_a_program_and_many_frames(device: str, frames: int, tokens: int, dtype: torch.dtype) -> None:
    """The last of several programs has a token less than the others."""
    hidden = made("scenes", frames, tokens, 40).to(device, dtype)
    several = launches(hidden)[0].constants["TOKENS_EACH"] > 1
    assert several == (tokens > 100)
    assert_one_step(frame_similarity(hidden), hidden)


def test_copies_are_exactly_one(device: str) -> None:
    hidden = made("noise", 6, 9, 72).to(device, torch.float16)
    hidden[4] = hidden[1]
    got = frame_similarity(hidden)
    one = torch.eye(6, device=device)
    one[1, 4] = one[4, 1] = 1
    assert torch.equal(got == 1, one == 1)
    assert torch.equal(got[1], got[4])


def test_the_plan_is_that_of_the_reference(device: str) -> None:
    for seed in range(3):
        hidden = made("scenes", 14, 5, 24, seed).to(device)
        plans = [
            plan_similarity(matrix.cpu(), frames_out, tau=0.5, max_window=6, ema=0.9, trailing="released")
            for frames_out in (None, 9)
            for matrix in (frame_similarity(hidden), reference(hidden))
        ]
        for got, want in (plans[:2], plans[2:]):
            assert torch.equal(got[0] > 0, want[0] > 0)
            assert torch.equal(got[1], want[1])
            assert torch.equal(got[2], want[2])
            assert len(torch.unique(got[1])) > 1


def test_the_mean_is_rounded_as_torch_rounds(device: str) -> None:
    """Bit for bit given the same sums: halves to even, both signs, the ends, NaN."""
    hidden = torch.empty(3, 2, 8, device="meta")
    halves = [0.5, 1.5, 2.5, -0.5, -1.5, 2**20 - 0.5, -(2**20) + 0.5]
    steps = torch.tensor([*halves, 0.49999997, float("nan")], device=device)
    shares = torch.tensor([[1.0], [1.0]], device=device)
    partial = shares * steps / SIMILARITY_STEPS  # [programs, entries], each the mean
    similarity = torch.empty(3, 3, device=device)
    launches(hidden)[1](partial, similarity)
    want = torch.round(partial.sum(0) / 2 * SIMILARITY_STEPS) / SIMILARITY_STEPS
    assert torch.equal(similarity.flatten()[:-1], want[:-1])
    assert torch.isnan(similarity[2, 2])
    assert (similarity.flatten() * SIMILARITY_STEPS)[:5].tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter, of the value
def test_what_is_not_finite_spoils_everything_as_in_the_reference(device: str, value: float) -> None:
    for frames in (1, 4):
        hidden = made("noise", frames, 3, 8).to(device)
        assert torch.isfinite(frame_similarity(hidden)).all()
        hidden[0, 1, 2] = value
        assert torch.isnan(frame_similarity(hidden)).all()
        assert torch.isnan(reference(hidden)).all()


def test_other_inputs_give_other_results(device: str) -> None:
    """Negative control: a token's direction counts, its length does not, and every token counts alike."""
    hidden = made("scenes", 5, 4, 16).to(device)
    got = frame_similarity(hidden)
    assert torch.equal(frame_similarity(4 * hidden), got)
    stretched = hidden * torch.tensor([1.0, 2.0, 4.0, 8.0], device=device)[:, None]
    assert torch.equal(frame_similarity(stretched), got)
    turned = hidden.clone()
    turned[3, 2] *= -1
    again = frame_similarity(turned)
    assert float((again[3] - got[3]).abs().max()) > 1e-2
    others = torch.tensor([0, 1, 2, 4], device=device)
    assert torch.equal(again[others][:, others], got[others][:, others])
    assert not torch.allclose(frame_similarity(hidden[:, 1:]), got, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_views_are_read_in_place(device: str, layout: str) -> None:
    hidden = laid_out(made("noise", 4, 3, 8).to(device), layout)
    with patch.object(Tensor, "contiguous", side_effect=AssertionError("a copy")):
        frame_similarity(hidden)


@pytest.mark.parametrize(
    "wrong", [torch.ones(3, 4), torch.ones(MAX_FRAMES + 1, 2, 2), torch.ones(0, 2, 2), torch.ones(3, 2, 2).double()]
)
def test_refused_tensors(wrong: Tensor) -> None:
    with pytest.raises(UserError, match=r"hidden states must be .* with 1 to 128 frames, got"):
        frame_similarity(wrong)


def test_compiled_kernels_fit_a_multiprocessor() -> None:
    """Nothing is spilled, and all programs of the first kernel run at once on an A100, as its grid assumes."""
    cases = ((32, torch.bfloat16, "*bf16"), (32, torch.float32, "*fp32"), (64, torch.float16, "*fp16"))
    pairs = [launches(torch.empty(frames, 729, 1152, dtype=dtype, device="meta")) for frames, dtype, _ in cases]
    starts = [(partial, [pointer, "*fp32"]) for (partial, _), (*_, pointer) in zip(pairs, cases, strict=True)]
    starts.append((pairs[0][1], ["*fp32", "*fp32"]))
    found = resources(starts, aligned=[True])
    assert len(found) == 2 * len(starts)
    for one in found:
        assert one.spilled == 0, one
        assert one.shared <= 80 * 1024, one
    for (start, _), one in zip(starts, found[::2], strict=True):
        assert one.capability == 80
        registers = 32 * start.num_warps * 8 * ((one.registers + 7) // 8)  # handed out in eights
        beside = min(65536 // registers, 164 * 1024 // (one.shared + 1024))
        assert beside * SMS >= start.grid[0], one
