"""Checkpoints in the original layout of LLaVA-NeXT: their tensors, their settings, what their files lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import SiglipVisionConfig, SiglipVisionModel

from earlytom import EarlyTomConfig, apply_earlytom
from earlytom.errors import UserError
from earlytom.families import family_of
from runtime.checkpoint import VisionPart, describe, load_decoder, load_model, load_tokenizer, load_vision
from runtime.text.prompt import build_prompt
from tests.earlytom.tiny import made_video
from tests.runtime.checkpoint.family_folders import family_folder
from tests.runtime.checkpoint.original_layout import LAYERS, original_folder
from tests.runtime.checkpoint.tiny_checkpoint import one_line

F = 3
OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
TOWER = "model.vision_tower.vision_tower.vision_model."


def published_tokens(folder: Path, state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Visual tokens of a video as the release makes them, from the stored tensors alone: the hidden states before the
    tower's last layer, two products, the pooling, newlines."""
    raw = json.loads((folder / "config.json").read_text())
    tower = SiglipVisionModel(SiglipVisionConfig(**raw["vision_config"], vision_use_head=False)).eval()
    stored = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
    lacking = tower.load_state_dict({n: v for n, v in stored.items() if not n.startswith("head.")}, strict=False)
    assert not lacking.unexpected_keys
    assert all(name.startswith(f"encoder.layers.{LAYERS}.") for name in lacking.missing_keys)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    for number in (0, 2):
        weight, bias = (state[f"model.mm_projector.{number}.{part}"] for part in ("weight", "bias"))
        hidden = functional.linear(functional.gelu(hidden) if number else hidden, weight, bias)
    side = int(hidden.shape[1] ** 0.5)
    grid = hidden.view(len(hidden), side, side, -1).permute(0, 3, 1, 2).contiguous()
    how = raw.get("mm_spatial_pool_mode", "bilinear")
    if how == "bilinear":
        grid = functional.interpolate(grid, size=(-(-side // 2), -(-side // 2)), mode="bilinear")
    else:
        grid = (functional.avg_pool2d if how == "average" else functional.max_pool2d)(grid, 2)
    newline, shown = state["model.image_newline"], []
    where = raw.get("mm_newline_position", "one_token")
    for frame in grid.permute(0, 2, 3, 1):  # [rows, columns, E]
        for row in frame:
            shown += [*row, *[newline] * (where == "grid")]
        shown += [newline] * (where == "frame")
    return torch.stack([*shown, *[newline] * (where == "one_token")])


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "spare", "count"),
    [
        ({}, False, 3 * 9 + 1),
        ({"mm_newline_position": "grid"}, False, 3 * 3 * (3 + 1)),
        ({"model_type": "llava", "mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}, True, 3 * 2 * 3),
        ({"mm_spatial_pool_mode": "max", "mm_spatial_pool_stride": 2, "mm_newline_position": "frame"}, False, 3 * 5),
        ({"mm_newline_position": "no_token"}, False, 3 * 9),
    ],
)
def test_its_tokens_are_those_of_the_release(tmp_path: Path, settings: dict[str, Any], spare: bool, count: int) -> None:
    folder, made, state = original_folder(tmp_path / "given", spare=spare, **settings)
    found, pixels = describe(folder), made_video("scenes", F)
    found.check_weights()
    whole, family = load_model(found), found.family
    tokens = family.own_tokens(whole, pixels)
    assert torch.equal(tokens, published_tokens(folder, state, pixels))
    assert len(tokens) == family.placeholders(found.config, F) == count
    assert not torch.equal(tokens, published_tokens(folder, state, pixels.flip(0)))  # negative control
    with apply_earlytom(whole, OFF) as applied:
        assert torch.equal(applied.features([pixels])[0], tokens)
    ids = torch.arange(5, 40)[None]
    assert torch.equal(whole(input_ids=ids).logits, made(input_ids=ids).logits)
    part, decoder = load_vision(found), load_decoder(found)
    wanted = VisionPart.from_model(made).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in part.state_dict().items())
    assert part.state_dict().keys() == wanted.keys()
    language = made.get_decoder().state_dict()
    assert all(torch.equal(value, language[name]) for name, value in decoder.get_decoder().state_dict().items())


def test_saved_again_by_transformers_it_is_the_same_checkpoint(tmp_path: Path) -> None:
    folder, _, _ = original_folder(tmp_path / "given", spare=True)
    saved, _ = family_folder(tmp_path / "saved", "llava_qwen")
    (saved / "preprocessor_config.json").unlink()
    assert describe(folder).digest() == describe(saved).digest()
    pooled, _, _ = original_folder(tmp_path / "pooled", mm_spatial_pool_mode="average")
    assert describe(folder).digest() != describe(pooled).digest()


@pytest.mark.parametrize("kind", ["llava_qwen", "llava"])
def test_what_its_files_lack_is_what_the_release_has_in_code(tmp_path: Path, kind: str) -> None:
    folder, made, _ = original_folder(tmp_path / "given", model_type=kind)
    found = describe(folder)
    assert found.preprocessing.size == (made.config.vision_config.image_size,) * 2
    assert found.preprocessing.mean == found.preprocessing.std == (0.5, 0.5, 0.5)
    assert (found.preprocessing.sampling, found.frames) == ("ends", 64)
    tokenizer = load_tokenizer(found)
    words = build_prompt(tokenizer, "What happens?", family=family_of(found.config))
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    after = "\nWhat happens?<|im_end|>\n<|im_start|>assistant\n"
    # The release tokenizes what is before the video and what is behind it by themselves.
    assert list(words.prefix_ids) == tokenizer(before)["input_ids"]
    assert list(words.suffix_ids) == tokenizer(after)["input_ids"]
    assert words.video_token_id == found.config.video_token_id == tokenizer.convert_tokens_to_ids("<image>")
    other = build_prompt(tokenizer, "What happens?", system="Be brief.", family=family_of(found.config))
    assert tokenizer.decode(other.prefix_ids) == before.replace("You are a helpful assistant.", "Be brief.")


@pytest.mark.parametrize("given", ["absent", -200, True])
def test_without_an_id_the_visual_token_has_the_last_one(tmp_path: Path, given: Any) -> None:
    folder, _, _ = original_folder(tmp_path / "given", image_token_index=given)
    assert load_tokenizer(folder).convert_tokens_to_ids("<image>") == 1299


def test_an_id_that_is_another_tokens_is_refused(tmp_path: Path) -> None:
    folder, _, _ = original_folder(tmp_path / "given", image_token_index=7)
    with pytest.raises(UserError, match="its tokenizer has the id None for <image>, and config") as error:
        load_tokenizer(folder)
    one_line(error)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode must be bilinear or average or max, got 'conv'"),
        ({"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride must be 2 or None, got 4"),
        ({"mm_patch_merge_type": "absent"}, "mm_patch_merge_type must be spatial_unpad, it is missing, which means"),
        ({"mm_projector_type": "linear"}, "mm_projector_type must be mlp2x_gelu, got 'linear'"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type must be None, got 'perceiver'"),
        ({"add_time_instruction": "yes"}, "add_time_instruction must be False or True or None, got 'yes'"),
        ({"add_faster_video": True}, "add_faster_video must be False or None, got True"),
        ({"mm_newline_position": "row"}, "mm_newline_position must be .*one_token.*, got 'row'"),
        ({"vision_config": None}, "mm_vision_tower must be siglip-so400m-patch14-384, got 'some/siglip': for another"),
        ({"vision_config": {"num_hidden_layers": 1e30}}, "num_hidden_layers of vision_config must be a whole number"),
        ({"vision_config": {"hidden_size": 1 << 40, "num_hidden_layers": 3}}, "hidden_size must be a whole number"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"hidden_size": 1 << 40}, "hidden_size must be a whole number"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}, "model family 'llava' is not supported"),
    ],
)
def test_settings_without_code_are_refused(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    folder, _, _ = original_folder(tmp_path / "given", **settings)
    with pytest.raises(UserError, match=line) as error:
        describe(folder)
    one_line(error)


@pytest.mark.parametrize("name", ["model.mm_projector.0.weight", f"{TOWER}embeddings.patch_embedding.weight"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    folder, _, state = original_folder(tmp_path / "given")
    file = folder / "model.safetensors"
    for changed, line in (
        ({n: v for n, v in state.items() if n != name}, "missing tensors in the weights"),
        (state | {name: state[name][:1].clone()}, "has the shape"),
        (state | {name: torch.full_like(state[name], torch.nan)}, "holds NaN"),
        (state | {f"{name}.more": torch.zeros(1)}, "unexpected tensors"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=line) as error:
            load_model(folder)
        one_line(error)
