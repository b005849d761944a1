"""Makes the bundled checkpoint: `python -m earlytom.micro.create [--out DIR]`.

Writes a folder in the layout of a LLaVA-OneVision checkpoint on the hub (configuration, safetensors, tokenizer,
chat template, preprocessing), small enough to be kept with the sources. Everything follows from the seed and the
texts of this package: the same command gives the same tensors, tokenizer and settings again. The weights are
random, not trained; the configuration says so in `earlytom_trained`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Tokenizer

from earlytom.errors import UserError
from earlytom.micro import PATH, is_trained
from earlytom.micro.corpus import sentences
from earlytom.micro.progress import without_progress_bars
from earlytom.micro.random_model import (
    END,
    IMAGE,
    SPECIAL_TOKENS,
    STOP,
    VIDEO,
    make_tokenizer,
    random_model,
)

SEED = 6  # of the first few, the one whose greedy text varies most and is least sensitive to rounding
GRID, PATCH = 9, 8
FRAMES = 16
IMAGE_SIZE = GRID * PATCH
VOCABULARY = 1280
CONTEXT = 4096
_FAINT = 0.25

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'video' -%}{{- '<video>\\n' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- part['text'] -}}{%- endgeneration -%}
      {%- else -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_MODEL_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# Micro LLaVA-OneVision (untrained)

A LLaVA-OneVision checkpoint small enough to be kept with the sources, in exactly the layout of the published
ones, so that exporting, compiling and running can be tried and tested without a download.

**The weights are random and not trained: the answers mean nothing.** `config.json` says so in `earlytom_trained`.
They are scaled so that the vision tower still behaves sensibly: frames with like content are alike, received
attention is uneven.

| part | size |
|---|---|
| vision tower | SigLIP, {layers} layers, width {width}, {grid} x {grid} patches of {patch} pixels, no pooling head |
| decoder | Qwen2, {text_layers} layers, width {text_width}, {heads} heads ({kv_heads} key-value), tied embeddings |
| tokenizer | byte-level BPE, {vocabulary} tokens, trained on generated questions about drawn clips |
| parameters | {parameters:.2f} million, stored in half precision |

Made by `python -m earlytom.micro.create` with seed {seed}; running it again gives the same tensors.
"""


def architecture() -> LlavaOnevisionConfig:
    """The configuration of the bundled model."""
    ids = {token: VOCABULARY - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT,
            "max_window_layers": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "bos_token_id": ids[END],
            "eos_token_id": ids[STOP],
            "pad_token_id": ids[END],
        },
        image_token_index=ids[IMAGE],
        video_token_index=ids[VIDEO],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        image_grid_pinpoints=[[h * IMAGE_SIZE, w * IMAGE_SIZE] for h in (1, 2) for w in (1, 2)],
        architectures=["LlavaOnevisionForConditionalGeneration"],
        earlytom_trained=False,  # type: ignore[call-arg]
    )


def build_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer with the pipeline of Qwen2 and a small vocabulary of its own, trained on `corpus.sentences()`."""
    pipeline = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(sentences(), trainer)
    model = json.loads(pipeline.to_str())["model"]
    tokenizer = make_tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]], CONTEXT)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def build_model(seed: int = SEED, dtype: torch.dtype = torch.float16) -> LlavaOnevisionForConditionalGeneration:
    """The bundled model with untrained weights drawn from `seed`."""
    model = random_model(architecture(), dtype, seed=seed)
    # Faint rows for single bytes and special tokens: greedy text of the untrained model is then made of words, and
    # does not stop at its first token.
    with torch.no_grad():
        embeddings: Any = model.get_input_embeddings().weight
        embeddings[: len(pre_tokenizers.ByteLevel.alphabet())] *= _FAINT
        embeddings[-len(SPECIAL_TOKENS) :] *= _FAINT
    return model


def preprocessing() -> dict[str, dict[str, Any]]:
    """The contents of the preprocessing files by file name, as a published checkpoint has them."""
    common = {
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "processor_class": "LlavaOnevisionProcessor",
    }
    return {
        "preprocessor_config.json": {
            **common,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": architecture().image_grid_pinpoints,
            "do_pad": True,
        },
        "video_preprocessor_config.json": {
            **common,
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "num_frames": FRAMES,
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": IMAGE,
            "video_token": VIDEO,
            "num_image_tokens": GRID * GRID,
            "vision_feature_select_strategy": "full",
        },
    }


def create(out: Path, seed: int = SEED) -> None:
    """Write the whole checkpoint into the folder `out`, replacing files of the same names."""
    model = build_model(seed)
    with without_progress_bars():
        model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    build_tokenizer().save_pretrained(out)
    for name, content in preprocessing().items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    vision: Any = model.config.vision_config
    text: Any = model.config.text_config
    card = _MODEL_CARD.format(
        layers=vision.num_hidden_layers,
        width=vision.hidden_size,
        grid=GRID,
        patch=PATCH,
        text_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocabulary=VOCABULARY,
        parameters=model.num_parameters() / 1e6,
        seed=seed,
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m earlytom.micro.create", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PATH, help="folder to write (default: the bundled one)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--force", action="store_true", help="replace a checkpoint whose weights are trained")
    args = parser.parse_args(argv)
    try:
        if not args.force and (args.out / "config.json").is_file() and is_trained(args.out):
            raise UserError(
                f"{args.out} holds trained weights; name another folder with --out, or replace them with --force"
            )
        create(args.out, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote an untrained model (seed {args.seed}) to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
