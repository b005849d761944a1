"""FlashVID: its steps against plain loops, and its counts."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from earlytom.density import cluster
from earlytom.encoder import VisualTokens, encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.flashvid import FlashVIDSettings, average_trees, flashvid, follow, spread_tokens
from earlytom.methods import by_name
from earlytom.scenes import frame_means, scene_bounds
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower


@st.composite
def videos(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    frames, places = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scene = (torch.rand(frames, generator=generator) < 0.3).cumsum(0)
    x = torch.randn(frames + 1, places, 5, generator=generator)[scene]
    x = x + draw(st.sampled_from([0.02, 0.5])) * torch.randn(x.shape, generator=generator)
    return x, torch.rand(frames, places, generator=generator)


@given(videos(), st.integers(1, 12))
def test_diverse_tokens(video: tuple[Tensor, Tensor], count: int) -> None:
    x, weight = video
    unit = normalize(x, dim=-1)
    taken = spread_tokens(unit, weight, count)
    for one, heavy, found in zip(unit, weight, taken, strict=True):
        apart = (1 - one @ one.T).clamp_min(0)
        wanted: list[int] = []
        for _ in range(min(count, len(one))):
            left = [s for s in range(len(one)) if s not in wanted]
            value = {s: float(heavy[s] * min((float(apart[s, o]) for o in wanted), default=2.0)) for s in left}
            wanted.append(max(left, key=lambda s: (value[s], -s)))
        assert found.nonzero().flatten().tolist() == sorted(wanted)


@given(videos(), st.floats(-0.5, 0.99), st.floats(0, 1))
def test_the_way_of_a_token(video: tuple[Tensor, Tensor], linked: float, share: float) -> None:
    x, weight = video
    frames, places, _ = x.shape
    unit, taken = normalize(x, dim=-1), weight < share
    root = follow(unit, taken, linked).tolist()
    for f in range(frames):
        for s in range(places):
            here, at = (f, s), f * places + s
            while here[0] > 0 and not taken[here]:
                before = [p for p in range(places) if not taken[here[0] - 1, p]]
                cosines = {p: float(unit[here] @ unit[here[0] - 1, p]) for p in before}
                best = max(before, key=lambda p: (cosines[p], -p), default=None)
                if best is None or cosines[best] <= linked:
                    break
                here = (here[0] - 1, best)
            assert root[at] == here[0] * places + here[1]


@given(videos(), st.floats(0, 1))
def test_what_is_linked_is_averaged(video: tuple[Tensor, Tensor], share: float) -> None:
    x, weight = video
    taken = weight < share
    root = follow(normalize(x, dim=-1), taken, 0.8)
    means, roots = average_trees(x.flatten(0, 1), root, taken.flatten())
    assert roots.tolist() == sorted(set(root[~taken.flatten()].tolist()))
    for mean, at in zip(means, roots.tolist(), strict=True):
        members = [m for m in range(len(root)) if int(root[m]) == at and not taken.flatten()[m]]
        torch.testing.assert_close(mean, x.flatten(0, 1)[members].mean(0))


@given(st.integers(0, 20), st.integers(0, 25), st.integers(0, 2**31))
def test_clusters(rows: int, count: int, seed: int) -> None:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    tokens, which = cluster(x, count, 7)
    assert len(tokens) == len(which) == min(rows, count)
    if count >= rows:
        torch.testing.assert_close(tokens, x)
    copies = x[:1].expand(rows, 4)  # each centre is its own, though another is as near
    torch.testing.assert_close(cluster(copies, count, 7)[0], copies[: len(which)])


@given(videos(), st.floats(0.05, 1), st.floats(1, 1.5))
def test_counts_and_order(video: tuple[Tensor, Tensor], ratio: float, expansion: float) -> None:
    x, attention = video
    settings = FlashVIDSettings(ratio, expansion, least=2)
    tokens, positions = flashvid(x, attention, settings)
    count = min(x.shape[1], math.ceil(ratio * x.shape[1] * expansion))
    assert len(tokens) == len(positions) <= len(x) * count
    assert positions.tolist() == sorted(set(positions.tolist()))
    context = math.floor((1 - settings.diverse) * count)
    unit, at = normalize(x, dim=-1), dict(zip(positions.tolist(), tokens, strict=True))
    for a, b in scene_bounds(frame_means(x), settings.tau, settings.least):
        scene, means = unit[a : b + 1], normalize(unit[a : b + 1].mean(1), dim=-1)
        likes = (scene @ means.T).mean(-1).clamp_min(0)
        taken = spread_tokens(scene, attention[a : b + 1] * likes, count - context)
        roots = {root for root, own in zip(follow(scene, taken, 0.8).tolist(), taken.flatten(), strict=True) if not own}
        inside = (positions >= a * x.shape[1]) & (positions < (b + 1) * x.shape[1])
        assert int(inside.sum()) == int(taken.sum()) + min(len(roots), (b - a + 1) * context)
        for f, p in taken.nonzero().tolist():
            assert torch.equal(at[(a + f) * x.shape[1] + p], x[a + f, p])
    assert torch.equal(tokens, flashvid(x, attention, settings)[0])


def seen(settings: dict[str, Any]) -> VisualTokens:
    vision = LLAVA_ONEVISION.vision(tiny_tower("siglip"), tiny_projector())
    return encode(vision, made_video("noise", 8), by_name("flashvid", {"retention_ratio": 0.5} | settings))


def test_the_released_form_lets_a_quarter_more_in() -> None:
    assert len(seen({}).tokens) == 8 * 5
    assert len(seen({"faithful": True}).tokens) == 8 * 6
