"""What a kept token stands for: against a slow rule, and what must hold of every video."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom.standing import SMALLEST, frame_times, places, size_bias, token_sizes


def slowly(features: Tensor, positions: list[int], time: Tensor, size: Tensor, frames: int) -> list[float]:
    """`token_sizes`, one token after the other, as its formula is written."""
    kept, per_frame = features.shape[:2]
    rows = [features[f, c].double() for f in range(kept) for c in range(per_frame)]
    mean = sum(rows) / len(rows)
    rows = [(row - mean) / max(float((row - mean).norm()), 1e-12) for row in rows]
    found = [0.0] * len(positions)
    for index, row in enumerate(rows):
        frame, cell = divmod(index, per_frame)
        alike = [
            float(row @ rows[p]) * float(torch.exp(-(time[frame, cell] - time.flatten()[p]).abs() / frames))
            for p in positions
        ]
        found[alike.index(max(alike))] += float(size[frame, cell])
    return found


@st.composite
def videos(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    kept, per_frame, frames = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(5, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    features = torch.randn(kept, per_frame, 7, generator=generator)
    time = torch.randint(0, frames, (kept, per_frame), generator=generator)
    size = torch.randint(1, 5, (kept, per_frame), generator=generator).float()
    count = draw(st.integers(1, kept * per_frame))
    positions = torch.randperm(kept * per_frame, generator=generator)[:count].sort().values
    return features, positions, time, size, frames


@given(videos())
def test_every_token_belongs_to_one(video: tuple[Tensor, Tensor, Tensor, Tensor, int]) -> None:
    features, positions, time, size, frames = video
    sizes = token_sizes(features, positions, time, size, frames)
    assert sizes.sum() == size.sum()
    assert sizes.tolist() == slowly(features, positions.tolist(), time, size, frames)
    assert (size_bias(sizes) >= torch.tensor(SMALLEST).log()).all()


@given(videos())
def test_whole_frames_are_cells_that_share_their_time(video: tuple[Tensor, Tensor, Tensor, Tensor, int]) -> None:
    features, positions, time, size, frames = video
    per_frame = features.shape[1]
    alike = token_sizes(features, positions, time[:, :1].expand_as(time), size[:, :1].expand_as(size), frames)
    assert torch.equal(alike, token_sizes(features, positions, time[:, 0], size[:, 0], frames))
    where = places(time[:, 0], positions, per_frame)
    assert torch.equal(where, places(time[:, :1].expand_as(time), positions, per_frame))
    assert torch.equal(where % per_frame, positions % per_frame)


def test_all_different_tokens_stand_for_themselves() -> None:
    features = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    positions, time = torch.arange(12), torch.arange(3)
    sizes = token_sizes(features, positions, time, torch.tensor([1.0, 2.0, 1.0]), 4)
    assert sizes.tolist() == [1.0] * 4 + [2.0] * 4 + [1.0] * 4
    assert torch.equal(places(time * 2, positions, 4), torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]))


def test_equal_tokens_belong_to_the_first() -> None:
    sizes = token_sizes(torch.ones(2, 2, 8), torch.tensor([1, 2]), torch.tensor([0, 1]), torch.ones(2), 2)
    assert sizes.tolist() == [4.0, 0.0]
    assert size_bias(sizes).tolist() == pytest.approx([1.386294, -2.302585])


def test_of_copies_a_merged_frame_is_the_earliest_whatever_rounding_left_of_their_shares() -> None:
    third = torch.full((3,), 1 / 3)
    assert frame_times(third + torch.tensor([-2e-5, 1e-5, 2e-5]))[0] == 0
    assert frame_times(third + torch.tensor([-2e-2, 1e-2, 2e-2]))[0] == 2  # negative control: shares that differ


def test_a_merged_frame_is_where_most_of_it_was() -> None:
    sources = torch.tensor([[0.6, 0.4, 0, 0], [0, 0, 0.5, 0.5]])
    time, size = frame_times(sources)
    assert time.tolist() == [0, 2]  # of equal shares the first
    assert size.tolist() == [2.0, 2.0]
