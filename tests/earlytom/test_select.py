"""Stage II: which tokens stay, against a naive reference, for both schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from earlytom import UserError, select_tokens, token_count
from earlytom.select import keep_mask, select_fixed, window_of_cell
from tests.earlytom.reference import select_positions, windows

SCHEDULES = ("adaptive", "budget")


def random_segments(frames: int, rng: np.random.Generator) -> list[list[int]]:
    first = [0, *(i for i in range(1, frames) if rng.random() < rng.choice([0.1, 0.4]))]
    return [[a, b - 1] for a, b in zip(first, [*first[1:], frames], strict=True)]


def random_received(frames: int, per_frame: int, rng: np.random.Generator) -> Tensor:
    """[F', P]: distinct, with many ties, all equal, or with a few tokens that take everything."""
    shape = (frames, per_frame)
    kind = rng.integers(4)
    if kind == 0:
        values = rng.random(shape)
    elif kind == 1:
        values = rng.integers(0, 4, shape) / 4
    elif kind == 2:
        values = np.full(shape, 0.25)
    else:
        values = rng.random(shape) * 1e-3 + (rng.random(shape) < 0.05)
    return torch.from_numpy(values.astype(np.float32))


def random_cases(count: int, seed: int) -> Iterator[tuple[Tensor, list[list[int]], dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        frames, per_frame = int(rng.integers(1, 20)), int(rng.choice([1, 2, 4, 9, 16, 25, 49]))
        options = {
            "frames_in": frames + int(rng.integers(0, 20)),
            "ratio": float(rng.choice([rng.uniform(0.001, 1), 1.0, 0.5, 0.25, 0.1])),
        }
        yield random_received(frames, per_frame, rng), random_segments(frames, rng), options


def cells(received: Tensor) -> Tensor:
    """[F', P, 1] features that say where they came from."""
    return torch.arange(received.numel(), dtype=torch.float32).view(*received.shape, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_selection_equals_the_naive_reference(schedule: str) -> None:
    static = 0
    for received, segments, options in random_cases(1200, seed=1):
        tokens, positions = select_tokens(
            cells(received), received, torch.tensor(segments), **options, schedule=schedule
        )
        want = select_positions(received.tolist(), segments, **options, schedule=schedule)
        assert positions.tolist() == want, (received.shape, segments, options)
        assert torch.equal(tokens[:, 0], positions.float())
        static += sum(max(0, last - first - 1) for first, last in segments)
    assert static > 1000


def test_the_schedules_differ() -> None:
    """Negative control: the comparison tells them apart."""
    differing = 0
    for received, segments, options in random_cases(200, seed=2):
        _, positions = select_tokens(cells(received), received, torch.tensor(segments), **options)
        differing += positions.tolist() != select_positions(received.tolist(), segments, **options, schedule="budget")
    assert differing > 10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order_range_and_counts(schedule: str) -> None:
    for received, segments, options in random_cases(300, seed=3):
        frames, per_frame = received.shape
        tokens, positions = select_tokens(
            cells(received), received, torch.tensor(segments), **options, schedule=schedule
        )
        assert positions.dtype == torch.int64
        assert bool((positions.diff() > 0).all())  # time order, raster order within a frame, no token twice
        assert 0 <= int(positions.min()) <= int(positions.max()) < frames * per_frame
        assert bool((torch.bincount(positions // per_frame, minlength=frames) >= 1).all())  # no frame falls silent
        static = sum(max(0, last - first - 1) for first, last in segments)
        known = {} if schedule == "budget" else {"static_frames": static}
        count = token_count(options["frames_in"], per_frame, options["ratio"], schedule, frames_out=frames, **known)
        assert len(tokens) == count


def test_dynamic_frames_keep_the_best_and_static_frames_the_best_of_each_window() -> None:
    received = torch.tensor([[0.0, 9, 8, 7, 6, 1, 2, 3]]).repeat(4, 1)
    _, positions = select_tokens(cells(received), received, torch.tensor([[0, 3]]), frames_in=4, ratio=0.5)
    assert (positions.view(4, 4) - 8 * torch.arange(4)[:, None]).tolist() == [
        [1, 2, 3, 4],  # first of the segment: the four best
        [1, 2, 4, 7],  # inside: the best of (0, 1), (2, 3), (4, 5), (6, 7)
        [1, 2, 4, 7],
        [1, 2, 3, 4],
    ]


@pytest.mark.parametrize(
    ("segments", "static"),
    [
        ([[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5]], []),
        ([[0, 1], [2, 3], [4, 5]], []),  # a segment of two has no inside
        ([[0, 2], [3, 5]], [1, 4]),
        ([[0, 5]], [1, 2, 3, 4]),
        ([[0, 0], [1, 5]], [2, 3, 4]),
    ],
)
def test_which_frames_are_static(segments: list[list[int]], static: list[int]) -> None:
    received = torch.tensor([[0.0, 9, 8, 7, 6, 1, 2, 3]]).repeat(
        6, 1
    )  # a static frame keeps other cells than a dynamic
    _, positions = select_tokens(cells(received), received, torch.tensor(segments), frames_in=6, ratio=0.5)
    inside = (positions.view(6, 4) % 8 == torch.tensor([1, 2, 4, 7])).all(1)
    assert inside.nonzero().flatten().tolist() == static


def test_equal_attention_keeps_the_earlier_token() -> None:
    received = torch.zeros(3, 6)
    _, positions = select_tokens(cells(received), received, torch.tensor([[0, 2]]), frames_in=3, ratio=0.5)
    assert positions.tolist() == [0, 1, 2, 6, 8, 10, 12, 13, 14]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_tokens(schedule: str) -> None:
    features, received = torch.randn(5, 9, 4), torch.rand(5, 9)
    tokens, positions = select_tokens(
        features, received, torch.tensor([[0, 4]]), frames_in=5, ratio=1.0, schedule=schedule
    )
    assert torch.equal(tokens, features.flatten(0, 1))
    assert torch.equal(positions, torch.arange(45))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_token_a_frame(schedule: str) -> None:
    received = torch.rand(5, 9)
    _, positions = select_tokens(
        cells(received), received, torch.tensor([[0, 4]]), frames_in=5, ratio=0.001, schedule=schedule
    )
    assert torch.equal(positions, received.argmax(1) + 9 * torch.arange(5))


def test_only_the_order_of_received_attention_matters() -> None:
    for received, segments, options in random_cases(100, seed=4):
        _, positions = select_tokens(cells(received), received, torch.tensor(segments), **options)
        for other in (received * 8 + 2, received.double(), received - 1):
            _, again = select_tokens(cells(received), other, torch.tensor(segments), **options)
            assert torch.equal(again, positions)


def test_dynamic_choice_follows_a_permutation_of_the_cells() -> None:
    """Distinct values: the same tokens are chosen wherever they lie in the frame."""
    generator = torch.Generator().manual_seed(5)
    received = torch.rand(4, 25, generator=generator)
    segments = torch.tensor([[0, 1], [2, 3]])  # all dynamic
    order = torch.randperm(25, generator=generator)
    chosen, _ = select_tokens(received[:, :, None], received, segments, frames_in=4, ratio=0.3)
    moved = received[:, order]
    again, _ = select_tokens(moved[:, :, None], moved, segments, frames_in=4, ratio=0.3)
    assert torch.equal(chosen.view(4, 8).sort(1).values, again.view(4, 8).sort(1).values)


def test_features_only_ride_along() -> None:
    for received, segments, options in random_cases(50, seed=6):
        features = torch.randn(*received.shape, 3).half()
        tokens, positions = select_tokens(features, received, torch.tensor(segments), **options)
        assert tokens.dtype == torch.float16
        assert torch.equal(tokens, features.flatten(0, 1)[positions])


@pytest.mark.parametrize("per_frame", [1, 2, 7, 25, 196])
def test_windows_are_contiguous_even_and_the_longer_ones_first(per_frame: int) -> None:
    for count in range(1, per_frame + 1):
        got = window_of_cell(per_frame, count)
        assert got.tolist() == [n for n, window in enumerate(windows(per_frame, count)) for _ in window]
        sizes = torch.bincount(got)
        assert len(sizes) == count
        assert int(sizes[0]) - int(sizes[-1]) == (per_frame % count > 0)
        assert bool((sizes.diff() <= 0).all())


def test_fixed_selection_keeps_exactly_the_places_of_every_frame() -> None:
    rng = np.random.default_rng(7)
    for _ in range(200):
        frames, per_frame = int(rng.integers(1, 9)), int(rng.choice([1, 4, 9, 25]))
        received = random_received(frames, per_frame, rng)
        static = torch.from_numpy(rng.random(frames) < 0.5)
        places = int(rng.integers(1, per_frame + 1))
        tokens, positions = select_fixed(cells(received), received, static, places)
        assert tokens.shape == (frames * places, 1)
        assert torch.equal(positions, keep_mask(received, static, places, places).flatten().nonzero()[:, 0])
        assert torch.bincount(positions // per_frame, minlength=frames).tolist() == [places] * frames


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4, 9)}, r"features must be .* got \[4, 9\] and \[4, 9\]"),
        ({"received": torch.zeros(4, 8)}, r"\[4, 9, 2\] and \[4, 8\]"),
        ({"received": torch.zeros(4, 9, 1)}, r"\[4, 9, 1\]"),
        ({"features": torch.zeros(0, 9, 2), "received": torch.zeros(0, 9)}, r"\[0, 9, 2\]"),
        ({"features": torch.zeros(4, 0, 2), "received": torch.zeros(4, 0)}, r"\[4, 0, 2\]"),
        ({"ratio": 0.0}, r"retention ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, "got 1.5"),
        ({"ratio": float("nan")}, "got nan"),
        ({"frames_in": 0}, "frames_in must be at least 1 .* got 0"),
        ({"schedule": "fixed"}, "schedule must be one of adaptive, budget, got 'fixed'"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.zeros(4, 9, 2),
        "received": torch.zeros(4, 9),
        "segments": torch.tensor([[0, 3]]),
        "frames_in": 8,
        "ratio": 0.5,
    }
    select_tokens(**arguments)  # negative control
    with pytest.raises(UserError, match=message):
        select_tokens(**(arguments | change))
