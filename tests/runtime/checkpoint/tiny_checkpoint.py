"""A tiny LLaVA-OneVision with random weights, and folders of it as any release of transformers writes them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaOnevisionConfig

from earlytom import micro
from earlytom.errors import UserError

Rename = Callable[[str], str]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PREPROCESSING = {
    "size": {"height": 24, "width": 24},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5] * 3,
    "resample": 3,
}


def tiny_config(**changes: Any) -> LlavaOnevisionConfig:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1300,
        "bos_token_id": 1290,
        "eos_token_id": 1292,
        "tie_word_embeddings": changes.pop("tied", False),
    }
    return LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=1293, video_token_index=1294, **changes
    )


def same_name(name: str) -> str:
    return name


def middle_name(name: str) -> str:
    """As transformers wrote it while the SigLIP tower still had an inner `vision_model`."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def old_name(name: str) -> str:
    """As in the published checkpoints."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return middle_name(name.removeprefix("model.")) if name.startswith("model.") else f"language_model.{name}"


def write(folder: Path, model: Any, *, rename: Rename = same_name, shards: int = 1) -> Path:
    """A checkpoint of `model` in `folder`, with its tensors under other names and in several files."""
    model.save_pretrained(folder)
    state = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    write_weights(folder, state, shards)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


def write_weights(folder: Path, state: dict[str, Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(sorted(state))}
    for file in files:
        save_file({n: state[n] for n in state if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("--model ")
    return text


def answering(folder: Path, template: str | None = None) -> Path:
    """The checkpoint with a tokenizer and a template (the bundled one) beside it, so that it can answer."""
    for name in (*TOKENIZER, "chat_template.jinja"):
        shutil.copy(micro.PATH / name, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    edit_json(folder / "config.json", video_token_index=1279, image_token_index=1278)
    return folder
