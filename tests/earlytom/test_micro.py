"""The bundled checkpoint: laid out like a published one, made by what is committed, trained, and good at its task."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from builder.micro.card import write_card
from builder.micro.course import PERCEPTION_STEPS, SEED, STAGES, new_model
from builder.micro.see import normalised
from earlytom import micro
from earlytom.families import bundled
from earlytom.families.llava_onevision import LLAVA_ONEVISION, pool
from earlytom.families.tokens import SPECIAL_TOKENS
from earlytom.micro import checkpoint
from earlytom.micro.data import KINDS, LabelledClip, labelled_clip
from earlytom.micro.data.render import NOBODY
from earlytom.micro.weights import random_tensor
from runtime.text.prompt import build_prompt, splice

FILES = (
    "README.md",
    "accuracy.json",
    "accuracy.png",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
    "video_preprocessor_config.json",
)
MERGE_LAYER = 6  # whose received attention chooses the tokens by default


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> Any:
    return LlavaOnevisionForConditionalGeneration.from_pretrained(micro.PATH, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(micro.PATH)


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder written once more, around the weights and the records that are committed."""
    out = tmp_path_factory.mktemp("again")
    model = new_model()
    model.load_state_dict(LlavaOnevisionForConditionalGeneration.from_pretrained(micro.PATH).state_dict())
    checkpoint.write_checkpoint(out, model, read(micro.PATH / "training.json"))
    for name in ("accuracy.json", "accuracy.png"):
        shutil.copy(micro.PATH / name, out)
    write_card(out)
    return out


# The folder


def test_the_folder_has_the_files_of_a_published_checkpoint_and_is_small() -> None:
    there = {path.name for path in micro.PATH.iterdir() if path.is_file() and path.suffix != ".py"}
    assert there == set(FILES)
    sizes = {name: (micro.PATH / name).stat().st_size for name in FILES}
    assert sizes["model.safetensors"] < 8.5e6
    assert sum(sizes.values()) < 9e6


def test_transformers_loads_it_without_a_missing_or_unexpected_tensor() -> None:
    loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(micro.PATH, output_loading_info=True)
    assert not any(loaded[1].values())


def test_the_tensors_have_the_names_that_transformers_writes() -> None:
    with safe_open(micro.PATH / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
    assert "vision_tower.encoder.layers.7.self_attn.q_proj.weight" in names
    assert {"image_newline", "multi_modal_projector.linear_1.weight", "language_model.model.norm.weight"} <= names
    assert "vision_tower.encoder.layers.8.self_attn.q_proj.weight" not in names


def test_writing_it_again_gives_the_same_settings_and_texts(again: Path) -> None:
    assert {path.name for path in again.iterdir()} == set(FILES)
    for name in FILES:
        if name.endswith(".json") and name != "tokenizer.json":
            committed, made = (read(folder / name) for folder in (micro.PATH, again))
            committed.pop("transformers_version", None)
            made.pop("transformers_version", None)
            assert committed == made, name
    for name in ("README.md", "chat_template.jinja"):
        assert (micro.PATH / name).read_text() == (again / name).read_text(), name


def test_writing_it_again_gives_the_same_tokenizer(again: Path) -> None:
    committed, made = (read(folder / "tokenizer.json") for folder in (micro.PATH, again))
    for part in ("vocab", "merges"):
        assert committed["model"][part] == made["model"][part]
    assert committed["added_tokens"] == made["added_tokens"]


def test_writing_it_again_gives_the_same_weights_bit_for_bit(again: Path) -> None:
    committed, made = (load_file(folder / "model.safetensors") for folder in (micro.PATH, again))
    assert committed.keys() == made.keys()
    assert all(torch.equal(committed[name], made[name]) for name in committed)


def test_its_weights_are_trained_ones(model: Any) -> None:
    assert read(micro.PATH / "config.json")["earlytom_trained"] is True
    before, after = new_model().state_dict(), model.state_dict()
    assert not any(torch.equal(before[name].half(), after[name].half()) for name in after if after[name].dim() > 1)
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_the_records_are_of_the_whole_training_and_the_card_shows_them() -> None:
    training, accuracy = read(micro.PATH / "training.json"), read(micro.PATH / "accuracy.json")
    assert training["seed"] == SEED
    steps = {"perception": PERCEPTION_STEPS, **{stage.name: stage.steps for stage in STAGES}}
    assert {stage["stage"]: stage["steps"] for stage in training["stages"]} == steps
    card = (micro.PATH / "README.md").read_text()
    assert training["hardware"] in card
    assert all(re.search(rf"^\| {name} \| {count} \|", card, re.MULTILINE) for name, count in steps.items())
    assert all(re.search(rf"^\| {kind} \|", card, re.MULTILINE) for kind in KINDS)
    assert accuracy
    assert "Not measured yet" not in card


# Random weights, before training and for models that are measured without a download


def test_a_random_tensor_depends_on_its_name_and_seed_and_not_on_its_dtype() -> None:
    name, shape = "vision_tower.encoder.layers.0.mlp.fc1.weight", (640, 4096)  # more than one block of values
    value = random_tensor(name, shape, torch.float32, seed=1)
    assert torch.equal(random_tensor(f"model.{name}", shape, torch.float16, seed=1), value.half())
    assert not torch.equal(random_tensor(name.replace("0", "1"), shape, torch.float32, seed=1), value)
    assert not torch.equal(random_tensor(name, shape, torch.float32, seed=2), value)
    assert value.std().item() * 64 == pytest.approx(1, abs=0.01)  # one over the root of the fan-in
    assert abs(value.mean().item()) * 64 < 0.01
    assert value.flatten()[:1000].unique().numel() > 950  # not a few values over and over


@pytest.mark.parametrize(
    "name",
    ["model.vision_tower.vision_model.x", "model.vision_tower.x", "vision_tower.vision_model.x", "vision_tower.x"],
)
def test_names_of_every_release_have_one_canonical_form(name: str) -> None:
    assert LLAVA_ONEVISION.canonical_name(name) == "vision_tower.x"
    assert LLAVA_ONEVISION.canonical_name("multi_modal_projector.x") == "multi_modal_projector.x"


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.language_model.layers.0.x", "language_model.layers.0.x"),
        ("language_model.model.layers.0.x", "language_model.layers.0.x"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_the_decoder_have_one_canonical_form(name: str, canonical: str) -> None:
    assert LLAVA_ONEVISION.canonical_name(name) == canonical


# The tokenizer


def test_the_tokenizer_has_the_whole_vocabulary_and_the_configured_special_tokens(tokenizer: Any) -> None:
    config = bundled.architecture()
    text: Any = config.text_config
    assert len(tokenizer) == text.vocab_size == bundled.VOCABULARY
    assert sorted(tokenizer.get_vocab().values()) == list(range(bundled.VOCABULARY))
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(1275, 1280))
    assert tokenizer.convert_tokens_to_ids("<video>") == config.video_token_id
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (text.eos_token_id, text.pad_token_id)


@pytest.mark.parametrize("text", ["How many red circles move left?", "Was bedeutet das? — 42 ☃\n", "日本語", " a  b "])
def test_the_tokenizer_gives_any_text_back(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_questions_of_its_own_world_take_one_token_a_word(tokenizer: Any) -> None:
    assert len(tokenizer("What colour is the big circle?")["input_ids"]) == 7
    assert len(tokenizer("Photosynthesis reconsidered")["input_ids"]) > 7  # and words of another world do not
    for index in range(20):
        for question in labelled_clip("train", index, times=np.array([0])).questions:
            if question.kind != "where":  # "top" and "bottom" take two
                assert len(tokenizer(question.answer)["input_ids"]) == len(question.answer.split())


def test_the_chat_template_writes_the_form_of_qwen2(tokenizer: Any) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Why?\n"}]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<video>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\n<image>\n Why?\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# What the tower sees


class Watched:
    """A clip, with the tower's hidden states after each layer [F, S, D] and each layer's received attention [F, S]."""

    def __init__(self, tower: Any, clip: LabelledClip) -> None:
        self.scene = clip.scene
        self.shown = pool(torch.from_numpy(covered(clip.owner))[..., None])[..., 0]  # [F, P]
        with torch.no_grad():
            output = tower(pixels(clip), output_hidden_states=True, output_attentions=True)
        self.states = list(output.hidden_states[1:])
        self.attention = list(output.attentions)  # [F, H, S, S] each
        self.received = [layer.mean((1, 2)) for layer in self.attention]


def pixels(clip: LabelledClip) -> Tensor:
    return normalised(torch.from_numpy(clip.frames))


def covered(owner: np.ndarray) -> np.ndarray:
    """[F, S] float32: the part of each patch that belongs to an object."""
    side = bundled.GRID
    patches = (owner != NOBODY).reshape(len(owner), side, bundled.PATCH, side, bundled.PATCH)
    return patches.mean((2, 4), dtype=np.float32).reshape(len(owner), side * side)


@pytest.fixture(scope="module")
def tower(model: Any) -> Any:
    """The trained tower with attention that can be looked at."""
    eager = type(model.model.vision_tower)._from_config(model.model.vision_tower.config, attn_implementation="eager")
    eager.load_state_dict(model.model.vision_tower.state_dict())
    return eager.eval()


@pytest.fixture(scope="module")
def watched(tower: Any) -> list[Watched]:
    clips = [Watched(tower, labelled_clip("validation", index)) for index in range(6)]
    assert 0 < sum(clip.scene.cut is not None for clip in clips) < len(clips)
    return clips


def test_frames_are_alike_within_a_scene_and_less_so_across_a_cut(watched: list[Watched]) -> None:
    for layer in range(len(watched[0].states)):
        inside, across = [], []
        for clip in watched:
            unit = torch.nn.functional.normalize(clip.states[layer], dim=-1)
            for time, similarity in enumerate((unit[1:] * unit[:-1]).sum(-1).mean(1).tolist(), 1):
                (across if time == clip.scene.cut else inside).append(similarity)
        assert np.median(inside) > 0.8  # the default threshold of merging
        assert np.median(inside) > max(across) + 0.1
        assert max(inside) < 0.99999  # frames that move are never taken for the same


def test_states_stay_within_half_precision(watched: list[Watched]) -> None:
    assert max(state.abs().max().item() for clip in watched for state in clip.states) < 6e3


def share_seen(clip: Watched, relevance: Tensor, kept: int = 4) -> float:
    """The part of all that is shown that lies in the `kept` most relevant cells of every frame; relevance: [F, P]."""
    total = clip.shown.sum(1)
    there = total > 0.05
    chosen = clip.shown.gather(1, relevance.topk(kept, 1).indices).sum(1)
    return (chosen[there] / total[there]).mean().item()


def test_attention_goes_to_what_is_shown(watched: list[Watched]) -> None:
    generator = torch.Generator().manual_seed(0)
    attended, anywhere = [], []
    for clip in watched:
        relevance = pool(clip.received[MERGE_LAYER][..., None])[..., 0]
        attended.append(share_seen(clip, relevance))
        anywhere.append(share_seen(clip, torch.rand(relevance.shape, generator=generator)))
    assert np.mean(attended) > 0.6
    assert np.mean(anywhere) < 0.3


def test_received_attention_is_uneven(watched: list[Watched]) -> None:
    for clip in watched:
        received = clip.received[MERGE_LAYER].sort(descending=True).values * bundled.GRID**2  # 1 = even
        assert received[:, 0].min() > 1.5
        gaps = (received[:, :-1] - received[:, 1:]) / received[:, :-1]
        assert gaps.median() > 1e-3  # far above rounding: the choice of tokens is not one of near-ties


def test_without_queries_received_attention_is_even(tower: Any) -> None:
    blind = type(tower)._from_config(tower.config, attn_implementation="eager").eval()
    blind.load_state_dict(tower.state_dict())
    with torch.no_grad():
        for name, parameter in blind.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    clip = Watched(blind, labelled_clip("validation", 0, times=np.arange(2)))
    assert (clip.received[-1] * bundled.GRID**2 - 1).abs().max() < 1e-4


# What it answers


def answers(model: Any, tokenizer: Any, shown: LabelledClip, texts: Sequence[str]) -> list[str]:
    """What the model says about a clip, one question at a time, as `runtime` asks it."""
    with torch.no_grad():
        visual = model.get_video_features(pixels(shown)[None]).pooler_output[0]
    said = []
    for text in texts:
        embedded = splice(build_prompt(tokenizer, text), visual, model.get_input_embeddings())
        out = model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False)
        said.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return said


def test_it_answers_questions_about_clips_that_it_has_never_seen(model: Any, tokenizer: Any) -> None:
    clips = [labelled_clip("test", index) for index in range(6)]
    right, elsewhere = [], []
    for number, clip in enumerate(clips):
        texts, wanted = zip(*((question.text, question.answer) for question in clip.questions), strict=True)
        right += [said == answer for said, answer in zip(answers(model, tokenizer, clip, texts), wanted, strict=True)]
        said = answers(model, tokenizer, clips[number - 1], texts)  # of another clip
        elsewhere += [one == answer for one, answer in zip(said, wanted, strict=True)]
    assert len(right) > 30
    assert np.mean(right) > 0.75
    assert np.mean(elsewhere) < 0.6
    assert np.mean(right) > np.mean(elsewhere) + 0.25
