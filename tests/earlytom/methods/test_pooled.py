"""One pool for a video: against a plain loop, and its counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from earlytom import UserError
from earlytom.pooled import pooled, take_unlike


@st.composite
def videos(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    frames, places = draw(st.integers(1, 6)), draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(frames, places, 4, generator=generator)
    if draw(st.booleans()):
        x = x[:1] + 0.1 * x
    attention = (8 * torch.rand(frames, places, generator=generator)).round() / 8
    return x, attention, draw(st.integers(1, frames * places))


@given(videos(), st.floats(-1, 1))
def test_tokens_that_are_taken_are_unlike(video: tuple[Tensor, Tensor, int], alike: float) -> None:
    x, attention, count = video
    unit, weight = normalize(x.flatten(0, 1), dim=-1), attention.flatten()
    taken: list[int] = []
    for n in sorted(range(len(unit)), key=lambda n: (-float(weight[n]), n)):
        if len(taken) < count and all(float(unit[n] @ unit[other]) < alike for other in taken):
            taken.append(n)
    assert take_unlike(unit, weight, count, alike).nonzero().flatten().tolist() == sorted(taken)


@given(videos(), st.floats(0, 1))
def test_exactly_as_many_as_asked_for_in_order(video: tuple[Tensor, Tensor, int], clustered: float) -> None:
    x, attention, count = video
    tokens, positions = pooled(x, attention, count, clustered=clustered)
    assert tokens.shape == (count, 4)
    assert positions.tolist() == sorted(set(positions.tolist()))
    own = take_unlike(normalize(x.flatten(0, 1), dim=-1), attention.flatten(), count - int(clustered * count), 0.7)
    at = dict(zip(positions.tolist(), tokens, strict=True))
    for n in own.nonzero().flatten().tolist():
        assert torch.equal(at[n], x.flatten(0, 1)[n])
    assert torch.equal(tokens, pooled(x, attention, count, clustered=clustered)[0])


def test_all_of_a_video_is_the_video() -> None:
    x = torch.randn(3, 4, 5)
    assert torch.equal(pooled(x, torch.rand(3, 4), 12)[0], x.flatten(0, 1))


def test_what_is_not_taken_is_in_the_means() -> None:
    """Three copies of a token: one is taken, the others are one mean."""
    x = torch.cat([torch.eye(4)[:1].expand(3, -1), -torch.eye(4)])[None]
    tokens, positions = pooled(x, torch.tensor([[3.0, 1, 1, 5, 5, 5, 5]]), 6, clustered=0.0)
    assert positions.tolist() == [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(tokens[1], x[0, 0])


def test_a_count_that_makes_no_sense_is_refused() -> None:
    for count in (0, 5):
        with pytest.raises(UserError, match=f"of 4 tokens at least one and at most all can stay, got {count}"):
            pooled(torch.ones(1, 4, 2), torch.ones(1, 4), count)
