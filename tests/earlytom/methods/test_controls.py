"""The controls: as many tokens as asked for, in order, of the places they claim; nothing waits for the device."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import EarlyTomConfig, UserError, encode_video
from earlytom.encoder import VisualTokens
from earlytom.methods.controls import (
    EvenFrames,
    Pooling,
    RandomTokens,
    TopK,
    averaged,
    even_frames,
    pooling_grid,
)
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower

F, P = 8, 9
OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())


def video() -> Tensor:
    return made_video("scenes", F)


def seen(method: Any) -> VisualTokens:
    return encode_video(tiny_tower("siglip"), tiny_projector(), video(), method)


def everything() -> Tensor:
    """[F * P, E]: all tokens of the untouched model."""
    return seen(OFF).tokens


@pytest.mark.parametrize("method", [RandomTokens(13), TopK(13, layer=2)], ids=lambda method: method.name)
def test_chosen_tokens_are_those_of_their_places_in_order(method: Any) -> None:
    out = seen(method)
    assert out.tokens.shape == (13, 24)
    assert out.positions.tolist() == sorted(set(out.positions.tolist()))
    assert torch.equal(out.tokens, everything()[out.positions])
    assert not torch.equal(out.positions, torch.arange(13))


def test_top_k_takes_the_highest_received_attention_of_its_layer() -> None:
    watching = seen(OFF.replace(merge_layers=(2,), schedule="budget", frame_budget=1.0))
    grid = watching.received.view(F, 1, 5, 5)
    relevance = torch.nn.functional.interpolate(grid, size=(3, 3), mode="bilinear").flatten()
    best = torch.argsort(relevance, descending=True, stable=True)[:13].sort().values
    assert torch.equal(seen(TopK(13, layer=2)).positions, best)
    assert not torch.equal(seen(TopK(13, layer=0)).positions, best)  # of another layer


def test_random_tokens_follow_from_seed_video_and_number() -> None:
    first = seen(RandomTokens(13)).positions
    assert torch.equal(first, seen(RandomTokens(13)).positions)
    for other in (RandomTokens(13, seed=1), RandomTokens(13, video=1)):
        assert not torch.equal(first, seen(other).positions)


def test_even_frames_are_encoded_alone_and_whole() -> None:
    out = seen(EvenFrames(3))
    assert even_frames(F, 3) == (0, 4, 7)
    assert out.frames_per_stage == (3,)
    assert out.sources.argmax(1).tolist() == [0, 4, 7]
    assert torch.equal(out.sources.sum(1), torch.ones(3))
    assert torch.equal(out.positions, torch.arange(3 * P))
    whole = everything().unflatten(0, (F, P))
    assert torch.allclose(out.tokens, whole[[0, 4, 7]].flatten(0, 1), atol=1e-5)


def test_pooled_tokens_lie_in_the_middle_of_what_they_average() -> None:
    out = seen(Pooling(12))
    assert pooling_grid(F, (3, 3), 12) == (3, 2, 2)
    # times 0-2, 2-5, 5-7; rows and columns 0-1, 1-2
    assert out.positions.tolist() == [t * P + r * 3 + c for t in (1, 3, 6) for r in (0, 1) for c in (0, 1)]
    assert torch.allclose(out.tokens, averaged(everything().unflatten(0, (F, P)), (3, 3), (3, 2, 2)))


def test_a_layer_that_the_tower_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="layer 4 does not exist: the vision tower has layers 0 to 3"):
        seen(TopK(3, layer=4))


@given(st.integers(1, 128), st.data())
def test_even_frames(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    found = even_frames(total, count)
    assert len(found) == count
    assert list(found) == sorted(set(found))
    assert 0 <= found[0] <= found[-1] < total
    if count == 1:
        assert found == (total // 2,)
    else:
        assert (found[0], found[-1]) == (0, total - 1)
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert max(gaps) - min(gaps) <= 1


@given(st.integers(1, 64), st.integers(1, 14), st.integers(1, 5000), st.booleans())
def test_pooling_grids_fit(total: int, side: int, tokens: int, keep: bool) -> None:
    time, rows, columns = pooling_grid(total, (side, side), tokens, keep_frames=keep)
    assert 1 <= time <= total
    assert 1 <= rows <= side
    assert 1 <= columns <= side
    assert abs(rows - columns) <= 1
    assert time * rows * columns <= tokens
    if keep and tokens >= total:
        assert time == total
    if tokens >= total * side * side:
        assert (time, rows, columns) == (total, side, side)


def test_pooling_grids_shrink_evenly() -> None:
    """A grid and its transpose are equally good."""
    for tokens, keep, wanted in (
        (42, False, (7, 2, 3)),
        (81, False, (9, 3, 3)),
        (105, False, (11, 3, 3)),
        (42, True, (16, 1, 2)),
        (10, True, (5, 1, 2)),
    ):
        time, rows, columns = pooling_grid(16, (5, 5), tokens, keep_frames=keep)
        assert (time, *sorted((rows, columns))) == wanted


def test_pooling_averages() -> None:
    features = torch.randn(4, 16, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(averaged(features, (4, 4), (4, 4, 4)), features.flatten(0, 1))
    torch.testing.assert_close(averaged(features, (4, 4), (1, 1, 1))[0], features.mean((0, 1)))
    halves = averaged(features, (4, 4), (2, 1, 2))  # time, then raster: (0, left), (0, right), (1, left), ...
    assert halves.shape == (4, 3)
    right = features.unflatten(1, (4, 4))[2:, :, 2:]
    torch.testing.assert_close(halves[3], right.mean((0, 1, 2)))


def test_oblong_frames_shrink_alike() -> None:
    time, rows, columns = pooling_grid(4, (4, 8), 32)
    assert time * rows * columns <= 32
    assert abs(rows * 8 - columns * 4) <= 8
    features = torch.randn(4, 32, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(averaged(features, (4, 8), (4, 4, 8)), features.flatten(0, 1))
    left = features.unflatten(1, (4, 8))[:, :, :4]
    torch.testing.assert_close(averaged(features, (4, 8), (1, 1, 2))[0], left.mean((0, 1, 2)))
