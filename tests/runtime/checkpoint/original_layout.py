"""A tiny LLaVA-Video in the original layout: its names, one flat config.json, a tokenizer without the visual token, no
preprocessing file and no chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from earlytom.families.llava_video.layout import CLOSES, POOLINGS
from earlytom.families.tokens import IMAGE, SPECIAL_TOKENS
from earlytom.micro.random_model import make_tokenizer
from runtime.checkpoint import load_tokenizer
from tests.earlytom.tiny import tiny_llava_video

LAYERS = 3  # that run; the tower has one more
_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_NAMES = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
}


def original_name(name: str) -> str:
    """Of a tensor of transformers' model."""
    for new, old in _NAMES.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def original_folder(folder: Path, *, spare: bool = False, **settings: Any) -> tuple[Path, Any, dict[str, Tensor]]:
    """A checkpoint in `folder`, its model, and its tensors by their original names.

    `settings` go into config.json. With `spare`, the last layer of the whole tower and a part of its head are stored,
    too.
    """
    pooling, newlines = settings.get("mm_spatial_pool_mode"), settings.get("mm_newline_position")
    own: dict[str, Any] = {"pooling": pooling if pooling in POOLINGS else "bilinear"}  # what it means to say nothing
    own["newlines"] = newlines if newlines in CLOSES else "one_token"
    made = tiny_llava_video(bundled=True, layers=LAYERS, **own)
    state = {original_name(name): value.clone() for name, value in made.state_dict().items()}
    tower = "model.vision_tower.vision_tower.vision_model."
    if spare:
        last, more = f"{tower}encoder.layers.{LAYERS - 1}.", f"{tower}encoder.layers.{LAYERS}."
        state |= {more + name.removeprefix(last): value + 1 for name, value in state.items() if name.startswith(last)}
        state[f"{tower}head.probe"] = torch.zeros(1, 1, 32)
    config, vision = made.config, made.config.vision_config
    flat = {name: getattr(config.text_config, name) for name in _TEXT}
    flat |= {
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "rope_theta": config.text_config.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "image_token_index": config.video_token_id,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_vision_tower": "some/siglip",
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": LAYERS + 1,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
    }
    folder.mkdir(parents=True)
    flat |= settings
    (folder / "config.json").write_text(json.dumps({name: flat[name] for name in flat if flat[name] != "absent"}))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    bundled = json.loads(load_tokenizer().backend_tokenizer.to_str())["model"]
    words = {token: 1290 + number for number, token in enumerate(SPECIAL_TOKENS[: SPECIAL_TOKENS.index(IMAGE)])}
    merges = [tuple(pair) for pair in bundled["merges"]]
    make_tokenizer(bundled["vocab"] | words, merges, 4096, list(words)).save_pretrained(folder)
    return folder, made, state
