"""SmolVLM2's own: grids and scales of the published models, the texts of its prompts, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.smolvlm import processing_smolvlm as processing
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from earlytom import EarlyTomConfig, UserError, apply_earlytom
from earlytom.encoder import encode
from earlytom.families import FrameTimes, geometry
from earlytom.families.smolvlm import SMOLVLM
from earlytom.families.words import in_words
from earlytom.methods.earlytom import EarlyTom
from tests.earlytom.tiny import made_video, tiny_smolvlm

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
ON = EarlyTomConfig(retention_ratio=0.5, merge_layers=(0, 1, 2), schedule="budget")
F = 5


@pytest.mark.parametrize(("grid", "side"), [(4, 2), (6, 3), (8, 4), (6, 1)])
@torch.no_grad()
def test_every_scale_is_transformers_own_bit_for_bit(grid: int, side: int) -> None:
    model, pixels = tiny_smolvlm(grid=grid, side=side), made_video("scenes", F, grid=grid)
    seen = encode(SMOLVLM.vision_of(model.model), pixels, EarlyTom(OFF))
    assert torch.equal(seen.tokens, SMOLVLM.own_tokens(model, pixels))
    assert len(seen.tokens) == F * geometry(model.config).tokens_per_frame == F * (grid // side) ** 2
    assert not torch.equal(seen.tokens, SMOLVLM.own_tokens(tiny_smolvlm(grid=grid, side=side, seed=1), pixels))


@pytest.mark.parametrize("grid", [27, 32])
@torch.no_grad()
def test_patches_of_the_published_grids_have_positions_of_their_own(grid: int) -> None:
    sizes: Any = {"hidden_size": 2, "num_attention_heads": 1, "image_size": 2 * grid, "patch_size": 2}
    embeddings = SmolVLMVisionEmbeddings(SmolVLMVisionConfig(**sizes))
    torch.nn.init.zeros_(embeddings.patch_embedding.weight)
    torch.nn.init.zeros_(embeddings.patch_embedding.bias)  # type: ignore[arg-type]
    mask = torch.ones(1, grid, grid, dtype=torch.bool)
    found = embeddings(torch.zeros(1, 3, 2 * grid, 2 * grid), mask)[0]
    assert torch.equal(found, embeddings.position_embedding.weight)
    assert not torch.equal(found, embeddings.position_embedding.weight.flip(0))  # negative control


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "one"), (8, "eight"), (12, "twelve"), (20, "twenty"), (32, "thirty-two"), (64, "sixty-four"),
        (100, "one hundred"), (101, "one hundred and one"), (128, "one hundred and twenty-eight"),
        (777, "seven hundred and seventy-seven"), (1000, "one thousand"), (1024, "one thousand and twenty-four"),
        (2112, "two thousand, one hundred and twelve"), (10000, "ten thousand"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_the_processor_s_library_writes_them(number: int, words: str) -> None:
    assert in_words(number) == words


def test_the_texts_are_the_longest_until_times_are_known() -> None:
    times = FrameTimes((0.0, 59.9, 61.0, 3599.0), 3600.4)
    texts = [SMOLVLM.before_frame(at, times) for at in range(4)]
    ends = "<fake_token_around_image><global-img>"
    assert texts == [f"\nFrame from {when}:{ends}" for when in ("00:00", "00:59", "01:01", "59:59")]
    assert "series of four frames from a 1:00:00 [H:MM:SS] video" in SMOLVLM.before_video(times)
    assert len(SMOLVLM.before_video(None)) > len(SMOLVLM.before_video(times))
    assert len(SMOLVLM.before_frame(0)) > max(map(len, texts))
    assert SMOLVLM.after_video() == processing.DEFAULT_MEDIA_OUTTRO


def test_a_batch_is_shortened_prompt_by_prompt() -> None:
    """Two prompts of one length, as the processor pads videos to one number of frames."""
    model = tiny_smolvlm()
    videos = torch.stack([made_video("scenes", F, grid=8, seed=seed) for seed in (0, 1)])
    spans = [token for number in range(F) for token in (20 + number, *[127] * 4, 9)]
    ids = torch.tensor([[1, *spans, 3]] * 2)
    with apply_earlytom(model, ON) as applied:
        short, mask, embeds = applied.shorten(ids, None, videos)
        for at in range(2):
            alone, _, alone_embeds = applied.shorten(ids[:1], None, videos[at : at + 1])
            kept = mask[at].bool()
            assert short[at, kept].tolist() == alone[0].tolist()
            assert torch.equal(embeds[at, kept], alone_embeds[0])
        assert short.shape[1] < ids.shape[1]
        with pytest.raises(UserError, match=r"pixel_values must be \[2, frames, 3, height, width\], got \[1, 5"):
            applied.shorten(ids, None, videos[:1])
        with pytest.raises(UserError, match=r"the prompt has 20 placeholders, but 4 frame\(s\) take 4 each"):
            applied.shorten(ids[:1], None, videos[:1, :4])


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"vision_config": {"image_size": [16, 32]}}, r"image_size and patch_size must be one number each, got \[16"),
        ({"vision_config": {"patch_size": None}}, "must be one number each, got 1 and None"),
    ],
)
def test_a_tower_that_is_not_square_is_refused(raw: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        SMOLVLM.check(raw)


@pytest.mark.parametrize(("factor", "line"), [(3, "8 x 8 patches, expected a multiple of scale_factor"), (0, "got 0")])
def test_a_scale_that_does_not_fit_is_refused(factor: int, line: str) -> None:
    config = tiny_smolvlm().config
    config.scale_factor = factor
    with pytest.raises(UserError, match=line):
        geometry(config)


def test_its_preprocessing_file_says_the_square_of_frames() -> None:
    raw = {
        "size": {"longest_edge": 2048},
        "max_image_size": {"longest_edge": 512},
        "resample": 1,
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
        "image_mean": [0.5, 0.5, 0.5],
    }
    found = SMOLVLM.preparation(raw)
    assert (found["size"], found["resample"], found["num_frames"]) == (512, 3, 64)
    assert found["image_mean"] == raw["image_mean"]
    assert SMOLVLM.preparation({"size": 3, "resample": 2}) == {"size": 3, "resample": 2}


@pytest.mark.parametrize(
    ("name", "vision", "tokens", "llm"),
    [("smolvlm2-500m", 86_433_024 + 12288 * 960, 64, 960), ("smolvlm2-2.2b", 412_987_248 + 10368 * 2048, 81, 2048)],
)
def test_published_configurations_are_those_of_the_models(name: str, vision: int, tokens: int, llm: int) -> None:
    config = SMOLVLM.published[name]()
    frame = geometry(config)
    assert (frame.tokens_per_frame, frame.llm_width, frame.cells) == (tokens, llm, SMOLVLM.cells(frame.grid))
    assert SMOLVLM.vision_weights(config) == vision
