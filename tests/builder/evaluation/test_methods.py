"""The ways of getting visual tokens: shared passes change nothing, and controls are what they claim to be."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from builder.evaluation.methods import chosen, layer_choices, methods
from builder.evaluation.options import Merging
from builder.evaluation.passes import ClipPasses, VisionPass
from builder.evaluation.ways.row import Row, Visual
from earlytom import encode_video
from earlytom.budget import token_count
from earlytom.cells.config import CellsConfig
from earlytom.cells.select import affinity, saliency, select_rounds
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.families import geometry
from earlytom.methods.cells import Cells
from earlytom.methods.earlytom import EarlyTom
from earlytom.micro.data import labelled_clip
from earlytom.standing import frame_times
from runtime.checkpoint import describe, load_vision
from runtime.text.places import Placing
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


@pytest.mark.parametrize(
    ("layers", "schedule", "tau"),
    [
        ((2, 4, 6), "budget", 0.8),
        ((2, 4, 6), "adaptive", 0.95),
        ((3,), "budget", 0.95),
        ((3,), "adaptive", 0.8),
        ((), "budget", 0.8),
        ((), "adaptive", 0.95),
    ],
)
def test_a_selection_from_a_shared_pass_is_encode_video(layers: tuple[int, ...], schedule: str, tau: float) -> None:
    config = EarlyTomConfig(merge_layers=layers, schedule=schedule, tau=tau)  # type: ignore[arg-type]
    part, clip = load_vision(None), ClipPasses(vision(), frames(0), 0)
    pixels = frames(0).float() / 127.5 - 1
    for ratio in RATIOS:
        wanted = encode_video(part.vision_tower, part.projector, pixels, config.replace(retention_ratio=ratio))
        method = EarlyTom(config.replace(retention_ratio=ratio))
        done = clip.run(method)
        got = done.choose(method)
        assert got.tokens.shape == wanted.tokens.shape, ratio
        torch.testing.assert_close(got.tokens, wanted.tokens, rtol=1e-4, atol=1e-4)
        assert torch.equal(got.place, wanted.place), ratio
        torch.testing.assert_close(got.bias, wanted.bias)
        assert done.stages == wanted.frames_per_stage
    assert len(clip._done) == 1  # one pass for all ratios


@pytest.mark.parametrize("rounds", [None, 7])
def test_cells_from_a_shared_pass_are_encode_video(rounds: int | None) -> None:
    """Tokens, and what they stand for; other rounds and powers share or do not share the pass."""
    config = CellsConfig(merge_layers=(2, 4, 6), rounds=rounds)
    part, clip = load_vision(None), ClipPasses(vision(), frames(0), 0)
    pixels = frames(0).float() / 127.5 - 1
    for ratio in (0.5, 0.05, 0.3, 0.1):
        method = Cells(config.replace(retention_ratio=ratio))
        wanted = encode_video(part.vision_tower, part.projector, pixels, method)
        got = clip.run(method).choose(method)
        torch.testing.assert_close(got.tokens, wanted.tokens, rtol=1e-4, atol=1e-4)
        assert torch.equal(got.place, wanted.place), ratio
        torch.testing.assert_close(got.bias, wanted.bias)
    assert len(clip._done) == 1
    other = Cells(config.replace(retention_ratio=0.1, power=0.0))
    assert not torch.equal(clip.run(other).choose(other).tokens, got.tokens)
    assert len(clip._done) == 2


def test_rows_of_cells() -> None:
    """By the settings that they are given; the same tokens where only what is told differs."""
    rows = methods(BASE, DEPTH, cells=CellsConfig(merge_layers=(2, 4, 6), power=1.0, rounds=3))
    for name, rounds in (("cells-rounds", 3), ("cells-greedy", None), ("cells-plain", 3)):
        method = Cells(CellsConfig(0.1, (2, 4, 6), power=1.0, rounds=rounds))
        wanted = shared(0).run(method).choose(method)
        got = rows[name].visual(shared(0), 0.1)
        assert torch.equal(got.tokens, wanted.tokens), name
        assert got.place is not None
        assert torch.equal(got.place, wanted.place), name
        assert (got.stages, got.merge_layers) == ((16, 12, 9, 7), (2, 4, 6))
    assert [rows[name].told for name in ("cells-rounds", "cells-plain", "budget", "budget-bias")] == [
        Placing(original=True, bias=True),
        Placing(),
        Placing(),
        Placing(bias=True),
    ]
    assert rows["cells-rounds"].title == "cells, 3 rounds"


@pytest.mark.parametrize(("name", "layers"), [("diverse", (2, 4, 6)), ("selection-diverse", ())])
def test_diverse_tokens_of_frames_that_earlytom_leaves(name: str, layers: tuple[int, ...]) -> None:
    """As many tokens as EarlyTom has of the same frames, taken as "cells" takes them; EarlyTom's are others."""
    earlytom = EarlyTom(BASE.replace(merge_layers=layers, schedule="budget", retention_ratio=0.1))
    done = shared(0).run(earlytom)
    got = visual(name, 0.1)
    assert got.stages == done.stages
    time = frame_times(done.state.sources)[0].float()
    tokens = done.features.flatten(0, 1)
    alike = affinity(tokens, time.repeat_interleave(P), F).clamp(0, 1)
    wanted = tokens[select_rounds(saliency(tokens), alike, len(earlytom_tokens := done.choose(earlytom).tokens), 7)]
    assert torch.equal(got.tokens, wanted)
    assert not torch.equal(got.tokens, earlytom_tokens)
    assert len(visual(name, 1.0).tokens) == len(done.features) * P


def test_budgets_are_rows_of_both_methods() -> None:
    merging = Merging((1, 3, 5), (8, 6, 4))
    rows = methods(BASE, DEPTH, budgets=(merging, Merging((2, 4), 0.5)))
    assert [name for name, row in rows.items() if row.group == "budgets"] == [
        "cells@1,3,5:8,6,4",
        "budget@1,3,5:8,6,4",
        "cells@2,4:0.5",
        "budget@2,4:0.5",
    ]
    for name, told in (("cells", Placing(original=True, bias=True)), ("budget", Placing())):
        row = rows[f"{name}@{merging}"]
        seen = row.visual(shared(0), 0.1)
        assert (seen.stages, seen.merge_layers, len(seen.tokens)) == ((16, 8, 6, 4), (1, 3, 5), 40)
        assert row.told == told
        assert row.ratios((0.05, 0.1, 0.2)) == (0.05, 0.1)
    with pytest.raises(UserError, match="merge layer 9 does not exist"):
        methods(BASE, DEPTH, budgets=(Merging((9,), 0.5),))


def test_what_is_told_can_be_overruled() -> None:
    rows = methods(BASE, DEPTH, bias=True, original=False)
    assert {row.told for row in rows.values()} == {Placing(bias=True)}
    seen = visual("top-k", 0.1)
    assert seen.place is not None
    assert places(seen.tokens) == seen.place.tolist()
    kept = visual("frames", 0.1)
    assert kept.place is not None
    assert places(kept.tokens) == kept.place.tolist()
    assert kept.bias is None


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


def test_of_long_clips_fewer_frames_are_compared_too() -> None:
    """As many as the model was made for, first and last among them; the others are not encoded."""
    long = ClipPasses(vision(), torch.from_numpy(labelled_clip("validation", 3, length=2 * F).frames), 3)
    rows = methods(BASE, DEPTH, frames=2 * F)
    got = rows["fewer-frames"].visual(long, 1.0)
    assert long._done == {}
    assert (got.stages, len(got.tokens)) == ((F,), F * P)
    whole = rows["full"].visual(long, 1.0).tokens.unflatten(0, (2 * F, P))
    kept = [round(at * (2 * F - 1) / (F - 1)) for at in range(F)]
    torch.testing.assert_close(got.tokens, whole[kept].flatten(0, 1), rtol=1e-3, atol=1e-3)
    assert [row.name for row in chosen(rows, ["cells-rounds"])] == ["full", "fewer-frames", "cells-rounds"]
    assert "fewer-frames" not in known()


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
    assert names("earlytom") == ["full", "budget", "adaptive", "budget-bias"]
    assert names("cells") == ["full", "cells-rounds", "cells-greedy", "cells-plain", "cells-adaptive"]
    assert names("all") == [name for name, row in known().items() if row.group != "compared"]
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
