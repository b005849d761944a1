"""Loading: every source, all generations of tensor names, one file and shards, and what can be wrong with a folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from earlytom import micro
from earlytom.errors import UserError
from earlytom.micro.random_model import random_model
from runtime import checkpoint
from runtime.checkpoint import PUBLISHED, VisionPart, describe, load_model, load_tokenizer, load_vision
from runtime.checkpoint.hub import HubFiles
from tests.runtime.checkpoint.tiny_checkpoint import (
    PREPROCESSING,
    TOKENIZER,
    Rename,
    edit_json,
    middle_name,
    old_name,
    one_line,
    same_name,
    tiny_config,
    write,
    write_weights,
)


@pytest.fixture
def folder(tmp_path: Path, original: Any) -> Path:
    return write(tmp_path / "tiny", original)


def assert_same_vision(part: VisionPart, model: Any) -> None:
    ours, theirs = part.state_dict(), VisionPart.from_model(model).state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


# What each source gives


@pytest.mark.parametrize("source", [None, "micro", micro.PATH, str(micro.PATH)])
def test_the_bundled_model_is_the_default_and_a_folder_like_any_other(source: Any) -> None:
    found = describe(source)
    assert found.name == "micro"
    assert found.trained
    assert found.preprocessing == checkpoint.Preprocessing((72, 72), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert found.digest() == describe().digest()


def test_the_vision_part_of_the_bundled_model_is_that_of_the_whole_model() -> None:
    part, model = load_vision(dtype=torch.float16), load_model(dtype=torch.float16)
    assert_same_vision(part, model)
    assert part.closing.shape == (256,)
    assert not part.training
    assert not model.training
    assert not any(parameter.requires_grad for parameter in part.parameters())


def test_the_vision_part_alone_computes_what_the_model_computes() -> None:
    part, model = load_vision(), load_model()
    pixels = torch.rand(3, 3, 72, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        hidden = part.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        pooled = model.model.apply_pooling(part.projector(hidden)).flatten(0, 1)
        expected = model.get_video_features(pixels[None]).pooler_output[0]
    assert torch.equal(torch.cat((pooled, part.closing[None])), expected)


@pytest.mark.parametrize("rename", [same_name, middle_name, old_name])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_loads_under_every_generation_of_names(
    tmp_path: Path, original: Any, rename: Rename, shards: int
) -> None:
    source = write(tmp_path / "c", original, rename=rename, shards=shards)
    assert_same_vision(load_vision(source), original)
    whole = load_model(source)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), original.state_dict().values(), strict=True)
    )
    assert describe(source).trained


def test_names_and_shards_do_not_change_the_digest_and_everything_else_does(tmp_path: Path, original: Any) -> None:
    base = describe(write(tmp_path / "a", original)).digest()
    assert describe(write(tmp_path / "b", original, rename=old_name, shards=2)).digest() == base
    state = load_file(tmp_path / "a" / "model.safetensors")
    name = "model.vision_tower.encoder.layers.1.mlp.fc1.bias"
    write_weights(tmp_path / "b", {**state, name: state[name].nextafter(torch.tensor(9.0))})
    (tmp_path / "b" / "model.safetensors.index.json").unlink()
    assert describe(tmp_path / "b").digest() != base
    write_weights(tmp_path / "b", {n: t + 1 if n.startswith("lm_head") else t for n, t in state.items()})
    assert describe(tmp_path / "b").digest() == base  # the decoder is no part of the engine
    edit_json(tmp_path / "b" / "preprocessor_config.json", image_mean=[0.5, 0.4, 0.2])
    assert describe(tmp_path / "b").digest() != base


def test_only_the_shards_of_the_vision_part_are_opened(tmp_path: Path, original: Any) -> None:
    source = write(tmp_path / "c", original, shards=2)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    state = {n: t for file in set(index.values()) for n, t in load_file(source / file).items()}
    decoder = {n for n in state if "language_model" in n or "lm_head" in n}
    save_file({n: t for n, t in state.items() if n not in decoder}, source / "vision.safetensors")
    where = {n: "decoder.safetensors" if n in decoder else "vision.safetensors" for n in state}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same_vision(load_vision(source), original)  # though decoder.safetensors does not exist
    with pytest.raises(UserError, match=r"decoder\.safetensors"):
        load_model(source)


def test_weights_are_given_in_the_dtype_that_is_asked_for(folder: Path, original: Any) -> None:
    part = load_vision(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    assert torch.equal(part.closing, original.model.image_newline.bfloat16())
    assert {parameter.dtype for parameter in load_model(folder, torch.float16).parameters()} == {torch.float16}


@pytest.mark.parametrize("stored_head", [False, True])
def test_a_tied_output_layer_may_be_stored_or_not(tmp_path: Path, stored_head: bool) -> None:
    model: Any = random_model(tiny_config(tied=True), torch.float32)
    source = write(tmp_path / "c", model)
    state = load_file(source / "model.safetensors")
    assert "lm_head.weight" not in state
    if stored_head:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"].clone()
    write_weights(source, {old_name(n): t for n, t in state.items()})
    whole: Any = load_model(source)
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    assert torch.equal(whole.lm_head.weight, model.lm_head.weight)


def test_positions_stored_by_old_releases_are_ignored(folder: Path, original: Any) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.vision_tower.embeddings.position_ids"] = torch.arange(9)[None]
    write_weights(folder, state)
    assert_same_vision(load_vision(folder), original)


# Random weights


@pytest.fixture
def tiny_published(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PUBLISHED, "tiny", tiny_config)
    return "random:tiny"


def test_random_weights_are_the_same_alone_and_in_the_whole_model(tiny_published: str) -> None:
    assert_same_vision(load_vision(tiny_published, torch.float16), load_model(tiny_published, torch.float16))
    assert torch.equal(load_vision(tiny_published).closing, load_vision(tiny_published).closing)


def test_random_weights_in_half_are_those_in_single_rounded(tiny_published: str) -> None:
    half, single = load_vision(tiny_published, torch.float16), load_vision(tiny_published, torch.float32)
    for low, full in zip(half.parameters(), single.parameters(), strict=True):
        assert torch.equal(low, full.half())


def test_random_weights_are_different_from_tensor_to_tensor_and_the_global_generator_is_left_alone(
    tiny_published: str,
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    part: Any = load_vision(tiny_published)
    layers = part.vision_tower.encoder.layers
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(layers[0].mlp.fc1.weight, layers[1].mlp.fc1.weight)


def test_a_random_model_generates(tiny_published: str) -> None:
    model: Any = load_model(tiny_published)
    ids = torch.tensor([[1, 2] + [model.config.video_token_id] * 5 + [3]])
    out = model.generate(input_ids=ids, pixel_values_videos=torch.zeros(1, 1, 3, 24, 24), max_new_tokens=3)
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 3
    assert model.generation_config.eos_token_id == [1292, 1290]


@pytest.mark.parametrize(
    ("name", "width", "vocabulary", "tied", "vision_size", "size"),
    [
        ("llava-onevision-qwen2-0.5b-ov", 896, 152000, True, 399.6e6, 894e6),
        ("llava-onevision-qwen2-7b-ov", 3584, 152128, False, 414.7e6, 8031e6),
    ],
)
def test_the_published_configurations(
    name: str, width: int, vocabulary: int, tied: bool, vision_size: float, size: float
) -> None:
    found = describe(f"random:{name}")
    text: Any = found.config.text_config
    assert not found.trained
    assert found.preprocessing.size == (384, 384)
    assert (text.hidden_size, text.vocab_size, found.config.tie_word_embeddings) == (width, vocabulary, tied)
    assert text.hidden_size % text.num_attention_heads == 0
    assert found.config.vision_feature_layer == -1
    shapes = found.vision_shapes
    vision = sum(shape.numel() for shape in shapes.values())
    assert vision == pytest.approx(vision_size, rel=5e-4)
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(found.config)
    assert model.num_parameters() == pytest.approx(size, rel=5e-4)


def test_random_checkpoints_have_digests_of_their_own() -> None:
    digests = {describe(f"random:{name}").digest() for name in PUBLISHED}
    assert len(digests) == len(PUBLISHED)


# The tokenizer


def test_the_bundled_tokenizer_has_its_template() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer("<video>")["input_ids"] == [describe().config.video_token_id]
    assert tokenizer.chat_template == (micro.PATH / "chat_template.jinja").read_text()


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("llava-onevision")])
def test_random_checkpoints_get_the_bundled_tokenizer_with_the_published_special_tokens(name: str) -> None:
    tokenizer, config = load_tokenizer(f"random:{name}"), describe(f"random:{name}").config
    text: Any = config.text_config
    assert tokenizer("<|endoftext|><|im_start|><|im_end|><image><video>")["input_ids"] == list(range(151643, 151648))
    assert (config.image_token_id, config.video_token_id) == (151646, 151647)
    assert tokenizer.eos_token_id == text.eos_token_id == 151645
    assert tokenizer("What colour?")["input_ids"] == load_tokenizer()("What colour?")["input_ids"]
    assert max(tokenizer.get_vocab().values()) < text.vocab_size
    assert tokenizer.decode([100_000]) == ""  # what a random model may well choose
    assert tokenizer.chat_template == load_tokenizer().chat_template


def with_tokenizer(folder: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(micro.PATH / name, folder)
    edit_json(folder / "config.json", video_token_index=1279)
    return folder


def test_the_template_of_the_processor_is_preferred(folder: Path) -> None:
    with_tokenizer(folder)
    with pytest.raises(UserError, match="no chat template") as error:
        load_tokenizer(folder)
    one_line(error)
    (folder / "chat_template.jinja").write_text("new")
    assert load_tokenizer(folder).chat_template == "new"
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    assert load_tokenizer(folder).chat_template == "old"
    (folder / "processor_config.json").write_text('{"chat_template": "own"}')
    assert load_tokenizer(folder).chat_template == "own"


def test_a_tokenizer_that_does_not_fit_the_configuration_is_refused(folder: Path) -> None:
    shutil.copy(micro.PATH / "chat_template.jinja", with_tokenizer(folder))
    edit_json(folder / "config.json", video_token_index=1278)
    with pytest.raises(UserError, match=r"1279 for <video>, and config\.json says 1278") as error:
        load_tokenizer(folder)
    one_line(error)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_missing_or_broken_tokenizer_is_refused(folder: Path, content: str | None) -> None:
    with_tokenizer(folder)
    if content is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer") as error:
        load_tokenizer(folder)
    one_line(error)


# Preprocessing


@pytest.mark.parametrize("size", [24, {"height": 24, "width": 24}, {"shortest_edge": 24}, [24, 24]])
def test_a_size_is_read_in_every_form(folder: Path, size: Any) -> None:
    edit_json(folder / "preprocessor_config.json", size=size)
    assert describe(folder).preprocessing == checkpoint.Preprocessing((24, 24), (0.5, 0.4, 0.3), (0.5, 0.5, 0.5))


def test_the_settings_of_the_video_processor_come_first(folder: Path) -> None:
    (folder / "video_preprocessor_config.json").write_text(json.dumps(PREPROCESSING | {"image_mean": [0.1, 0.1, 0.1]}))
    assert describe(folder).preprocessing.mean == (0.1, 0.1, 0.1)
    nested = {"video_processor": PREPROCESSING | {"image_mean": [0.2, 0.2, 0.2]}, "image_processor": PREPROCESSING}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert describe(folder).preprocessing.mean == (0.2, 0.2, 0.2)


def test_no_normalisation_is_mean_zero_and_deviation_one(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", do_normalize=False)
    assert describe(folder).preprocessing == checkpoint.Preprocessing((24, 24), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 32},
        {"size": {"longest_edge": 24}},
        {"size": "24"},
        {"image_mean": [0.5]},
        {"image_mean": None},
        {"image_std": [0.5, 0.5, 0.0]},
        {"image_std": [0.5, 0.5, float("nan")]},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"resample": 2},
    ],
)
def test_preprocessing_that_cannot_be_done_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit_json(folder / "preprocessor_config.json", **changes)
    with pytest.raises(UserError) as error:
        describe(folder)
    one_line(error)


# Broken and foreign folders


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_text("a text\n" * 10)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        changed = change(state.pop(name, torch.zeros(2)))
        write_weights(folder, state if changed is None else {**state, name: changed})

    return damage


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


QUERY = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or broken"),
        (not_safetensors, "truncated or broken"),
        (no_weights, r"model\.safetensors is missing"),
        (change_tensor(QUERY, lambda t: None), "missing tensors in the weights: vision_tower.encoder.layers.0"),
        (
            change_tensor(QUERY, lambda t: t[:8].clone()),
            r"has the shape \[8, 16\], and config.json asks for \[16, 16\]",
        ),
        (change_tensor(QUERY, with_value(float("nan"))), "NaN or infinity"),
        (change_tensor(QUERY, with_value(float("-inf"))), "NaN or infinity"),
        (change_tensor(QUERY, lambda t: t.to(torch.int8)), "quantised"),
        (change_tensor("model.image_newline", lambda t: None), "missing tensors in the weights: image_newline"),
        (change_tensor("model.multi_modal_projector.linear_3.weight", lambda t: t), "unexpected tensors"),
        (change_tensor("vision_tower.post_layernorm.bias", lambda t: t), "are the same tensor"),
    ],
)
def test_damaged_weights_are_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    load_vision(folder)  # sound before
    damage(folder)
    for load in (load_vision, load_model):
        with pytest.raises(UserError, match=message) as error:
            load(folder)
        one_line(error)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_tensor("lm_head.weight", lambda t: None), "missing tensors"),
        (change_tensor("lm_head.weight", lambda t: t[:5].clone()), "lm_head|mismatched|cannot be loaded"),
        (change_tensor("lm_head.weight", with_value(float("nan"))), "NaN or infinity"),
        (change_tensor("model.language_model.layers.2.mlp.up_proj.weight", lambda t: t), "unexpected tensors"),
    ],
)
def test_a_damaged_decoder_is_refused_by_the_whole_model_only(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    load_vision(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    one_line(error)


def test_values_beyond_half_precision_are_refused_in_half_only(folder: Path) -> None:
    change_tensor(QUERY, with_value(1e6))(folder)
    assert max(parameter.max().item() for parameter in load_vision(folder, torch.bfloat16).parameters()) > 9e5
    with pytest.raises(UserError, match="--bf16 or --fp32"):
        load_vision(folder, torch.float16)


def test_a_missing_shard_is_refused(tmp_path: Path, original: Any) -> None:
    source = write(tmp_path / "c", original, shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing") as error:
        load_vision(source)
    one_line(error)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\x01", '"text"'])
def test_a_broken_config_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as error:
        describe(folder)
    one_line(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_vl"}, "'qwen2_vl' is not supported; supported is 'llava_onevision'"),
        ({"model_type": None}, "None is not supported"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision tower 'clip_vision_model' is not supported"),
        (
            {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": "x"}},
            "hidden_size must be a whole number",
        ),
        ({"vision_feature_layer": -4}, "vision_feature_layer -4"),
        ({"vision_feature_layer": [0, 1]}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "default"}, "'default'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    ],
)
def test_a_model_that_is_not_supported_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        load_vision(folder)
    one_line(error)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json"])
def test_a_missing_settings_file_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing) as error:
        describe(folder)
    one_line(error)


NOWHERE = ("/no/such/folder", "./no", "no-such-folder", "a/b/c", "~/no such folder", "")


@pytest.mark.parametrize("source", [*NOWHERE, "a/b@../c", "a/b@", "a\0b", pytest.param("x" * 5000, id="long")])
def test_no_such_folder(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # which the empty path stands for; it is no checkpoint
    monkeypatch.setattr(HubFiles, "__init__", lambda *_: pytest.fail("not a hub id"))
    with pytest.raises(UserError) as error:
        describe(source)
    one_line(error)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="it is a file"):
        describe(folder / "config.json")


def test_an_unknown_random_configuration_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"random: knows .*llava-onevision-qwen2-7b-ov") as error:
        describe("random:llava-onevision-qwen2-72b-ov")
    one_line(error)


# The hub: see test_checkpoint_hub


def test_local_sources_never_touch_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tiny_published: str) -> None:
    monkeypatch.setattr(HubFiles, "__init__", lambda *_: pytest.fail("the hub was used"))
    for source in (None, folder, tiny_published):
        load_vision(source)
        load_model(source)
    with pytest.raises(pytest.fail.Exception):
        describe("org/model")  # the check itself works
