"""EVS and VidCom2: against plain loops, exact counts, and what they are for."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from earlytom import UserError
from earlytom.encoder import VisualTokens, encode
from earlytom.families import FAMILIES
from earlytom.method import Method
from earlytom.methods import by_name
from tests.earlytom.tiny import MODELS, made_video

NAMES = ("evs", "vidcom2")


@st.composite
def videos(draw: st.DrawFn) -> Tensor:
    frames, places = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scene = (torch.rand(frames, generator=generator) < 0.4).cumsum(0)
    x = torch.randn(frames + 1, places, 3, generator=generator)[scene]
    return x + draw(st.sampled_from([0.05, 0.5])) * torch.randn(x.shape, generator=generator)


def chosen(name: str, x: Tensor, ratio: float) -> list[int]:
    method = by_name(name, {"retention_ratio": ratio})
    tokens, positions = method.choose(x, None, Mock(vision=Mock(own=lambda seen: seen)))
    counts = method.counts(*x.shape[:2])
    assert counts is not None
    assert len(positions) == counts.tokens
    assert torch.equal(tokens, x.flatten(0, 1)[positions])
    assert positions.tolist() == sorted(set(positions.tolist()))
    return positions.tolist()


@given(videos(), st.floats(0.02, 1))
def test_evs_keeps_the_first_frame_and_what_changes_most(x: Tensor, ratio: float) -> None:
    frames, places, _ = x.shape
    kept = set(chosen("evs", x, ratio))
    assert set(range(places)) <= kept
    assert len(kept) == max(places, int(ratio * frames * places))
    changes: tuple[list[float], list[float]] = ([], [])  # of tokens that are left out, and of those that stay
    for at in range(places, frames * places):
        frame, place = divmod(at, places)
        alike = cosine_similarity(x[frame, place], x[frame - 1, place], dim=0)
        changes[at in kept].append(float(1 - alike))
    left, stays = changes
    assert not left or not stays or min(stays) >= max(left) - 1e-5


def test_evs_sees_one_place_change() -> None:
    x = torch.randn(1, 6, 4).repeat(5, 1, 1)
    x[3:, 2] = -x[3:, 2]
    assert set(chosen("evs", x, 7 / 30)) == {*range(6), 3 * 6 + 2}


@given(videos(), st.floats(0.02, 1))
def test_vidcom2_takes_the_least_alike_of_every_frame(x: Tensor, ratio: float) -> None:
    frames, places, _ = x.shape
    kept = chosen("vidcom2", x, ratio)
    assert len(kept) == max(frames, round(ratio * frames * places))
    video = x.mean((0, 1))
    unlike = torch.stack([-cosine_similarity(one, video[None]).mean() for one in x]) / 0.01
    share, mine = 1 - 1 / frames + unlike.softmax(0), torch.bincount(torch.tensor(kept) // places, minlength=frames)
    last = ((mine - 0.5) / share)[mine > 1]  # the seats that were given last, and those that would be next
    following = ((mine + 0.5) / share)[mine < places]
    assert not len(last) or not len(following) or last.max() <= following.min() + 1e-3
    for frame in range(frames):
        means = torch.stack([video, x[frame].mean(0)])
        score = [-float(cosine_similarity(token[None], means).sum()) for token in x[frame]]
        mine = [score[at - frame * places] for at in kept if at // places == frame]
        others = [value for at, value in enumerate(score) if frame * places + at not in kept]
        assert mine
        assert not others or min(mine) >= max(others) - 1e-5


def test_a_frame_unlike_the_video_has_more() -> None:
    x = torch.randn(1, 12, 4) * 0.3 + torch.tensor([1.0, 0, 0, 0])
    x = x.repeat(6, 1, 1)
    x[3] = -x[3]
    counts = [sum(at // 12 == frame for at in chosen("vidcom2", x, 0.4)) for frame in range(6)]
    assert counts[3] == max(counts) > min(counts)
    same = [sum(at // 12 == f for at in chosen("vidcom2", x[:1].repeat(6, 1, 1), 0.5)) for f in range(6)]
    assert same == [6] * 6  # negative control


def seen(family: str, method: Method, kind: str) -> VisualTokens:
    model = MODELS[family]()
    frame = FAMILIES[family].geometry(model.config)
    return encode(FAMILIES[family].vision_of(model.model), made_video(kind, 6, grid=frame.grid), method)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_both_run_on_every_family(family: str, name: str) -> None:
    method = by_name(name, {"retention_ratio": 0.5})
    out = seen(family, method, "scenes")
    counts = method.counts(6, len(seen(family, by_name(name, {"retention_ratio": 1.0}), "scenes").tokens) // 6)
    assert counts is not None
    assert len(out.tokens) == counts.tokens
    assert set((out.positions // (counts.tokens // 3)).tolist()) >= {0}


@pytest.mark.parametrize("name", [*NAMES, "dycoke", "visionzip"])
def test_states_of_earlier_layers_stay_with_their_token_and_decide_nothing(name: str) -> None:
    method = by_name(name, {"retention_ratio": 0.5})
    own = torch.randn(4, 40, 6, generator=torch.Generator().manual_seed(0))
    behind = 100 * torch.randn(4, 40, 12, generator=torch.Generator().manual_seed(1))
    relevance = torch.rand(4, 40, generator=torch.Generator().manual_seed(2))
    state: Any = Mock(vision=Mock(own=lambda seen: seen[..., :6]))
    tokens, positions = method.choose(torch.cat([own, behind], -1), relevance, state)
    state.vision.own = lambda seen: seen
    alone, places = method.choose(own, relevance, state)
    assert torch.equal(positions, places)
    assert torch.equal(tokens[:, :6], alone)
    at = behind.flatten(0, 1)[positions]
    assert name == "visionzip" or torch.equal(tokens[:, 6:], at)
    spoilt, where = method.choose(torch.cat([own, behind], -1), relevance, state)  # negative control
    assert not torch.equal(where, places) or not torch.equal(spoilt[:, :6], alone)


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("evs", {"faithful": True}, "evs is one rule"),
        ("vidcom2", {"faithful": True}, "vidcom2 follows a description"),
        ("vidcom2", {"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_settings_of_no_sense(name: str, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        by_name(name, settings)
