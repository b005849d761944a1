"""ToMe and TempMe's schedule around a whole vision part: inside the tower, and behind the projector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from earlytom import UserError
from earlytom.bipartite import match, reduce
from earlytom.encoder import VisualTokens, encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.methods.published.tempme import TempMe, ToMe
from tests.earlytom.tiny import FAMILIES, made_video, tiny_projector, tiny_tower

INSIDE: dict[str, Any] = {"depth": 4, "each": 2, "merge_layers": (1, 3), "groups": (2, 2), "within": 10}


def seen(
    method: ToMe | TempMe, video: Tensor, family: str = "siglip", trace: dict[str, Tensor] | None = None
) -> VisualTokens:
    vision = LLAVA_ONEVISION.vision(tiny_tower(family), tiny_projector())
    return encode(vision, video, method, trace=trace)


# --- behind the projector


@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_reducing(free: int, protected: int, target: int, forgetful: bool, listed: bool, seed: int) -> None:
    values = torch.randn(2, protected + free, 4, generator=torch.Generator().manual_seed(seed))
    if target <= protected:
        with pytest.raises(UserError, match=f"at least {protected + 1} of"):
            reduce(values, target, protected=protected)
        return
    out = reduce(values, target, protected=protected, forgetful=forgetful, listed_by_similarity=listed)
    count = min(target, protected + free)
    assert out.values.shape == (2, count, 4)
    assert out.size.sum(1).tolist() == [protected + free] * 2
    assert all(len(set(place)) == count for place in out.place.tolist())
    torch.testing.assert_close(out.values[:, :protected], values[:, :protected])
    if not forgetful:
        torch.testing.assert_close((out.values * out.size[..., None]).sum(1), values.sum(1), atol=1e-4, rtol=1e-4)
    alone = out.size == 1
    own = values.gather(1, out.place[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(out.values[alone], own[alone])


@pytest.mark.parametrize("frames", [1, 3, 8])
@pytest.mark.parametrize("kind", ["scenes", "still", "noise"])
def test_counts_are_known_beforehand(kind: str, frames: int) -> None:
    for method in (ToMe(0.3), ToMe(0.3, True), TempMe(0.3, groups=(2, 2), merge_layers=(1, 2))):
        out = seen(method, made_video(kind, frames))
        counts = method.counts(frames, 9)
        assert (out.frames_per_stage, len(out.tokens)) == (counts.stages, counts.tokens)
        assert out.positions.tolist() == sorted(set(out.positions.tolist()))


def test_tome_merges_within_frames_and_tempme_across() -> None:
    video = made_video("still", 8)
    within, over = seen(ToMe(0.25), video), seen(TempMe(0.25, groups=(2, 2), merge_layers=(1, 2)), video)
    assert [int((within.positions // 9 == f).sum()) for f in range(8)] == [2] * 8
    trace: dict[str, Tensor] = {}
    seen(ToMe(1.0), video, trace=trace)
    features = trace["features"]
    assert len(over.tokens) == 2 * 9  # four copies of a frame become one: nothing is lost
    torch.testing.assert_close(over.tokens.sort(0).values[::2], features[0].sort(0).values, atol=1e-4, rtol=1e-4)


def test_the_released_form_protects_the_first_token_of_a_frame() -> None:
    trace: dict[str, Tensor] = {}
    out = seen(ToMe(0.3, True), made_video("noise", 4), trace=trace)
    first = out.positions % 9 == 0
    assert int(first.sum()) == 4
    torch.testing.assert_close(out.tokens[first], trace["features"][:, 0])


# --- inside the tower


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merging_nothing_is_the_untouched_tower(family: str) -> None:
    video = made_video("scenes", 4)
    method = TempMe(1.0, depth=4, merge_layers=(1,), groups=(1,), across=0, within=0)
    out, plain = seen(method, video, family), seen(ToMe(1.0), video, family)
    assert torch.equal(out.hidden, plain.hidden)
    assert torch.equal(out.sources, torch.eye(4))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_layer_merges_what_the_schedule_says(family: str) -> None:
    """Against a loop over layers that keeps the tokens' members as sets."""
    video, tower = made_video("scenes", 8), tiny_tower(family)
    method = TempMe(0.3, **INSIDE)
    vision = LLAVA_ONEVISION.vision(tower, tiny_projector())
    out = encode(vision, video, method)
    prefix, hidden = vision.tower.prefix, vision.tower.embed(video)
    plan = method._schedule().plan(8, hidden.shape[1], 4, protected=prefix)
    members = [[{(f, t)} for t in range(hidden.shape[1])] for f in range(8)]

    def merged(hidden: Tensor, count: int, protected: int) -> Tensor:
        found = match(hidden, count, protected=protected)
        size = torch.tensor([[len(one) for one in clip] for clip in members]).float()
        for clip, owner in zip(members, found.owner().tolist(), strict=True):
            new: list[set[tuple[int, int]]] = [set() for _ in range(len(owner) - count)]
            for one, to in zip(clip, owner, strict=True):
                new[to] |= one
            clip[:] = new
        return found.merge(hidden, size)[0]

    for layer, step in enumerate(plan):
        if step.group > 1:
            before = step.protected // step.group
            clips = [members[n : n + step.group] for n in range(0, len(members), step.group)]
            members = [
                [one for clip in some for one in clip[:before]] + [one for clip in some for one in clip[before:]]
                for some in clips
            ]
            grouped = hidden.unflatten(0, (-1, step.group))
            hidden = torch.cat([grouped[:, :, :before].flatten(1, 2), grouped[:, :, before:].flatten(1, 2)], 1)
            hidden = merged(hidden, step.across, step.protected)
        hidden, _ = vision.tower.run_layer(vision.tower.layers[layer], hidden)
        hidden = merged(hidden, step.within, step.protected)
        assert hidden.shape[:2] == (step.clips, step.tokens)
    sources = torch.zeros(8, 8)
    for n, clip in enumerate(members):
        for one, state in zip(clip, hidden[n], strict=True):
            for frame, token in one:
                if token >= prefix:
                    torch.testing.assert_close(out.hidden[frame, token - prefix], state, atol=1e-5, rtol=1e-5)
                    for other, _ in one:
                        sources[frame, other] += 1 / len(one) / 25
    torch.testing.assert_close(out.sources, sources)


def test_methods_that_run_alike_up_to_the_choice_say_so() -> None:
    assert TempMe(0.1, **INSIDE).tower_key() == TempMe(0.2, **INSIDE).tower_key()
    assert TempMe(0.1, **INSIDE).tower_key() != TempMe(0.1, **(INSIDE | {"within": 5})).tower_key()
    assert ToMe(0.1).tower_key() == TempMe(0.2).tower_key() != ToMe(0.1, depth=4, each=1).tower_key()


def test_another_depth_than_the_towers_is_refused() -> None:
    with pytest.raises(UserError, match="depth must be the 4 layers of the vision tower that run, got 3"):
        seen(ToMe(0.3, each=1, depth=3), made_video("noise", 2))
