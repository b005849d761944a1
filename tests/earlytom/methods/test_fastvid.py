"""FastVID: scenes, counts and values against plain loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from earlytom.encoder import encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.fastvid import FastVIDSettings, centre_counts, fastvid
from earlytom.methods import by_name
from earlytom.scenes import frame_means, scene_bounds, top
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower


@given(st.integers(1, 14), st.integers(1, 9), st.floats(-1, 1), st.integers(0, 2**31))
def test_scenes(frames: int, least: int, tau: float, seed: int) -> None:
    x = torch.randn(frames, 3, 4, generator=torch.Generator().manual_seed(seed))
    vectors = frame_means(x)
    bounds = scene_bounds(vectors, tau, least)
    assert [b + 1 for _, b in bounds[:-1]] == [a for a, _ in bounds[1:]]
    assert (bounds[0][0], bounds[-1][1]) == (0, frames - 1)
    alike = (vectors[1:] * vectors[:-1]).sum(-1).tolist()
    least_alike = sorted(range(frames - 1), key=lambda t: (alike[t], t))[: least - 1]
    starts = {t + 1 for t in range(frames - 1) if alike[t] < tau or t in least_alike}
    assert {a for a, _ in bounds[1:]} == starts
    assert len(bounds) >= min(least, frames)


def test_centres_go_to_every_fourth_frame_from_the_last_one() -> None:
    assert centre_counts([(0, 5), (6, 6)], 7, 8, 100, 4) == [0, 24, 0, 0, 0, 24, 8]
    assert centre_counts([(0, 4)], 5, 1, 100, 4) == [2, 0, 0, 0, 3]
    assert centre_counts([(0, 4)], 5, 8, 10, 4) == [10, 0, 0, 0, 10]  # no more than a frame has


@st.composite
def videos(draw: st.DrawFn) -> tuple[Tensor, Tensor, FastVIDSettings]:
    frames, places = draw(st.integers(1, 10)), draw(st.integers(2, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scene = (torch.rand(frames, generator=generator) < 0.3).cumsum(0)
    features = torch.randn(frames + 1, places, 6, generator=generator)[scene]
    features = features + 0.2 * torch.randn(features.shape, generator=generator)
    if draw(st.booleans()):  # no token is denser than another
        features = features[:1, :1].expand_as(features)
    attention = (8 * torch.rand(frames, places, generator=generator)).round() / 8
    settings = FastVIDSettings(
        draw(st.floats(0.1, 1)),
        draw(st.floats(0, 1)),
        draw(st.integers(1, 4)),
        every=draw(st.integers(1, 4)),
        weight=draw(st.sampled_from([0.6, 0.2])),
    )
    return features, attention, settings


@given(videos())
def test_it_keeps_what_is_attended_and_what_stands_for_the_rest(video: tuple[Tensor, Tensor, FastVIDSettings]) -> None:
    features, attention, s = video
    tokens, positions = fastvid(features, attention, frame_means(features), s)
    frames, places, _ = features.shape
    count = max(1, math.floor(places * s.ratio))
    context = math.floor(s.context * count)
    attended = top(attention, count - context)
    bounds = scene_bounds(frame_means(features), s.tau, s.least)
    centres = centre_counts(bounds, frames, context, places - count + context, s.every)
    assert positions.tolist() == sorted(set(positions.tolist()))
    assert len(tokens) == len(positions) == int(attended.sum()) + sum(centres)
    assert len(tokens) <= frames * count
    at = dict(zip(positions.tolist(), tokens, strict=True))
    for a, b in bounds:
        free = [f * places + p for f in range(a, b + 1) for p in range(places) if not attended[f, p]]
        chosen = [n for n in free if n in at]
        flat = features.flatten(0, 1)
        joins: dict[int, list[int]] = {n: [] for n in chosen}
        for n in free if chosen else []:
            cosines = cosine_similarity(flat[n][None], flat[chosen]).tolist()
            joins[chosen[max(range(len(chosen)), key=lambda k: (cosines[k], -k))]].append(n)
        for n in chosen:
            own = max(1 / (len(joins[n]) + 1), s.weight)
            wanted = own * flat[n] + (1 - own) * flat[joins[n]].mean(0) if joins[n] else flat[n]
            torch.testing.assert_close(at[n], wanted, atol=1e-4, rtol=1e-4)
    for f, p in attended.nonzero().tolist():
        assert torch.equal(at[f * places + p], features[f, p])
    assert torch.equal(tokens, fastvid(features, attention, frame_means(features), s)[0])


def test_noise_decides_between_equals_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(4, 16, 6, generator=generator), torch.rand(4, 16, generator=generator)
    noise = [torch.rand(4, 16, generator=generator) for _ in range(5)]
    settings = FastVIDSettings(0.5)

    def chosen(x: Tensor) -> set[tuple[int, ...]]:
        return {tuple(fastvid(x, attention, frame_means(x), settings, noise=one)[1].tolist()) for one in [None, *noise]}

    assert len(chosen(features)) == 1
    assert len(chosen(APART)) > 1  # negative control


# Any two tokens of a frame are equally far apart, so only noise tells their densities apart.
APART = torch.eye(16).expand(4, -1, -1)


def test_the_released_form_draws_noise_from_its_seed() -> None:
    attention = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    vision = LLAVA_ONEVISION.vision(tiny_tower("siglip"), tiny_projector())

    def chosen(**settings: Any) -> list[int]:
        method = by_name("fastvid", {"retention_ratio": 0.5} | settings)
        return method.choose(APART, attention, method.begin(vision, 4, torch.device("cpu")))[1].tolist()

    assert chosen(faithful=True, seed=1) == chosen(faithful=True, seed=1) != chosen(faithful=True, seed=2)
    assert chosen(seed=1) == chosen(seed=2)


def test_around_a_vision_part() -> None:
    vision = LLAVA_ONEVISION.vision(tiny_tower("siglip"), tiny_projector())
    trace: dict[str, Tensor] = {}
    out = encode(vision, made_video("scenes", 8), by_name("fastvid", {"retention_ratio": 0.5}), trace=trace)
    x = trace["features"]
    tokens, positions = fastvid(x, trace["relevance"], frame_means(x), FastVIDSettings(0.5))
    assert torch.equal(out.tokens, tokens)
    assert torch.equal(out.positions, positions)
