"""The bundled checkpoint: laid out like a published one, reproducible, and alive although it is not trained."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from earlytom import micro
from earlytom.micro import create
from earlytom.micro.random_model import SPECIAL_TOKENS
from earlytom.micro.weights import canonical_name, random_tensor

FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint made once more."""
    out = tmp_path_factory.mktemp("again")
    create.create(out)
    return out


@pytest.fixture(scope="module")
def model() -> Any:
    return LlavaOnevisionForConditionalGeneration.from_pretrained(micro.PATH, dtype=torch.float32)


def drawn_clip(seed: int, scenes: int = 2, frames: int = 4) -> Tensor:
    """[scenes * frames, 3, 72, 72] in [-1, 1]: discs that drift over a chequered ground, other ones in each scene."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(72.0), torch.arange(72.0), indexing="ij")
    clip = []
    for _ in range(scenes):
        ground = torch.rand(3, 12, 12, generator=generator).mul(0.3) + torch.rand(3, 1, 1, generator=generator) * 0.7
        ground = ground.repeat_interleave(6, 1).repeat_interleave(6, 2)
        discs = [torch.rand(8, generator=generator) for _ in range(4)]
        for t in range(frames):
            picture = ground
            for disc in discs:
                row, column = disc[3] * 72 + t * (disc[5] - 0.5) * 6, disc[4] * 72 + t * (disc[6] - 0.5) * 6
                inside = (rows - row) ** 2 + (columns - column) ** 2 < (6 + 8 * disc[7]) ** 2
                picture = torch.where(inside, disc[:3, None, None], picture)
            clip.append(picture + 0.01 * torch.randn(picture.shape, generator=generator))
    return torch.stack(clip).clamp(0, 1) * 2 - 1


def states_and_attention(tower: Any, clip: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states after each layer [F, S, D], and each layer's softmax attention [F, H, S, S]."""
    eager = type(tower)._from_config(tower.config, attn_implementation="eager")
    eager.load_state_dict(tower.state_dict())
    with torch.no_grad():
        output = eager.eval()(clip, output_hidden_states=True, output_attentions=True)
    return list(output.hidden_states[1:]), list(output.attentions)


def frame_similarity(hidden: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    return torch.einsum("fsd,gsd->fg", unit, unit) / hidden.shape[1]


def test_the_folder_has_the_files_of_a_published_checkpoint_and_is_small() -> None:
    sizes = {name: (micro.PATH / name).stat().st_size for name in FILES}
    assert sizes["model.safetensors"] < 8.5e6
    assert sum(sizes.values()) < 9e6


def test_transformers_loads_it_without_a_missing_or_unexpected_tensor() -> None:
    loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(micro.PATH, output_loading_info=True)
    assert not any(loaded[1].values())


def test_the_tensors_have_the_names_that_transformers_writes() -> None:
    with safe_open(micro.PATH / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
    assert "model.vision_tower.encoder.layers.7.self_attn.q_proj.weight" in names
    assert {"model.image_newline", "model.multi_modal_projector.linear_1.weight"} <= names
    assert "model.vision_tower.encoder.layers.8.self_attn.q_proj.weight" not in names


def test_making_it_again_gives_the_same_settings_and_texts(again: Path) -> None:
    for name in FILES:
        if name.endswith(".json") and name != "tokenizer.json":
            committed, made = (json.loads((folder / name).read_text()) for folder in (micro.PATH, again))
            committed.pop("transformers_version", None)
            made.pop("transformers_version", None)
            assert committed == made, name
    for name in ("README.md", "chat_template.jinja"):
        assert (micro.PATH / name).read_text() == (again / name).read_text()


def test_making_it_again_gives_the_same_tokenizer(again: Path) -> None:
    committed, made = (json.loads((folder / "tokenizer.json").read_text()) for folder in (micro.PATH, again))
    for part in ("vocab", "merges"):
        assert committed["model"][part] == made["model"][part]
    assert committed["added_tokens"] == made["added_tokens"]


def test_making_it_again_gives_the_same_weights_bit_for_bit(again: Path) -> None:
    committed, made = (load_file(folder / "model.safetensors") for folder in (micro.PATH, again))
    assert committed.keys() == made.keys()
    assert all(torch.equal(committed[name], made[name]) for name in committed)


def test_another_seed_gives_other_weights() -> None:
    other = create.build_model(create.SEED + 1).state_dict()
    ours = load_file(micro.PATH / "model.safetensors")
    assert not any(torch.equal(other[name], ours[name]) for name in ours)


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
    assert canonical_name(name) == "vision_tower.x"
    assert canonical_name("language_model.model.x") == "language_model.model.x"


def test_the_tokenizer_has_the_whole_vocabulary_and_the_configured_special_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro.PATH)
    config = create.architecture()
    text: Any = config.text_config
    assert len(tokenizer) == text.vocab_size == create.VOCABULARY
    assert sorted(tokenizer.get_vocab().values()) == list(range(create.VOCABULARY))
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(1275, 1280))
    assert tokenizer.convert_tokens_to_ids("<video>") == config.video_token_id
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (text.eos_token_id, text.pad_token_id)


@pytest.mark.parametrize("text", ["How many red circles move left?", "Was bedeutet das? — 42 ☃\n", "日本語", " a  b "])
def test_the_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro.PATH)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_questions_of_its_own_world_take_one_token_a_word() -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro.PATH)
    assert len(tokenizer("What colour is the big circle?")["input_ids"]) == 7
    assert len(tokenizer("Photosynthesis reconsidered")["input_ids"]) > 7  # and words of another world do not


def test_the_chat_template_writes_the_form_of_qwen2() -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro.PATH)
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


@pytest.mark.parametrize("seed", range(3))
def test_frames_are_alike_within_a_scene_and_not_across_a_cut(model: Any, seed: int) -> None:
    states, _ = states_and_attention(model.model.vision_tower, drawn_clip(seed))
    for hidden in states:
        neighbours = frame_similarity(hidden).diagonal(1)
        assert neighbours[[0, 1, 2, 4, 5, 6]].min() > 0.8  # the default threshold of merging
        assert neighbours[3] < 0.7
        assert neighbours.max() < 0.9999  # frames that move are never taken for the same
        assert hidden.abs().max() < 100


def test_received_attention_is_uneven(model: Any) -> None:
    tower = model.model.vision_tower
    _, attention = states_and_attention(tower, drawn_clip(0))
    for layer in attention:
        tokens = layer.shape[-1]
        received = layer.mean((1, 2)).sort(descending=True).values * tokens  # [F, S], 1 = even
        entropy = -(layer * layer.clamp_min(1e-30).log()).sum(-1).mean() / math.log(tokens)
        assert received[:, 0].min() > 2
        assert entropy < 0.9
        gaps = (received[:, :-1] - received[:, 1:]) / received[:, :-1]
        assert gaps.median() > 1e-3  # far above rounding: the choice of tokens is not one of near-ties


def test_without_queries_received_attention_is_even(model: Any) -> None:
    tower = type(model.model.vision_tower)(model.config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    _, attention = states_and_attention(tower, drawn_clip(0, scenes=1))
    assert (attention[-1].mean((1, 2)) * 81 - 1).abs().max() < 1e-4


def test_the_untrained_model_answers_and_its_answer_depends_on_the_video(
    model: Any,
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(micro.PATH)
    content = [{"type": "video"}, {"type": "text", "text": "What colour is the big circle?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text.replace("<video>", "<video>" * (8 * 25 + 1)), return_tensors="pt")["input_ids"]

    def answer(seed: int) -> str:
        out = model.generate(input_ids=ids, pixel_values_videos=drawn_clip(seed)[None], max_new_tokens=8)
        assert out.shape[1] == ids.shape[1] + 8  # no early stop
        return tokenizer.decode(out[0, ids.shape[1] :])

    answers = [answer(seed) for seed in range(3)]
    assert len(set(answers)) == 3
    assert answer(0) == answers[0]
    assert not any("�" in text for text in answers)  # made of words, not of loose bytes


def test_the_command_writes_a_folder_and_says_that_it_is_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create.main(["--out", str(tmp_path / "new")]) == 0
    assert "untrained" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(FILES)
    assert not micro.is_trained(tmp_path / "new")
    assert not micro.is_trained()


def test_the_command_does_not_replace_trained_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"earlytom_trained": true}')
    assert create.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--force" in error
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert create.main(["--out", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "model.safetensors").is_file()
