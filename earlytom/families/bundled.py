"""Configuration, chat template and preprocessing files of the bundled checkpoint (`earlytom.micro`), a LLaVA-OneVision.

They are those of a checkpoint on the hub, but for the sizes.
"""

from __future__ import annotations

from typing import Any

from earlytom.families.tokens import END, IMAGE, SPECIAL_TOKENS, STOP, VIDEO

GRID, PATCH = 9, 8
FRAMES = 16
IMAGE_SIZE = GRID * PATCH
VOCABULARY = 1280
CONTEXT = 4096

CHAT_TEMPLATE = """\
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


def architecture() -> Any:
    """The configuration of the bundled model."""
    from transformers import LlavaOnevisionConfig

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
    )


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
