"""DyCoke's merging in time: which tokens stay, and how many."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from earlytom import UserError
from earlytom.dycoke import dycoke, whole_frames
from earlytom.methods import by_name
from earlytom.untouched import DyCokeConfig


@given(st.integers(1, 11), st.integers(1, 12), st.integers(0, 12), st.booleans(), st.integers(0, 2**31))
def test_what_differs_stays(frames: int, places: int, count: int, faithful: bool, seed: int) -> None:
    x = torch.randn(frames, places, 5, generator=torch.Generator().manual_seed(seed))
    tokens, positions = dycoke(x, count, faithful=faithful)
    wanted = []
    last = max(n for n in range(frames) if n % 4 == 0)
    for n in range(frames):
        kept = list(range(places))
        if n % 4 and not (faithful and n == last + 2):
            other = {1: n - 1, 2: n - 2, 3: n - 1}[n % 4]
            alike = cosine_similarity(x[n], x[other]).tolist()
            kept = sorted(kept, key=lambda s: (alike[s], s))[:count]
            kept = kept if faithful else sorted(kept)
        wanted += [n * places + s for s in kept]
    assert positions.tolist() == wanted
    assert torch.equal(tokens, x.flatten(0, 1)[positions])


def test_published_counts() -> None:
    """58 of 196 tokens of three frames of four; the released loop leaves one frame more whole."""
    counts = {form: by_name("dycoke", {"faithful": form}).counts(32, 196) for form in (True, False)}
    assert counts[False] is not None
    assert counts[True] is not None
    assert counts[False].tokens == 8 * 196 + 24 * 58
    assert counts[True].tokens == 9 * 196 + 23 * 58
    assert DyCokeConfig(0.475).tokens(33, 196) == 9 * 196 + 24 * 58
    assert DyCokeConfig(0.295).of_others(100) == 6  # in doubles the share of 0.06 is less
    assert math.isclose(counts[True].tokens / 32 / 196, 0.49, abs_tol=0.01)


@pytest.mark.parametrize(("frames", "whole"), [(1, [0]), (4, [0, 2]), (6, [0, 4]), (7, [0, 4, 6]), (8, [0, 4, 6])])
def test_frames_that_stay_whole(frames: int, whole: list[int]) -> None:
    assert whole_frames(frames, True) == whole
    assert whole_frames(frames) == list(range(0, frames, 4))


def test_it_cannot_keep_less_than_a_quarter() -> None:
    least = by_name("dycoke", {"retention_ratio": 0.25}).counts(8, 9)
    assert least is not None
    assert least.tokens == 18
    with pytest.raises(
        UserError, match=r"keeps one frame of 4 whole, so retention_ratio must be at least 0.25, got 0.1"
    ):
        by_name("dycoke", {"retention_ratio": 0.1})


def test_shapes_need_no_values() -> None:
    assert dycoke(torch.empty(8, 9, 4, device="meta"), 3)[0].shape == (2 * 9 + 6 * 3, 4)
