"""Checkpoints of every family: under the names of any release of transformers, with the tokenizer beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from earlytom.errors import UserError
from earlytom.families import FAMILIES, geometry
from runtime.checkpoint import (
    PUBLISHED,
    RANDOM,
    VisionPart,
    describe,
    load_decoder,
    load_model,
    load_tokenizer,
    load_vision,
)
from runtime.checkpoint.language_model import load_embeddings, write_language_model
from tests.runtime.checkpoint.family_folders import MEAN, STD, family_folder
from tests.runtime.checkpoint.tiny_checkpoint import Rename, edit_json, middle_name, old_name, one_line, same_name

every = pytest.mark.parametrize("name", FAMILIES)


def head_name(name: str) -> str:
    return name.removeprefix("model.")


@every
@pytest.mark.parametrize("rename", [same_name, middle_name, old_name])
def test_names_old_and_new_are_one_checkpoint(tmp_path: Path, name: str, rename: Rename) -> None:
    if name == "smolvlm" and rename is old_name:  # its head was never inside of its language model
        rename = head_name
    folder, model = family_folder(tmp_path / "given", name, rename=rename)
    plain, _ = family_folder(tmp_path / "plain", name)
    found = describe(folder)
    assert found.digest() == describe(plain).digest()
    found.check_weights()
    part, whole = load_vision(found), VisionPart.from_model(model)
    assert part.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in part.state_dict().items())
    decoder, wanted = load_decoder(found), model.get_decoder().state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in decoder.get_decoder().state_dict().items())
    assert not any(hasattr(decoder.model, tower) for tower in ("vision_tower", "vision_model"))


def test_a_released_checkpoint_is_the_same_one(tmp_path: Path) -> None:
    """As first released: settings of the language model beside those of the tower, `model.layers`, and `visual`."""

    def released(name: str) -> str:
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")

    new, model = family_folder(tmp_path / "new", "qwen2_5_vl")
    old, _ = family_folder(tmp_path / "old", "qwen2_5_vl", rename=released)
    raw = json.loads((old / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (old / "config.json").write_text(json.dumps(text | raw))
    found = describe(old)
    assert found.digest() == describe(new).digest()
    assert found.config.text_config.rope_parameters["rope_theta"] == rope["rope_theta"]
    assert found.config.text_config.hidden_size == 32
    state: Any = load_model(old).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@every
def test_what_its_files_say_is_what_frames_are_prepared_by(tmp_path: Path, name: str) -> None:
    folder, model = family_folder(tmp_path / "given", name)
    found = describe(folder)
    assert found.preprocessing.size == geometry(model.config).size
    assert (found.preprocessing.mean, found.preprocessing.std) == (tuple(MEAN), tuple(STD))
    assert found.preprocessing.sampling == FAMILIES[name].sampling
    assert found.frames == FAMILIES[name].frames
    tokenizer = load_tokenizer(found)
    assert tokenizer.get_added_vocab()[FAMILIES[name].visual_token] == FAMILIES[name].video_token_id(model.config)


@every
@torch.no_grad()
def test_its_language_model_stands_alone(tmp_path: Path, name: str) -> None:
    """As other servers load it, beside the embeddings that make prompts."""
    folder, model = family_folder(tmp_path / "given", name)
    found, alone = load_embeddings(describe(folder), torch.float32), tmp_path / "alone"
    assert torch.equal(found.values, model.get_input_embeddings().weight)
    assert (found.closing is None) == (FAMILIES[name].closing_name is None)
    alone.mkdir()
    if FAMILIES[name].on_axes:
        with pytest.raises(UserError, match="which no server takes beside embeddings: ask with") as error:
            write_language_model(describe(folder), alone, torch.float32)
        assert "\n" not in str(error.value)
        return
    kind = type(model.get_decoder()).__name__.removesuffix("Model")
    assert write_language_model(describe(folder), alone, torch.float32).architecture == f"{kind}ForCausalLM"
    ids = torch.arange(5, 40)[None]
    loaded = AutoModelForCausalLM.from_pretrained(alone)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.equal(loaded(input_ids=ids + 1).logits, model(input_ids=ids).logits)  # negative control


@torch.no_grad()
def test_a_rope_that_could_grow_does_not_look_whether_it_must(tmp_path: Path) -> None:
    folder, model = family_folder(tmp_path / "given", "internvl")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    text = model.config.text_config.to_dict() | {"rope_parameters": rope}
    edit_json(folder / "config.json", text_config=text)
    whole, decoder = (load(folder).get_decoder() for load in (load_model, load_decoder))
    ids = torch.arange(5, 69)[None]
    assert (whole.rotary_emb.rope_type, decoder.rotary_emb.rope_type) == ("dynamic", "default")
    assert torch.equal(decoder(input_ids=ids).last_hidden_state, whole(input_ids=ids).last_hidden_state)


@every
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, name: str) -> None:
    folder, _ = family_folder(tmp_path / "given", name)
    edit_json(folder / "config.json", **dict.fromkeys(FAMILIES[name].token_ids, 5))
    with pytest.raises(UserError, match=r"its tokenizer has the id 129. for .*, and config.json says 5") as error:
        load_tokenizer(folder)
    one_line(error)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"image_size": [16, 0]}, "image_size must be a whole number between 1 and 4096, got 0"),
        ({"image_size": [2, 16]}, "vision_config has patches of"),
        ({"patch_size": [4, 8]}, "patches must be square, got 4 x 8"),
        ({"num_attention_heads": 3}, "vision_config has 3 heads, which do not divide 32"),
        ({"model_type": "siglip_vision_model"}, "is not"),
    ],
)
def test_a_tower_that_cannot_be_run_is_refused(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    folder, model = family_folder(tmp_path / "given", "internvl")
    edit_json(folder / "config.json", vision_config=model.config.vision_config.to_dict() | change)
    with pytest.raises(UserError, match=line) as error:
        describe(folder)
    one_line(error)


@pytest.mark.parametrize("source", [RANDOM + name for one in FAMILIES.values() for name in one.published])
def test_published_models_are_random_without_a_download(source: str) -> None:
    found = describe(source)
    assert source.removeprefix(RANDOM) in PUBLISHED
    frame = geometry(found.config)
    assert found.preprocessing.size == frame.size
    assert found.preprocessing.mean == found.family.mean
    idle = (f"vision_tower.encoder.layers.{frame.depth}.", "vision_tower.post_layernorm")  # of LLaVA-NeXT-Video
    idle = (*idle, str(found.family.closing_name))
    run = [shape.numel() for name, shape in found.vision_shapes.items() if not name.startswith(idle)]
    assert sum(run) == found.family.vision_weights(found.config)
    ids = found.family.special_tokens(found.config)
    tokenizer = load_tokenizer(found)
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in ids} == ids
    assert sorted(ids.values()) == list(ids.values())
