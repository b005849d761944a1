"""UniComp: against plain loops, and its counts."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from earlytom.encoder import encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.methods import by_name
from earlytom.unicomp import UniCompSettings, distinct, frame_budgets, fuse_frames, unicomp
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower


@st.composite
def videos(draw: st.DrawFn) -> Tensor:
    frames, places = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scene = (torch.rand(frames, generator=generator) < 0.4).cumsum(0)
    x = torch.randn(frames + 1, places, 3, generator=generator)[scene]
    return x + draw(st.sampled_from([0.0, 0.05, 0.5])) * torch.randn(x.shape, generator=generator)


@given(videos(), st.sampled_from([0.0, 0.005, 0.2, 2.0]))
def test_frames_that_say_the_same_become_one(x: Tensor, same: float) -> None:
    fused, first = fuse_frames(x, same)
    ends = [*first.tolist()[1:], len(x)]
    assert first[0] == 0
    for n, (a, b) in enumerate(zip(first.tolist(), ends, strict=True)):
        torch.testing.assert_close(fused[n], x[a:b].mean(0))
    means = normalize(x.mean(1), dim=-1)
    for t in range(1, len(x)):
        assert (t in first.tolist()) == (float(1 - means[t] @ means[t - 1]) > same) or same == 0


@given(videos(), st.floats(0.02, 1), st.floats(1, 4))
def test_budgets(x: Tensor, ratio: float, most: float) -> None:
    tokens = ratio * len(x) * x.shape[1]
    budget = frame_budgets(x, tokens, most)
    assert bool(((budget >= 1) & (budget <= x.shape[1])).all())
    assert bool((budget <= max(1, most * tokens / len(x) + 0.5)).all())
    assert int(budget.sum()) <= tokens + len(x)
    means = normalize(x.mean(1), dim=-1)
    alike = (means @ means.T).mean(1)
    share = torch.softmax(math.sqrt(len(x)) * (alike.mean() - alike), 0)
    wanted = (share * tokens).clamp_max(most * tokens / len(x)).clamp(1, x.shape[1])
    assert bool(((budget - wanted).abs() <= 0.5 + 1e-3).all())


def test_a_frame_unlike_the_others_has_more() -> None:
    x = torch.randn(1, 9, 4).repeat(6, 1, 1)
    x[3] = -x[3]
    budget = frame_budgets(x, 20.0, 2.0).tolist()
    assert budget[3] > max(n for f, n in enumerate(budget) if f != 3)


@given(videos(), st.integers(1, 12), st.floats(0, 1))
def test_tokens_that_stay_say_different_things(x: Tensor, count: int, near: float) -> None:
    unit = normalize(x, dim=-1)
    alike = unit @ unit.transpose(1, 2)
    counts = torch.full((len(x),), count)
    kept = distinct(alike, counts, near)
    for one, stays in zip(alike, kept, strict=True):
        order = one.mean(-1).argsort(stable=True).tolist()
        wanted: list[int] = []
        for s in order:
            if len(wanted) < count and all(float(1 - one[s, other]) >= near for other in wanted):
                wanted.append(s)
        assert stays.nonzero().flatten().tolist() == sorted(wanted)


@given(videos(), st.floats(0.05, 1))
def test_a_token_is_half_of_those_near_it(x: Tensor, ratio: float) -> None:
    settings = UniCompSettings(ratio)
    tokens, positions = unicomp(x, settings)
    assert positions.tolist() == sorted(set(positions.tolist()))
    fused, first = fuse_frames(x, settings.same)
    group = {int(frame): n for n, frame in enumerate(first)}
    for token, position in zip(tokens, positions.tolist(), strict=True):
        frame, place = divmod(position, x.shape[1])
        own = fused[group[frame]]
        unit = normalize(own, dim=-1)
        away = 1 - unit @ unit.T
        others = [s for s in range(len(own)) if s != place and float(away[place, s]) < 0.2]
        wanted = (own[place] + own[others].mean(0)) / 2 if others else own[place]
        torch.testing.assert_close(token, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, unicomp(x, settings)[0])


def test_around_a_vision_part() -> None:
    vision = LLAVA_ONEVISION.vision(tiny_tower("siglip"), tiny_projector())
    still = encode(vision, made_video("still", 8), by_name("unicomp", {"retention_ratio": 0.5}))
    noise = encode(vision, made_video("noise", 8), by_name("unicomp", {"retention_ratio": 0.5}))
    assert {n // 9 for n in still.positions.tolist()} == {0}
    assert {n // 9 for n in noise.positions.tolist()} == set(range(8))
