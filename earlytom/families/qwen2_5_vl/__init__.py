"""Qwen2.5-VL in transformers' form: as Qwen3-VL two pictures make a frame, but most layers of the tower have window
attention, MLPs are gated, norms are RMS norms, and there are no learned positions and no deepstack. In a prompt a video
has one span; frames' positions on the time axis are their times, `tokens_per_second` positions a second.

Received attention needs a layer with full attention, so the last merge layer must be one of `fullatt_block_indexes`. A
merged frame has the time of the input frame with the largest weight in it.

Notation as in `earlytom.families.qwen3_vl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from earlytom.errors import UserError
from earlytom.families.frames import Geometry
from earlytom.families.qwen2 import QWEN2_7B
from earlytom.families.qwen2_5_vl.windows import pairs
from earlytom.families.qwen3_vl import CLOSE, OPEN, TOWER_SETTINGS, VISUAL, Qwen3Vl
from earlytom.families.qwen3_vl.grid import SIDE, STEP
from earlytom.numbers import shown, whole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from earlytom.families.qwen2_5_vl.tower import Qwen25VlTower, Qwen25VlVision

_FULL = (7, 15, 23, 31)
# The keys of a released config.json that are not the language model's.
_OWN = (
    "vision_config", "model_type", "architectures", "image_token_id", "video_token_id", "vision_token_id",
    "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings", "transformers_version", "torch_dtype",
    "dtype", "quantization_config", "earlytom_trained",
)  # fmt: skip
_ROLES = {"mlp.down_proj.weight": "fc2.weight", "merger.ln_q.weight": "norm.weight"}


class Qwen25Vl(Qwen3Vl):
    """See `Family`."""

    model_type = "qwen2_5_vl"
    title, tower_title = "Qwen2.5-VL", "Qwen2.5-VL's ViT"
    model_class, config_class = "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"
    section = (16, 24, 24)
    tower_settings = (*TOWER_SETTINGS, "window_size", "fullatt_block_indexes")
    towers = ("qwen2_5_vl_vision",)
    video_token = f"{OPEN}{VISUAL}{CLOSE}"
    span_a_frame = names_times = False
    after_frame = ""
    beside_pixels = (*Qwen3Vl.beside_pixels, "second_per_grid_ts")
    sampling = "begins"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    vision_sizes = {name: most for name, most in Qwen3Vl.vision_sizes.items() if name != "num_position_embeddings"} | {
        "window_size": 1 << 12,
        "tokens_per_second": 1 << 10,
    }
    roles = _ROLES | Qwen3Vl.roles

    def translated(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        if "text_config" in raw or "hidden_size" not in raw:
            return dict(raw)
        text = {name: value for name, value in raw.items() if name not in _OWN}
        return {name: value for name, value in raw.items() if name in _OWN} | {"text_config": text}

    def geometry(self, config: Any) -> Geometry:
        frame, vision = super().geometry(config), config.vision_config
        full = list(vision.fullatt_block_indexes)
        for layer in full:
            whole("each of fullatt_block_indexes", layer, 0, vision.depth - 1)
        if full != sorted(set(full)) or not full:
            raise UserError(f"fullatt_block_indexes must be different layers, ascending, got {shown(full)}")
        if vision.window_size % (side := SIDE * vision.patch_size) or not vision.window_size:
            raise UserError(f"window_size must be a multiple of {side} pixels, got {shown(vision.window_size)}")
        some = pairs(frame.grid, vision.window_size // side)
        return replace(
            frame,
            full=tuple(full),
            pairs=tuple(frame.patches**2 if layer in full else some for layer in range(frame.depth)),
            gated=True,
            rms=True,
            tokens_per_second=vision.tokens_per_second,
        )

    def tower(self, tower: nn.Module) -> Qwen25VlTower:
        from earlytom.families.qwen2_5_vl.tower import Qwen25VlTower

        return Qwen25VlTower(tower)

    def vision(self, tower: nn.Module, projector: nn.Module) -> Qwen25VlVision:
        from earlytom.families.qwen2_5_vl.tower import Qwen25VlVision

        return Qwen25VlVision(self.tower(tower), projector)

    def vision_settings(self, config: Any) -> dict[str, Any]:
        found = super().vision_settings(config)
        return found | {"tower": found["tower"] | {"fullatt_block_indexes": list(self.geometry(config).full or ())}}

    def canonical_name(self, name: str) -> str:
        found = super().canonical_name(name)  # checkpoints of first releases have `model.layers` beside `visual`
        return f"language_model.{found}" if found.startswith(("layers.", "embed_tokens.", "norm.")) else found

    def other_weights(self, config: Any) -> int:
        frame = self.geometry(config)
        return frame.width * 3 * STEP * frame.patch**2

    def projector_weights(self, config: Any) -> int:
        return super().projector_weights(config) - self.geometry(config).width  # its norm has no bias

    def given_features(self, config: Any, videos: list[Tensor]) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tokens: Any = tuple(videos)
        return BaseModelOutputWithPooling(pooler_output=tokens)

    def token_times(self, config: Any, frames: Tensor, video: int, **beside: Any) -> Tensor:
        seconds = beside.get("second_per_grid_ts")
        # In single precision as in transformers: after rounding down, other digits could be another position.
        return (frames * (config.vision_config.tokens_per_second * (1 if seconds is None else seconds[video]))).long()

    def weight_role(self, name: str) -> str:
        return super().weight_role(name) if name.startswith(self.vision_names) else name

    @property
    def published(self) -> Mapping[str, Callable[[], Any]]:
        return {
            "qwen2.5-vl-3b": lambda: _published(
                hidden_size=2048,
                intermediate_size=11008,
                num_hidden_layers=36,
                num_attention_heads=16,
                num_key_value_heads=2,
                vocab_size=151936,
                tie_word_embeddings=True,
            ),
            "qwen2.5-vl-7b": lambda: _published(
                **QWEN2_7B,
                vocab_size=152064,
                tie_word_embeddings=False,
            ),
        }


QWEN2_5_VL = Qwen25Vl()


def _published(**text: Any) -> Any:
    """A published configuration: the common tower, and the language model (Qwen2.5) with the settings `text`."""
    vision = {
        "model_type": "qwen2_5_vl_vision",
        "hidden_size": 1280,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": list(_FULL),
        "tokens_per_second": 2,
    }
    own = {
        "model_type": "qwen2_5_vl_text",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(QWEN2_5_VL.section)},
    }
    return QWEN2_5_VL.config(
        {"vision_config": vision, "text_config": own | text, "tie_word_embeddings": text["tie_word_embeddings"]}
    )
