"""The ways of getting visual tokens: shared passes change nothing, and controls are what they claim to be."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from builder.evaluation.methods import Row, Visual, chosen, layer_choices, methods
from builder.evaluation.passes import ClipPasses, VisionPass
from earlytom import encode_video
from earlytom.budget import token_count
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.families import geometry
from earlytom.methods.earlytom import EarlyTom
from earlytom.micro.data import labelled_clip
from runtime.checkpoint import describe, load_vision
from runtime.vision.torch import TorchVision

BASE = EarlyTomConfig(merge_layers=(2, 4, 6))
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)
F, P, DEPTH = 16, 25, 8


@lru_cache
def vision() -> VisionPass:
    return VisionPass(load_vision(None), describe(None))


@lru_cache
def frames(number: int) -> Tensor:
    return torch.from_numpy(labelled_clip("test", number).frames)


@lru_cache
def shared(number: int) -> ClipPasses:
    """A clip whose passes all tests share, as all methods share them."""
    return ClipPasses(vision(), frames(number), number)


@lru_cache
def known() -> dict[str, Row]:
    return methods(BASE, DEPTH)


def visual(name: str, ratio: float, number: int = 0) -> Visual:
    return known()[name].visual(shared(number), ratio)


def tokens_of(config: EarlyTomConfig, number: int) -> Tensor:
    """By the runtime's reference backend, which encodes the clip for this setting alone."""
    backend = TorchVision(describe(None), config, (F, 3, 72, 72), device=torch.device("cpu"), dtype=torch.float32)
    return backend.encode(frames(number))[0]


# Shared passes


@pytest.mark.parametrize("tau", [0.8, 0.95])
@pytest.mark.parametrize("schedule", ["budget", "adaptive"])
@pytest.mark.parametrize("layers", [(2, 4, 6), (3,), ()])
def test_a_selection_from_a_shared_pass_is_encode_video(layers: tuple[int, ...], schedule: str, tau: float) -> None:
    config = EarlyTomConfig(merge_layers=layers, schedule=schedule, tau=tau)  # type: ignore[arg-type]
    part, clip = load_vision(None), ClipPasses(vision(), frames(0), 0)
    pixels = frames(0).float() / 127.5 - 1
    for ratio in RATIOS:
        wanted = encode_video(part.vision_tower, part.projector, pixels, config.replace(retention_ratio=ratio))
        method = EarlyTom(config.replace(retention_ratio=ratio))
        done = clip.run(method)
        got = done.choose(method)
        assert got.shape == wanted.tokens.shape, ratio
        torch.testing.assert_close(got, wanted.tokens, rtol=1e-4, atol=1e-4)
        assert done.stages == wanted.frames_per_stage
    assert len(clip._done) == 1  # one pass for all ratios


@pytest.mark.parametrize("number", [0, 1])
def test_methods_are_the_reference_backend(number: int) -> None:
    """Bit by bit, with its own normalisation and depth; another setting gives others (negative control)."""
    for name, config in (
        ("full", BASE.replace(merge_layers=(), retention_ratio=1.0)),
        ("merging", BASE.replace(schedule="budget", retention_ratio=1.0)),
        ("merging-adaptive", BASE.replace(retention_ratio=1.0)),
        ("budget", BASE.replace(schedule="budget", retention_ratio=0.2)),
        ("adaptive", BASE.replace(retention_ratio=0.2)),
        ("selection", BASE.replace(merge_layers=(), schedule="budget", retention_ratio=0.2)),
        ("layers-1-3-5", BASE.replace(merge_layers=(1, 3, 5), schedule="budget", retention_ratio=0.2)),
        ("layers-4", BASE.replace(merge_layers=(4,), schedule="budget", retention_ratio=0.2)),
    ):
        got = visual(name, 0.2, number).tokens
        assert torch.equal(got, tokens_of(config, number)), name
        if name in ("budget", "adaptive", "layers-4"):
            other = tokens_of(config.replace(merge_layers=(5,)), number)
            assert got.shape != other.shape or not torch.allclose(got, other), name


def test_depth_is_the_models() -> None:
    assert vision().depth == geometry(describe(None).config).depth == DEPTH
    assert vision().cells == P


# Controls


@pytest.mark.parametrize("ratio", RATIOS)
def test_controls_have_as_many_tokens_as_earlytom(ratio: float) -> None:
    wanted = token_count(F, P, ratio)
    assert len(visual("budget", ratio).tokens) == wanted
    assert len(visual("random", ratio).tokens) == wanted
    assert len(visual("top-k", ratio).tokens) == wanted
    kept = visual("frames", ratio)
    assert len(kept.tokens) == P * math.ceil(wanted / P)
    assert kept.stages == (math.ceil(wanted / P),)
    assert 0.9 * wanted < len(visual("pooling", ratio).tokens) <= wanted
    assert len(visual("pooling-space", ratio).tokens) <= wanted


@pytest.mark.parametrize("budget", [0.5, (16, 10, 4)])
def test_controls_follow_the_frame_budget(budget: float | tuple[int, ...]) -> None:
    found = methods(BASE.replace(frame_budget=budget), DEPTH)
    wanted = token_count(F, P, 0.1, frame_budget=budget)
    assert wanted != token_count(F, P, 0.1)
    for name in ("budget", "random", "top-k"):
        assert len(found[name].visual(shared(0), 0.1).tokens) == wanted, name
    assert found["layers-4"].visual(shared(0), 0.1).stages == (16, 8 if budget == 0.5 else 10)


def places(tokens: Tensor) -> list[int]:
    """Where tokens are in the whole clip, to rounding (passes of different kinds differ in the last bits)."""
    whole = visual("full", 1.0).tokens
    distance = torch.cdist(tokens, whole, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distance.amin(1).max()) < 1e-3 * float(tokens.norm(dim=1).mean())
    found: list[int] = distance.argmin(1).tolist()
    return found


@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_controls_choose_tokens_of_the_whole_clip_in_its_order(ratio: float) -> None:
    for name in ("random", "frames", "top-k"):
        found = places(visual(name, ratio).tokens)
        assert found == sorted(set(found)), name
    assert places(visual("random", ratio).tokens) != places(visual("top-k", ratio).tokens)


def test_random_tokens_follow_from_seed_clip_and_number() -> None:
    again = methods(BASE, DEPTH)["random"]
    other = methods(BASE, DEPTH, seed=1)["random"]
    first = visual("random", 0.1).tokens
    assert torch.equal(first, again.visual(shared(0), 0.1).tokens)
    assert not torch.equal(first, other.visual(shared(0), 0.1).tokens)
    renamed = ClipPasses(vision(), frames(0), 99)
    assert not torch.equal(first, again.visual(renamed, 0.1).tokens)


def test_random_tokens_come_from_everywhere() -> None:
    """Over many clips every place is as likely as any other."""
    clip = shared(0)
    counts = torch.zeros(F * P)
    for number in range(300):
        clip.number = number
        counts[places(known()["random"].visual(clip, 0.25).tokens)] += 1
    clip.number = 0
    share = counts / 300
    wanted = token_count(F, P, 0.25) / (F * P)
    assert abs(float(share.mean()) - wanted) < 1e-6
    assert float((share - wanted).abs().max()) < 5 * math.sqrt(wanted * (1 - wanted) / 300)


def test_dropped_frames_are_not_encoded() -> None:
    """Encoding some frames alone gives what the whole clip's pass gives for them."""
    alone = ClipPasses(vision(), frames(0), 0)
    got = known()["frames"].visual(alone, 0.2)
    assert alone._done == {}
    torch.testing.assert_close(got.tokens, visual("frames", 0.2).tokens, rtol=1e-3, atol=1e-3)
    whole = visual("full", 1.0).tokens.unflatten(0, (F, P))
    assert torch.equal(visual("frames", 0.2).tokens, whole[[0, 5, 10, 15]].flatten(0, 1))


def test_top_k_takes_the_highest_received_attention() -> None:
    """Against the deciding layer's own received attention of an encoding that merges after it, by brute force."""
    part = load_vision(None)
    pixels = frames(0).float() / 127.5 - 1
    config = EarlyTomConfig(1.0, (6,), schedule="budget", frame_budget=1.0)
    whole = encode_video(part.vision_tower, part.projector, pixels, config)
    assert whole.frames_per_stage == (F, F)
    side = math.isqrt(whole.received.shape[1])
    grid = whole.received.view(F, 1, side, side)
    relevance = torch.nn.functional.interpolate(grid, size=(5, 5), mode="bilinear").flatten().tolist()
    best = sorted(sorted(range(F * P), key=lambda place: -relevance[place])[: token_count(F, P, 0.1)])
    assert places(visual("top-k", 0.1).tokens) == best


# Names and choices


def test_choices_of_merge_layers() -> None:
    assert layer_choices((2, 4, 6), 8) == [(1, 3, 5), (3, 5, 7), (2,), (4,), (6,), (2, 4), (2, 6), (4, 6)]
    assert layer_choices((0, 3), 4) == [(0,), (3,)]  # neither earlier nor later
    assert layer_choices((), 8) == []


def test_ratios_of_methods() -> None:
    ratios = (0.05, 0.1, 0.25)
    assert known()["full"].ratios(ratios) == (None,)
    assert known()["budget"].ratios(ratios) == ratios
    assert known()["layers-4"].ratios(ratios) == (0.1,)
    assert known()["layers-4"].ratios((0.3, 0.5)) == (0.3, 0.5)


def test_methods_are_chosen_by_name_and_by_group() -> None:
    def names(*words: str) -> list[str]:
        return [method.name for method in chosen(known(), words)]

    assert names("random", "budget", "random") == ["full", "budget", "random"]
    assert names("earlytom") == ["full", "budget", "adaptive"]
    assert names("all") == list(known())
    assert set(names("controls")) == {"full", "random", "frames", "top-k", "pooling", "pooling-space"}
    with pytest.raises(UserError, match="no method named 'nonsense'"):
        names("budget", "nonsense")


def test_a_layer_that_the_tower_lacks() -> None:
    with pytest.raises(UserError, match="merge layer 9 does not exist"):
        methods(EarlyTomConfig(merge_layers=(2, 9)), DEPTH)


def test_without_merging_there_is_nothing_to_compare_layers_with() -> None:
    found = methods(EarlyTomConfig(merge_layers=(), frame_budget=0.75), DEPTH)
    assert not [name for name in found if name.startswith("layers")]
    assert len(found["top-k"].visual(shared(0), 0.1).tokens) == F * 3
