"""Counts: frames per stage, tokens per frame, tokens in all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlytom import UserError, frames_per_stage, select_tokens, token_count
from earlytom.budget import dynamic_tokens, effective_ratio, static_tokens
from tests.earlytom.reference import token_counts

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("frames", "counts"),
    [
        (64, (64, 48, 36, 27)),
        (32, (32, 24, 18, 14)),  # 13.5 rounds to the even 14
        (16, (16, 12, 9, 7)),
        (10, (10, 8, 6, 4)),  # 7.5 and 4.5 round to the even 8 and 4
        (2, (2, 2, 2, 2)),
        (1, (1, 1, 1, 1)),
    ],
)
def test_the_default_share_at_three_merges(frames: int, counts: tuple[int, ...]) -> None:
    assert frames_per_stage(frames) == counts


def test_shares_and_counts() -> None:
    assert frames_per_stage(32, merges=0) == (32,)
    assert frames_per_stage(32, merges=2, frame_budget=0.5) == (32, 16, 8)
    assert frames_per_stage(32, merges=2, frame_budget=1) == (32, 32, 32)
    assert frames_per_stage(32, merges=3, frame_budget=1e-9) == (32, 1, 1, 1)
    assert frames_per_stage(32, frame_budget=(32, 20, 20)) == (32, 32, 20, 20)
    assert frames_per_stage(1, merges=1, frame_budget=[1]) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "number of frames .* at least 1, got 0: set it with --frames"),
        ({"frames": -3}, "got -3"),
        ({"frames": 2.5}, "whole number .* got 2.5"),
        ({"frames": True}, "whole number .* got True"),
        ({"frames": 8, "frame_budget": 0}, r"share in \(0, 1\], got 0: see --frame-budget"),
        ({"frames": 8, "frame_budget": 1.5}, "got 1.5"),
        ({"frames": 8, "frame_budget": math.nan}, "got nan"),
        ({"frames": 8, "frame_budget": (6, 4)}, "names 2 frame counts for 3 merge layers"),
        ({"frames": 8, "frame_budget": (6, 4, 0)}, "at merge 3 must be a whole number of at least 1, got 0"),
        ({"frames": 8, "frame_budget": (9, 4, 3)}, "frame budget 9 at merge 1 is more than the 8 frames .* --frames"),
        ({"frames": 8, "frame_budget": (4, 5, 3)}, "frame budget 5 at merge 2 is more than the 4 frames"),
    ],
)
def test_impossible_frame_budgets_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        frames_per_stage(**arguments)


@PROPERTY
@given(st.integers(1, 128), st.integers(0, 6), st.floats(1e-6, 1, exclude_min=True))
def test_stages_shrink_and_never_end_below_one(frames: int, merges: int, share: float) -> None:
    counts = frames_per_stage(frames, merges=merges, frame_budget=share)
    assert len(counts) == merges + 1
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[-1] >= 1


@pytest.mark.parametrize(
    ("per_frame", "effective", "dynamic", "static"),
    [
        (196, 1.0, 196, 196),
        (196, 0.1, 20, 20),  # 19.6
        (196, 0.0025, 1, 1),  # 0.49 rounds to none, yet a window needs one
        (10, 0.25, 3, 2),  # 2.5 rounds to the even 2
        (10, 0.35, 4, 4),  # 3.5 rounds to the even 4
        (9, 0.92, 9, 8),  # 8.28: all of a dynamic frame, not all of a static one
        (1, 0.001, 1, 1),
    ],
)
def test_tokens_of_a_frame(per_frame: int, effective: float, dynamic: int, static: int) -> None:
    assert dynamic_tokens(per_frame, effective) == dynamic
    assert static_tokens(per_frame, effective) == static


def test_the_effective_ratio_gives_merged_frames_a_larger_share() -> None:
    assert effective_ratio(0.1, 32, 32) == pytest.approx(0.1)
    assert effective_ratio(0.1, 32, 14) == pytest.approx(0.1 * 32 / 14)
    assert effective_ratio(0.5, 32, 14) == 1.0


@PROPERTY
@given(st.integers(1, 128), st.integers(1, 128), st.integers(1, 300), st.floats(1e-6, 1))
def test_counts_equal_the_reference_and_stay_in_range(
    frames_in: int, frames_out: int, per_frame: int, ratio: float
) -> None:
    effective = effective_ratio(ratio, frames_in, frames_out)
    counts = (dynamic_tokens(per_frame, effective), static_tokens(per_frame, effective))
    assert counts == token_counts(per_frame, ratio, frames_in, frames_out)
    assert all(1 <= count <= per_frame for count in counts)
    assert counts[1] <= counts[0]


@PROPERTY
@given(st.integers(1, 128), st.integers(1, 300), st.integers(1, 100))
def test_without_merging_a_frame_keeps_what_its_ratio_says(frames: int, per_frame: int, percent: int) -> None:
    wanted = -(-per_frame * percent // 100)  # in whole numbers
    count = token_count(frames, per_frame, percent / 100, merges=0)
    assert count == token_count(frames, per_frame, percent / 100, "adaptive", frames_out=frames, static_frames=0)
    assert count == frames * dynamic_tokens(per_frame, percent / 100)
    assert count - frames * wanted in (0, frames)  # 100 * 0.07 is more than 7, too, whatever the frames


def test_a_ratio_is_not_rounded_up_by_the_number_of_frames() -> None:
    assert token_count(12, 25, 0.2, merges=0) == 12 * 5
    assert math.ceil(25 * (0.2 * 12 / 12)) == 6  # what doubles make of it
    assert [token_count(frames, 25, 0.2, merges=0) / frames for frames in range(1, 65)] == [5] * 64


@pytest.mark.parametrize(
    ("frames_in", "frames_out", "per_frame", "ratio", "places"),
    [
        (12, 5, 25, 0.1, 6),  # the number meant; 0.1 * 12 / 5 would keep 7
        (12, 6, 25, 0.2, 10),  # likewise, 11
        (10, 6, 9, 0.2, 4),  # a token more than meant, which 0.2 * 10 / 6 would not keep
    ],
)
def test_a_whole_number_of_tokens_is_what_released_doubles_make_of_it(
    frames_in: int, frames_out: int, per_frame: int, ratio: float, places: int
) -> None:
    assert token_count(frames_in, per_frame, ratio, frames_out=frames_out) == frames_out * places


def test_token_count_of_the_published_settings() -> None:
    assert token_count(32, 196, 1.0, merges=0) == 32 * 196
    assert token_count(32, 196, 0.1) == 14 * math.ceil(196 * 0.1 * 32 / 14)
    assert token_count(32, 196, 0.1, frames_out=20) == 20 * math.ceil(196 * 0.1 * 32 / 20)
    assert token_count(32, 196, 0.1, "adaptive", frames_out=20, static_frames=5) == 15 * 32 + 5 * 31  # 31.36 a frame


@PROPERTY
@given(st.data())
def test_token_count_is_what_selection_gives(data: st.DataObject) -> None:
    frames = data.draw(st.integers(1, 20))
    frames_out = data.draw(st.integers(1, frames))
    per_frame, ratio = data.draw(st.integers(1, 30)), data.draw(st.floats(0.01, 1))
    cuts = [*sorted(data.draw(st.sets(st.integers(1, frames_out)))), frames_out]
    segments = [(a, b - 1) for a, b in zip([0, *cuts], cuts, strict=False) if b > a]
    received = torch.from_numpy(np.random.default_rng(0).random((frames_out, per_frame)))
    static = sum(max(0, last - first - 1) for first, last in segments)
    for schedule, known in (("budget", {}), ("adaptive", {"static_frames": static})):
        tokens, positions = select_tokens(
            received[:, :, None], received, torch.tensor(segments), frames_in=frames, ratio=ratio, schedule=schedule
        )
        count = token_count(frames, per_frame, ratio, schedule, frames_out=frames_out, **known)
        assert len(tokens) == len(positions) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0}, r"retention ratio must be in \(0, 1\], got 0: set it with --ratio"),
        ({"ratio": 1.5}, "got 1.5"),
        ({"ratio": math.nan}, "got nan"),
        ({"frames": 0}, "number of frames"),
        ({"tokens_per_frame": 0}, "tokens a frame has .* got 0"),
        ({"frames_out": 0}, "frames_out must be between 1 and 8 .* got 0"),
        ({"frames_out": 9}, "between 1 and 8 .* got 9"),
        ({"schedule": "fixed"}, "schedule must be adaptive or budget, got 'fixed'"),
        ({"schedule": "adaptive"}, "depends on the video: give frames_out and static_frames"),
        ({"schedule": "adaptive", "frames_out": 4}, "give frames_out and static_frames"),
        ({"schedule": "adaptive", "frames_out": 4, "static_frames": 5}, "static_frames must be between 0 and 4"),
    ],
)
def test_impossible_token_counts_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"frames": 8, "tokens_per_frame": 9, "ratio": 0.5} | change
    with pytest.raises(UserError, match=message):
        token_count(**arguments)
