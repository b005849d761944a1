"""InternVL's own: towers of every kind, frames that are not square, prompts of several rows, what is refused."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from earlytom import EarlyTomConfig, UserError, apply_earlytom
from earlytom.encoder import encode
from earlytom.families import INTERNVL, geometry
from earlytom.families.internvl.tower import mean_pool, pixel_shuffle
from earlytom.methods.earlytom import EarlyTom
from tests.earlytom.tiny import VIDEO_TOKEN, made_video, tiny_internvl

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
ON = EarlyTomConfig(retention_ratio=0.5, merge_layers=(0, 1, 2), schedule="budget")
F = 5
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"use_qk_norm": True, "norm_type": "rms_norm"},  # as the largest published tower
    {"use_mean_pooling": False},
    {"attention_bias": False},
)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_tower_is_transformers_own_bit_for_bit(kind: dict[str, Any]) -> None:
    model, pixels = tiny_internvl(**kind), made_video("scenes", F, grid=4)
    seen = encode(INTERNVL.vision_of(model.model), pixels, EarlyTom(OFF), depth=4)
    assert torch.equal(seen.tokens, INTERNVL.own_tokens(model, pixels))
    parts: list[Any] = [*INTERNVL.modules(model.model)[:2]]
    assert INTERNVL.vision_weights(model.config) == sum(p.numel() for part in parts for p in part.parameters())
    assert not torch.equal(seen.tokens, INTERNVL.own_tokens(tiny_internvl(seed=1, **kind), pixels))  # negative control


@torch.no_grad()
def test_a_frame_need_not_be_square() -> None:
    """Each row of tokens is that of a square frame with the same patches, where no layer mixes them."""
    model, pixels = tiny_internvl(grid=(4, 6)), made_video("scenes", F, grid=(4, 6))
    frame = geometry(model.config)
    assert (frame.size, frame.grid, frame.cells, frame.tokens_per_frame) == ((16, 24), (4, 6), (2, 3), 6)
    seen = encode(INTERNVL.vision_of(model.model), pixels, EarlyTom(ON), depth=4)
    assert seen.hidden.shape[1:] == (24, 32)
    vision = INTERNVL.vision_of(model.model)
    hidden = torch.randn(2, 24, 32)
    features = vision.features(hidden, torch.rand(2, 24)).features.unflatten(1, (2, 3))
    blocks = hidden.unflatten(1, (4, 6))
    for row in range(2):
        for column in range(3):
            block = blocks[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)  # row by row
            torch.testing.assert_close(features[:, row, column], model.model.multi_modal_projector(block))


@torch.no_grad()
def test_pixel_shuffle_is_that_of_transformers() -> None:
    model, hidden = tiny_internvl(), torch.randn(3, 64, 5)
    wanted = model.model.pixel_shuffle(hidden.unflatten(1, (8, 8)), scale_factor=0.5).flatten(1, 2)
    assert torch.equal(pixel_shuffle(hidden, (8, 8), 2), wanted)
    torch.testing.assert_close(mean_pool(hidden, (8, 8), 2), wanted.unflatten(2, (4, 5)).mean(2))
    assert not torch.equal(pixel_shuffle(hidden, (4, 16), 2), wanted)


def rows(*frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of videos of so many frames, padded on the left, and their mask; frame n is introduced by 20 + n."""
    spans = [[20 + number, *[VIDEO_TOKEN] * 4, 9] for number in range(max(frames))]
    texts = [[1, *chain(*spans[:count]), 3] for count in frames]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])


def test_prompts_of_a_batch_are_shortened_one_by_one() -> None:
    model, videos = tiny_internvl(), [made_video("scenes", count, grid=4, seed=count) for count in (5, 3)]
    ids, mask = rows(5, 3)
    with apply_earlytom(model, ON) as applied:
        short, short_mask, embeds = applied.shorten(ids, mask, torch.cat(videos))
        for at, count in enumerate((5, 3)):
            alone, _, alone_embeds = applied.shorten(rows(count)[0], None, videos[at])
            kept = short_mask[at].bool()
            assert short[at, kept].tolist() == alone[0].tolist()
            assert torch.equal(embeds[at, kept], alone_embeds[0])
            named = [token for token in alone[0].tolist() if 20 <= token < 40]
            assert named[0] == 20
            assert named == sorted(set(named))
            assert len(named) < count


@pytest.mark.parametrize(
    ("frames", "prompt", "line"),
    [
        (4, (5,), "the prompt has 20 placeholders, but 4 frame\\(s\\) take 4 each"),
        (5, (5, 0), "the prompt has 20, 0 placeholders, but 5 frame\\(s\\) take 4 each"),
    ],
)
def test_pixels_that_do_not_fit_the_prompt_are_refused(frames: int, prompt: tuple[int, ...], line: str) -> None:
    with apply_earlytom(tiny_internvl(), ON) as applied, pytest.raises(UserError, match=line):
        applied.shorten(*rows(*prompt), made_video("noise", frames, grid=4))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer must be -1"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'default'"),
    ],
)
def test_features_of_another_layer_are_refused(change: dict[str, Any], line: str) -> None:
    config = tiny_internvl().config
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=line):
        geometry(config)


@pytest.mark.parametrize(
    ("vision", "line"),
    [
        ({"grid": (4, 5)}, "4 x 5 patches, expected even numbers"),
        ({"patch_size": [4, 8]}, "patches must be square, got 4 x 8"),
        ({"use_absolute_position_embeddings": False}, "use_absolute_position_embeddings must be true"),
    ],
)
def test_other_towers_are_refused(vision: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        geometry(tiny_internvl(**vision).config)


def test_another_ratio_of_tokens_to_patches_is_refused() -> None:
    with pytest.raises(UserError, match=r"downsample_ratio must be 0\.5, got 0\.25"):
        INTERNVL.check({"downsample_ratio": 0.25})


@pytest.mark.parametrize(
    ("name", "vision", "llm"), [("internvl3-1b", 308_600_000, 896), ("internvl3-8b", 331_600_000, 3584)]
)
def test_published_configurations_are_those_of_the_models(name: str, vision: int, llm: int) -> None:
    config = INTERNVL.published[name]()
    frame = geometry(config)
    assert (frame.size, frame.grid, frame.tokens_per_frame, frame.llm_width) == ((448, 448), (32, 32), 256, llm)
    assert INTERNVL.vision_weights(config) == pytest.approx(vision, rel=1e-3)
    assert INTERNVL.vision_flops(config, (1,), ()) / 1e9 == pytest.approx(
        724 + INTERNVL.projector_flops(config, 1) / 1e9, abs=1
    )
