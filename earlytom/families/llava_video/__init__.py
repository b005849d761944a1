"""LLaVA-Video and others in the original layout of LLaVA-NeXT, which transformers does not support: tower and projector
of LLaVA-OneVision, one of three poolings, and checkpoints with other tensor names and another configuration
(`earlytom.families.llava_video.config`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from earlytom.families.closings import Closings
from earlytom.families.family import Family
from earlytom.families.frames import FrameTimes
from earlytom.families.llava_onevision import LlavaOnevision
from earlytom.families.llava_video.layout import CLOSES, POOLINGS, pooled, side_of
from earlytom.families.qwen2 import QWEN2_7B
from earlytom.families.tokens import IMAGE, SPECIAL_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

_ORIGINAL = "LlavaQwenForCausalLM"
_DECODER = ("layers.", "norm.", "embed_tokens.")
_PROJECTOR = {
    "mm_projector.0.": "multi_modal_projector.linear_1.",
    "mm_projector.2.": "multi_modal_projector.linear_2.",
}
_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'video' -%}{{- '<image>\\n' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


class LlavaVideo(LlavaOnevision):
    """See `Family`. There is an instance for each pooling and placing of newlines, with and without the frames' times
    in a sentence."""

    model_type = "llava_qwen"
    title = "LLaVA-Video"
    model_class = "LlavaVideoForConditionalGeneration"
    frames = 64
    known_names = False
    presets: ClassVar = {("videomme", 0.25): (0.6, (10, 21, 23)), ("longvideobench", 0.25): (0.8, (6, 21, 23))}
    own_visual_token = True
    released = False
    video_token = visual_token = IMAGE

    def __init__(self, pooling: str, newlines: str, says_times: bool) -> None:
        self.pooling = pooling
        self.newlines = newlines
        self.says_times = says_times

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.pooling}-{self.newlines}" + ("-times" if self.says_times else "")

    @property
    def forms(self) -> tuple[Family, ...]:
        return tuple(_FORMS.values())

    def of(self, config: Any) -> Family:
        return _FORMS[config.mm_spatial_pool_mode, config.mm_newline_position, config.add_time_instruction]

    def describes(self, raw: Mapping[str, Any]) -> bool:
        # transformers' own "llava" is another model.
        return super().describes(raw) or (raw.get("model_type") == "llava" and raw.get("architectures") == [_ORIGINAL])

    def translated(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        from earlytom.families.llava_video.config import translated

        return translated(raw)

    def config(self, raw: dict[str, Any]) -> Any:
        from earlytom.families.llava_video.config import LlavaVideoConfig

        return LlavaVideoConfig.from_dict(raw)

    def transformers_class(self) -> Any:
        from earlytom.families.llava_video.model import LlavaVideoForConditionalGeneration

        return LlavaVideoForConditionalGeneration

    def prepares(self, config: Any) -> Mapping[str, Any]:
        side = config.vision_config.image_size
        return {"size": (side, side), "image_mean": self.mean, "image_std": self.std}

    def closings(self, cells: tuple[int, int]) -> Closings:
        return Closings(CLOSES[self.newlines], cells)

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        return side_of(rows, self.pooling), side_of(columns, self.pooling)

    def pool(self, values: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return pooled(values, self.pooling)

    def vision_settings(self, config: Any) -> dict[str, Any]:
        return super().vision_settings(config) | {"pooling": self.pooling}

    def canonical_name(self, name: str) -> str:
        name = super().canonical_name(name.replace("vision_tower.vision_tower.", "vision_tower.", 1))
        for old, new in _PROJECTOR.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return f"language_model.{name}" if name.startswith(_DECODER) else name

    def spare_names(self, config: Any) -> tuple[str, ...]:
        # The SigLIP tower's last layer and head, which the model does not use but some tools store.
        return f"vision_tower.encoder.layers.{config.vision_config.num_hidden_layers}.", "vision_tower.head."

    def chat_template(self) -> str:
        return _TEMPLATE

    def behind_video(self, times: FrameTimes) -> str:
        seconds = ",".join(f"{one:.2f}s" for one in times.seconds)
        return (
            f"\nThe video lasts for {times.duration:.2f} seconds, and {len(times.seconds)} frames are uniformly "
            f"sampled from it. These frames are located at {seconds}.Please answer the following questions related "
            "to this video."
        )

    def special_tokens(self, config: Any) -> dict[str, int]:
        words = SPECIAL_TOKENS[: SPECIAL_TOKENS.index(IMAGE)]
        return {token: config.text_config.bos_token_id + i for i, token in enumerate(words)} | {
            IMAGE: self.video_token_id(config)
        }

    @property
    def published(self) -> Mapping[str, Callable[[], Any]]:
        return {"llava-video-7b": _published}


_FORMS = {form: LlavaVideo(*form) for form in product(POOLINGS, CLOSES, (False, True))}
LLAVA_VIDEO = _FORMS["bilinear", "grid", False]


def _published() -> Any:
    """The published 7B configuration, translated from its original layout."""
    return LLAVA_VIDEO.config(
        LLAVA_VIDEO.translated(
            {
                "architectures": [_ORIGINAL],
                "mm_vision_tower": "google/siglip-so400m-patch14-384",
                "mm_projector_type": "mlp2x_gelu",
                "mm_patch_merge_type": "spatial_unpad",
                "mm_newline_position": "grid",
                "mm_spatial_pool_mode": "bilinear",
                **QWEN2_7B,
                "max_position_embeddings": 32768,
                "max_window_layers": 28,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0,
                "vocab_size": 152064,
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "pad_token_id": 151643,
                "image_token_index": 151646,
            }
        )
    )
