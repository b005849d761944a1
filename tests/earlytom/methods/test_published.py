"""What holds for every published method on a real clip: the bundled model's tokens, about as many as asked for."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom import encode_video
from earlytom.encoder import VisualTokens
from earlytom.inner import InnerSettings
from earlytom.methods import METHODS, by_name
from earlytom.methods.published.compressing import Compressing
from earlytom.micro.data import labelled_clip
from runtime.checkpoint import describe, load_vision

DEPTH = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "tome": {"each": 4, "depth": DEPTH},
    "tempme": {"each": 2, "depth": DEPTH, "merge_layers": (3, 5)},
}
SETTINGS["tempme"]["groups"] = (2, 2)
PUBLISHED = sorted(name for name, kind in METHODS.items() if issubclass(kind, Compressing))
every = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(scope="module")
def clip() -> Tensor:
    values = describe(None).preprocessing
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (values.mean, values.std))
    return (torch.from_numpy(labelled_clip("validation", 0).frames).float() / 255 - mean) / std


vision = functools.cache(lambda: load_vision(None))


def seen(clip: Tensor, name: str, **settings: Any) -> VisualTokens:
    part = vision()
    method = by_name(name, SETTINGS.get(name, {}) | settings)
    return encode_video(part.vision_tower, part.projector, clip, method, depth=DEPTH)


@every
def test_about_as_many_tokens_as_asked_for(clip: Tensor, name: str) -> None:
    """Frames have 25 tokens, so a token a frame more or less is 4 %; three methods may stay well below their budget."""
    tokens = clip.shape[0] * 25
    for ratio in (0.25, 0.5):
        out = seen(clip, name, retention_ratio=ratio)
        if name == "fastv":  # all of them enter the language model
            assert len(out.tokens) == tokens
            continue
        least = 0.1 if name in ("unicomp", "flashvid", "holitom") else ratio - 0.05
        assert least * tokens <= len(out.tokens) <= (ratio + 0.05) * tokens
        assert out.tokens.isfinite().all()
        assert out.bias.isfinite().all()
        assert bool((out.place < tokens).all())


def test_fastv_leaves_out_and_folds_nothing() -> None:
    assert by_name("fastv", {"retention_ratio": 0.75}).inner == InnerSettings(2, 0.25, fold=False)


@every
def test_attention_is_read_off_the_last_layer(name: str) -> None:
    assert by_name(name, SETTINGS.get(name, {})).watched(DEPTH) in (None, DEPTH - 1)


@every
def test_tokens_have_the_scale_that_the_model_knows(clip: Tensor, name: str) -> None:
    whole = seen(clip, "visionzip", retention_ratio=1.0).tokens.norm(dim=1)
    own = seen(clip, name, retention_ratio=0.25).tokens.norm(dim=1)
    assert float(whole.min()) * 0.4 < float(own.mean()) < float(whole.max())
    if name == "vqtoken":  # negative control: the released codes
        released = seen(clip, name, retention_ratio=0.25, faithful=True).tokens.norm(dim=1)
        assert not float(whole.min()) * 0.4 < float(released.mean())


@every
def test_more_tokens_for_a_larger_ratio(clip: Tensor, name: str) -> None:
    if name == "fastv":
        ratios = [by_name(name, {"retention_ratio": ratio}).inner for ratio in (0.25, 0.6)]
        assert [one.ratio for one in ratios if one is not None] == [0.75, 0.4]
        return
    counts = [len(seen(clip, name, retention_ratio=ratio).tokens) for ratio in (0.25, 0.6)]
    assert counts[0] < counts[1] or (name == "unicomp" and counts[0] <= counts[1])


# Whose tokens come in another order than that of their places, as published: static tokens of a segment first; every
# anchor of frames with the tokens that are made of it.
OWN_ORDER = {"holitom", "bvllm-style"}


@every
def test_tokens_stand_in_the_order_of_their_places(clip: Tensor, name: str) -> None:
    out = seen(clip, name, retention_ratio=0.3)
    places = out.positions.tolist()
    assert min(places) >= 0
    if name not in OWN_ORDER:
        assert places == sorted(places)
    if name != "bvllm-style":  # two anchors may be of one frame
        assert len(set(places)) == len(places)


@every
def test_the_same_clip_gives_the_same_tokens(clip: Tensor, name: str) -> None:
    """And another clip others (negative control)."""
    one, again = (seen(clip, name, retention_ratio=0.3) for _ in range(2))
    assert torch.equal(one.tokens, again.tokens)
    assert torch.equal(one.positions, again.positions)
    other = seen(clip.flip(0), name, retention_ratio=0.3)
    assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)


SEEDED = {"holitom": False, "vqtoken": False, "fastvid": True}  # and whether in the released form alone


@pytest.mark.parametrize("name", SEEDED)
def test_noise_is_drawn_from_the_seed(clip: Tensor, name: str) -> None:
    """The same seed gives the same tokens; noise moves ties, and never how many tokens there are."""
    runs = [seen(clip, name, retention_ratio=0.3, faithful=SEEDED[name], seed=seed).tokens for seed in (0, 0, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert len({run.shape for run in runs}) == 1
    if name == "vqtoken":
        assert not torch.equal(runs[0], runs[2])
