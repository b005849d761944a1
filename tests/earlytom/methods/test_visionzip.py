"""VisionZip: against a loop over frames and tokens, and its counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from earlytom import UserError
from earlytom.encoder import encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.methods import by_name
from earlytom.visionzip import visionzip
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower


def looped(
    features: Tensor, attention: Tensor, metric: Tensor, count: int, faithful: bool
) -> list[list[tuple[int, Tensor]]]:
    """Places and tokens of each frame."""
    out = []
    for x, a, m in zip(features, attention, metric, strict=True):
        dominant = count * 54 // 64
        order = sorted(range(len(x)), key=lambda s: (-float(a[s]), s))
        kept = [(s, x[s]) for s in sorted(order[:dominant])]
        rest, contextual = sorted(order[dominant:]), count - dominant
        spots = rest[:: max(1, len(rest) // contextual)][:contextual]
        joins: dict[int, list[Tensor]] = {s: [] for s in spots}
        for s in rest:
            if s not in joins:
                cosines = cosine_similarity(m[s][None], m[spots])
                joins[spots[int(cosines.argmax())]].append(x[s])
        for s, others in joins.items():
            if faithful:
                kept.append((s, x[s] + torch.stack(others).mean(0) if others else x[s]))
            else:
                kept.append((s, torch.stack([x[s], *others]).mean(0)))
        out.append(kept if faithful else sorted(kept, key=lambda one: one[0]))
    return out


@st.composite
def frames(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    count, places = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = torch.randn(count, places, 5, generator=generator)
    attention = (8 * torch.rand(count, places, generator=generator)).round() / 8
    metric = torch.randn(count, places, 3, generator=generator)
    return features, attention, metric, draw(st.integers(1, places))


@given(frames(), st.booleans())
def test_it_is_the_plain_loop(made: tuple[Tensor, Tensor, Tensor, int], faithful: bool) -> None:
    tokens, places = visionzip(*made, faithful=faithful)
    wanted = looped(*made, faithful)
    assert places.tolist() == [[s for s, _ in frame] for frame in wanted]
    torch.testing.assert_close(tokens, torch.stack([torch.stack([x for _, x in frame]) for frame in wanted]))


@given(frames())
def test_the_default_is_within_what_it_is_made_of(made: tuple[Tensor, Tensor, Tensor, int]) -> None:
    features, _, _, count = made
    tokens, places = visionzip(*made)
    assert places.tolist() == [sorted(set(one)) for one in places.tolist()]
    assert places.shape == (len(features), count)
    assert bool((tokens.amax(1) <= features.amax(1) + 1e-5).all())


def test_the_released_form_sums_and_lists_what_stands_for_others_last() -> None:
    x = torch.ones(1, 10, 4)
    released, places = visionzip(x, torch.arange(10.0)[None], x, 5, faithful=True)
    assert released.norm(dim=-1).tolist() == [[2.0, 2.0, 2.0, 2.0, 4.0]]
    assert places.tolist() == [[6, 7, 8, 9, 0]]
    assert visionzip(x, torch.arange(10.0)[None], x, 5)[0].norm(dim=-1).tolist() == [[2.0] * 5]


def test_published_counts() -> None:
    for ratio, count in ((0.1, 20), (0.15, 30), (0.2, 40)):
        counts = by_name("visionzip", {"retention_ratio": ratio}).counts(32, 196)
        assert counts is not None
        assert counts.tokens == 32 * count


def test_a_count_that_makes_no_sense_is_refused() -> None:
    x = torch.ones(1, 4, 2)
    for count in (0, 5):
        with pytest.raises(UserError, match=f"of 4 tokens a frame at least one and at most all can stay, got {count}"):
            visionzip(x, x[..., 0], x, count)


def test_around_a_vision_part() -> None:
    vision = LLAVA_ONEVISION.vision(tiny_tower("clip"), tiny_projector())
    trace: dict[str, Any] = {}
    out = encode(vision, made_video("scenes", 4), by_name("visionzip", {"retention_ratio": 0.5}), trace=trace)
    tokens, places = visionzip(trace["features"], trace["relevance"], trace["features"], 5)
    assert torch.equal(out.tokens, tokens.flatten(0, 1))
    assert out.positions.tolist() == [f * 9 + s for f, frame in enumerate(places.tolist()) for s in frame]
