"""The frame plan kernel against `earlytom.merge.plan_similarity` on the same similarity matrix: decisions are equal bit
for bit (which frames a row is made of, segments, count), weights up to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install .[plugin])")

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from earlytom import UserError
from earlytom.kernels.frame_plan import MAX_FRAMES, frame_plan, launch
from earlytom.merge import SIMILARITY_STEPS, frame_similarity, plan_similarity, segments_of, static_frames
from tests.earlytom.kernels.compiled import resources

GOLDEN = Path(__file__).parents[2] / "golden" / "earlytom"

SETTINGS: tuple[dict[str, Any], ...] = (
    {"tau": 0.8, "ema": 0.9, "max_window": 6, "trailing": "released"},
    {"tau": 0.3, "ema": 0.3, "max_window": 9, "trailing": "keep"},
    {"tau": -1.0, "ema": 1.0, "max_window": 12, "trailing": "released"},
    {"tau": 0.5, "ema": 0.75, "max_window": 5, "trailing": "keep"},
    {"tau": 0.65, "ema": 0.05, "max_window": 7, "trailing": "released"},
    {"tau": 0.0, "ema": 0.6, "max_window": 1, "trailing": "keep"},
)
DEFAULT = SETTINGS[0]

# F and F', None for the adaptive schedule.
SIZES = ((4, 3), (7, 5), (8, None), (11, 8), (13, 4), (16, 15), (16, None))


def symmetric(values: np.ndarray[Any, Any]) -> Tensor:
    """[F, F] fp32 from what lies above the diagonal, ones on it."""
    upper = np.triu(values, 1)
    return torch.from_numpy((upper + upper.T + np.eye(len(values))).astype(np.float32))


def matrices(frames: int) -> st.SearchStrategy[Tensor]:
    """Similarities of `frames` frames, on grids so coarse that most are tied, or on the reference's own, or on none."""
    grids = [
        st.sampled_from([0.5, 1.0]),
        st.integers(1, 4).map(lambda n: n / 4),
        st.integers(-4, 16).map(lambda n: n / 16),
        st.integers(-(2**20), 2**20).map(lambda n: n / SIMILARITY_STEPS),
        st.floats(0.75, 1, width=32),
    ]
    return (
        st.sampled_from(grids).flatmap(lambda c: arrays.arrays(np.float32, (frames, frames), elements=c)).map(symmetric)
    )


def drawn(frames: int, seed: int) -> Tensor:
    """Like `matrices`, by a seed; odd ones fall with the distance in time, as those of a video do."""
    rng = np.random.default_rng(seed)
    steps = float(rng.choice([4, 16, 2**20]))
    if seed % 2:
        index = np.arange(frames)
        scene = (rng.random(frames) < 0.2).cumsum()
        values = 1 - 0.02 * abs(index[:, None] - index) - 0.1 * rng.random((frames, frames))
        values -= 0.5 * (scene[:, None] != scene)
    else:
        values = rng.uniform(rng.choice([-1.0, 0.0, 0.5]), 1, (frames, frames))
    return symmetric(np.round(values * steps) / steps)


def difference(similarity: Tensor, frames_out: int | None, device: str, **options: Any) -> str:
    """Where the kernel's plan is not the reference's; empty if it is."""
    weights, static, start, count = (x.cpu() for x in frame_plan(similarity.to(device), frames_out, **options))
    want, want_start, want_end = plan_similarity(similarity, frames_out, **options)
    kept = len(want)
    own, padding = weights[:kept], weights[kept:]
    differs = {
        "segments": not torch.equal(start, want_start),
        "static": not torch.equal(static, static_frames(want_start, want_end)),
        "count": count.shape != () or int(count) != kept,
        "rows": list(weights.shape) != [frames_out or len(similarity), len(similarity)] or bool(padding.any()),
        "made of": not torch.equal(own != 0, want != 0),
        "weights": not torch.allclose(own, want, rtol=0, atol=1e-6, equal_nan=True),
    }
    return ", ".join(name for name, wrong in differs.items() if wrong)


# --- equal to the reference


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8, 12])
def test_every_budget_and_the_adaptive_schedule(device: str, frames: int) -> None:
    for n, frames_out in enumerate([None, *range(1, frames + 1)]):
        for seed in range(3):
            options = SETTINGS[(n + seed) % len(SETTINGS)]
            assert not difference(drawn(frames, seed + 3 * n), frames_out, device, **options), (frames_out, seed)


@pytest.mark.parametrize(("frames", "frames_out"), SIZES)
@pytest.mark.parametrize("trailing", ["released", "keep"])
def test_plan_equals_the_reference(device: str, frames: int, frames_out: int | None, trailing: str) -> None:
    choices = [one for one in SETTINGS if one["trailing"] == trailing]

    @settings(max_examples=12, deadline=None)
    @given(similarity=matrices(frames), options=st.sampled_from(choices))
    def equal(similarity: Tensor, options: dict[str, Any]) -> None:
        assert not difference(similarity, frames_out, device, **options)

    equal()


@pytest.mark.parametrize(
    ("frames", "frames_out"),
    [
        pytest.param(32, 24, id="first-merge"),
        pytest.param(24, 18, id="second"),
        pytest.param(18, 14, id="third"),
        pytest.param(14, 14, id="final"),
        pytest.param(33, None, id="past-a-power-of-two"),
        pytest.param(MAX_FRAMES, 96, id="largest"),
        pytest.param(MAX_FRAMES, None, id="largest-adaptive"),
    ],
)
def test_real_sizes(device: str, frames: int, frames_out: int | None) -> None:
    for seed in (1, 4):
        assert not difference(drawn(frames, seed), frames_out, device, **DEFAULT)
    long = DEFAULT | {"tau": 0.2, "max_window": frames}  # segments of many frames, and walks of few
    assert not difference(drawn(frames, 5), frames_out, device, **long)


def test_the_cases_reach_every_decision() -> None:
    """What the comparisons above would be blind to if it never came up: the reference's plans have all of it."""
    lengths: set[int] = set()
    pairs = dropped = folded = 0
    for n in range(60):
        frames, options = 12, SETTINGS[n // 2 % len(SETTINGS)]
        similarity = drawn(frames, n)
        plan, start, _ = plan_similarity(similarity, None, **options)
        lengths |= {last - first + 1 for first, last in segments_of(start).tolist()}
        pairs += int(((plan > 0) & (plan < 1)).any(1).sum())
        dropped += int((plan.sum(0) == 0).sum())
        budget, _, _ = plan_similarity(similarity, 6, **options)
        folded += int(((budget > 0).sum(1) > 2).sum())
    assert lengths >= {*range(1, 7), 11}  # 11 is the most that these settings allow
    assert min(pairs, dropped, folded) > 20


def _golden() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "temporal.json").read_text())


@pytest.mark.parametrize("case", _golden(), ids=lambda case: f"{case['case']}-{case['kind']}")
def test_released_code_merges_alike(device: str, case: dict[str, Any]) -> None:
    with np.load(GOLDEN / "temporal.npz") as vectors:
        hidden, want = (torch.from_numpy(vectors[f"t{case['case']}_{name}"]) for name in ("hidden", "out_hidden"))
    options = {key: case[key] for key in ("tau", "max_window", "ema")}
    weights, _, _, count = frame_plan(frame_similarity(hidden).to(device), None, **options, trailing="released")
    merged = weights.cpu()[: int(count)] @ hidden.flatten(1)
    assert len(merged) == case["frames_out"]
    assert torch.allclose(merged, want.flatten(1), rtol=0, atol=1e-5)


# --- where one rounding more or less would decide otherwise


def fused(a: np.float32, b: np.float32, c: np.float32) -> float:
    """a * b + c with one rounding to fp32, of fp32 numbers (exact in double up to the sum)."""
    return float(np.float32(float(a) * float(b) + float(c)))


def test_products_and_sums_are_rounded_one_by_one(device: str) -> None:
    """tau is the running similarity itself, as PyTorch rounds it: frame 2 is in the segment. With a fused multiply-add,
    whichever product it takes in, the similarity comes out lower and the frame is not."""
    rng = np.random.default_rng(0)
    found = 0
    while found < 4:
        far, near, ema = np.sort(rng.uniform(0.5, 1, 3).astype(np.float32))
        rest = np.float32(1 - float(ema))
        running = ema * near + rest
        tau = float(ema * far + rest * running)
        if max(fused(ema, far, rest * running), fused(rest, running, ema * far)) >= tau:
            continue
        found += 1
        values = np.ones((3, 3))
        values[0, 1], values[0, 2] = near, far
        options: dict[str, Any] = {"tau": tau, "ema": float(ema), "max_window": 6, "trailing": "keep"}
        assert not difference(symmetric(values), None, device, **options)
        _, _, start, _ = frame_plan(symmetric(values).to(device), None, **options)
        assert start.tolist() == [0, 0, 0]


@pytest.mark.parametrize("tau", [0.8, 0.1, 0.3, 0.7])
def test_tau_is_compared_in_single_precision(device: str, tau: float) -> None:
    """In double precision, 0.8 is above the fp32 number nearest to it, and 0.3 below."""
    options: dict[str, Any] = {"tau": tau, "ema": 1.0, "max_window": 6, "trailing": "keep"}
    at = np.float32(tau)
    for similarity, segments in ((at, [0, 0]), (np.nextafter(at, np.float32(-1)), [0, 1])):
        c = symmetric(np.full((2, 2), similarity))
        assert frame_plan(c.to(device), None, **options)[2].tolist() == segments
        assert not difference(c, None, device, **options)


# --- similarities that are no numbers


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of inf / inf
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 1), (3, 4), (5, 5), (6, 2), (0, 6)])
def test_broken_similarities_in_a_budget(device: str, broken: float, place: tuple[int, int]) -> None:
    similarity = drawn(7, 1)
    similarity[place] = broken
    assert not difference(similarity, 5, device, **DEFAULT)
    assert not difference(similarity, 7, device, **DEFAULT)
    weights = frame_plan(similarity.to(device), 5, **DEFAULT)[0]
    assert bool(weights.isnan().all()) == (broken != float("-inf"))


@pytest.mark.parametrize("seed", range(8))
def test_nan_in_the_adaptive_schedule(device: str, seed: int) -> None:
    similarity = drawn(9, seed)
    hit = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed)) < 0.3
    similarity[hit] = float("nan")
    for options in SETTINGS[:2]:
        assert not difference(similarity, None, device, **options)


# --- calling it


def test_a_view_is_read_as_it_is(device: str) -> None:
    similarity = drawn(7, 1)
    similarity[2:] *= 0.9  # no longer symmetric
    assert not difference(similarity.t(), 5, device, **DEFAULT)
    assert difference_between(similarity, similarity.t().contiguous(), 5, device)


def test_without_bounds_the_rest_is_the_same(device: str) -> None:
    """As the TensorRT plugin starts it: three tensors."""
    similarity = drawn(11, 1).to(device)
    for frames_out in (8, 11, None):
        weights, static = (
            torch.empty(frames_out or 11, 11, device=device),
            torch.empty(11, dtype=torch.bool, device=device),
        )
        start = launch(11, frames_out, **DEFAULT, bounds=False)
        assert start.grid == (1, 1, 1)
        start(similarity, weights, static)
        want = frame_plan(similarity, frames_out, **DEFAULT)
        assert torch.equal(weights, want[0])
        assert torch.equal(static, want[1])


def difference_between(one: Tensor, other: Tensor, frames_out: int | None, device: str) -> bool:
    """Whether the kernel's plans of two matrices differ in a decision."""
    first, second = (frame_plan(c.to(device), frames_out, **DEFAULT)[0] for c in (one, other))
    return not torch.equal(first != 0, second != 0)


def test_another_similarity_gives_another_plan(device: str) -> None:
    """Negative control: the comparisons above see a changed similarity and the other trailing rule."""
    similarity = symmetric(np.full((7, 7), 0.9))
    changed = similarity.clone()
    changed[1, 2] = changed[2, 1] = 0.95
    for frames_out in (5, None):
        assert difference_between(similarity, changed, frames_out, device)
    long = DEFAULT | {"max_window": 9}
    assert not difference(similarity, None, device, **long)
    released, kept = (
        plan_similarity(similarity, None, **long | {"trailing": rule})[0] for rule in ("released", "keep")
    )
    assert len(released) < len(kept)


@pytest.mark.parametrize(
    ("frames", "frames_out", "change", "message"),
    [
        (0, None, {}, "1 to 128 frames"),
        (129, 4, {}, "1 to 128 frames"),
        (4, 0, {}, "frames_out must be between 1 and 4"),
        (4, 5, {}, "frames_out must be between 1 and 4"),
        (4, 3, {"trailing": "drop"}, "trailing must be one of"),
    ],
)
def test_refused_settings(frames: int, frames_out: int | None, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        frame_plan(torch.ones(frames, frames), frames_out, **DEFAULT | change)


@pytest.mark.parametrize("wrong", [torch.ones(3, 4), torch.ones(3), torch.ones(3, 3).half(), torch.ones(3, 3).double()])
def test_refused_matrices(wrong: Tensor) -> None:
    with pytest.raises(UserError, match="similarity must be fp32"):
        frame_plan(wrong, None, **DEFAULT)


# --- compiled ahead of time, which the interpreter cannot do: in a process of its own


def test_compiled_kernels_fit_a_multiprocessor() -> None:
    """Nothing is spilled, shared memory stays below what a kernel has without asking for more, and every product and
    sum says how it rounds, so that nobody fuses them."""
    sizes = [(32, 24), (18, 14), (MAX_FRAMES, 96), (MAX_FRAMES, None)]
    starts = [(launch(*size, **DEFAULT, bounds=False), ["*fp32", "*fp32", "*i1"]) for size in sizes]
    found = resources(starts, aligned=[False])
    assert len(found) == 2 * len(sizes)
    for one in found:
        assert one.spilled == 0, one
        assert one.shared <= 48 * 1024, one
        assert one.registers <= 200, one
        assert one.loose == [], one
