"""SmolVLM2: SigLIP, pixel shuffle by 3 or 4 to 81 or 64 tokens a frame, a projector of one linear layer, and a prompt
with the number of frames and each frame's time.

Every frame has its own span, as in InternVL. The texts around spans are imported from transformers' processor.

Notation as in `earlytom.families.internvl`; r is `scale_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from earlytom.errors import UserError
from earlytom.families.frames import FrameTimes, Geometry
from earlytom.families.internvl import InternVL
from earlytom.families.tokens import END, START, STOP
from earlytom.families.vision import VisionModules
from earlytom.families.words import in_words
from earlytom.numbers import shown, whole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from earlytom.families.smolvlm.tower import SmolVlmTower, SmolVlmVision

_GLOBAL, _FAKE, _VISUAL, _DONE = "<global-img>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"
_MOST_FRAMES, _LONGEST = 777, 24 * 3600 - 1  # for the longest texts: in words, and of a day's last second
_LANCZOS, _BICUBIC = 1, 3
_IMAGE_ID = 49190


class SmolVlm(InternVL):
    """See `Family`."""

    model_type = "smolvlm"
    title, tower_title = "SmolVLM2", "SigLIP"
    model_class, config_class = "SmolVLMForConditionalGeneration", "SmolVLMConfig"
    towers = ("smolvlm_vision",)
    frames = 64
    vision_names = ("vision_model.", "connector.")
    decoder_names = ("text_model.", "lm_head.")
    embeddings_name = "text_model.embed_tokens.weight"
    visual_token = _VISUAL
    names_times = True
    after_frame, between_frames = _FAKE, ""
    sampling = "ends"
    mean = std = (0.5, 0.5, 0.5)
    activations = ()
    layer_setting = "scale_factor"
    roles: ClassVar[Mapping[str, str]] = {}  # tensor names are those of the roles

    def check(self, raw: Mapping[str, Any]) -> None:
        vision = raw.get("vision_config")
        sides = [vision.get(name, 1) for name in ("image_size", "patch_size")] if isinstance(vision, dict) else []
        if not all(isinstance(side, int) for side in sides):
            raise UserError(f"image_size and patch_size must be one number each, got {' and '.join(map(shown, sides))}")

    def preparation(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        # Its processor resizes every frame to a square, and uses bicubic where it has no Lanczos.
        found, sampled = dict(raw), raw.get("video_sampling")
        if isinstance(square := raw.get("max_image_size"), dict):
            found["size"] = square.get("longest_edge")
        if raw.get("resample") == _LANCZOS:
            found["resample"] = _BICUBIC
        if isinstance(sampled, dict):
            found["num_frames"] = sampled.get("max_frames")
        return found

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        side = _usual_side(grid[0])
        return grid[0] // side, grid[1] // side

    def pool(self, values: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        from earlytom.families.internvl.tower import mean_pool

        rows, columns = grid or (math.isqrt(values.shape[1]),) * 2
        return mean_pool(values, (rows, columns), _usual_side(rows))

    def geometry(self, config: Any) -> Geometry:
        vision, side = config.vision_config, config.vision_config.image_size
        grid, factor = side // vision.patch_size, whole("scale_factor", config.scale_factor, 1, 1 << 6)
        if grid % factor:
            raise UserError(f"a frame has {grid} x {grid} patches, expected a multiple of scale_factor, {factor}")
        return Geometry(
            size=(side, side),
            patch=vision.patch_size,
            grid=(grid, grid),
            cells=(grid // factor,) * 2,
            step=1,
            depth=vision.num_hidden_layers,
            width=vision.hidden_size,
            llm_width=config.text_config.hidden_size,
            heads=vision.num_attention_heads,
            inner=vision.intermediate_size,
            projector=(vision.hidden_size * factor**2, config.text_config.hidden_size),
        )

    def tower(self, tower: nn.Module) -> SmolVlmTower:  # type: ignore[override]
        from earlytom.families.smolvlm.tower import SmolVlmTower

        return SmolVlmTower(tower)

    def vision(self, tower: nn.Module, projector: nn.Module) -> SmolVlmVision:  # type: ignore[override]
        from earlytom.families.smolvlm.tower import SmolVlmVision

        return SmolVlmVision(self.tower(tower), projector)

    def new_modules(self, config: Any) -> VisionModules:
        from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

        tower = SmolVLMVisionTransformer._from_config(config.vision_config)
        return VisionModules(tower, SmolVLMConnector(config), None)

    def canonical_name(self, name: str) -> str:
        return name.removeprefix("model.")

    def vision_settings(self, config: Any) -> dict[str, Any]:
        from earlytom.families.llava_onevision import TOWER_SETTINGS

        settings = [name for name in TOWER_SETTINGS if hasattr(config.vision_config, name)]
        tower = {name: getattr(config.vision_config, name) for name in settings}
        return {"family": self.model_type, "tower": tower, "projector": [config.scale_factor]}

    def own_tokens(self, model: Any, pixels: Tensor) -> Tensor:
        found: Tensor = model.model.get_image_features(pixels[None]).pooler_output[0]
        return found

    def projector_weights(self, config: Any) -> int:
        return math.prod(self.geometry(config).projector)  # it has no bias

    def other_weights(self, config: Any) -> int:
        frame = self.geometry(config)
        return frame.width * (3 * frame.patch**2 + 1 + frame.patches + 2)  # and the last norm

    def chat_template(self) -> str:
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

        return DEFAULT_CHAT_TEMPLATE

    def before_video(self, times: FrameTimes | None) -> str:
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_VIDEO_INTRO

        count, duration = (_MOST_FRAMES, _LONGEST) if times is None else (len(times.seconds), int(times.duration))
        return DEFAULT_VIDEO_INTRO.format(frame_count=in_words(count), video_duration=timedelta(seconds=duration))

    def before_frame(self, number: int, times: FrameTimes | None = None) -> str:
        from transformers.models.smolvlm.processing_smolvlm import FRAME_TIMESTAMP_MESSAGE

        seconds = _LONGEST if times is None else times.seconds[number]
        timestamp = f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
        return FRAME_TIMESTAMP_MESSAGE.format(timestamp=timestamp) + _FAKE + _GLOBAL

    def after_video(self) -> str:
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_MEDIA_OUTTRO

        return DEFAULT_MEDIA_OUTTRO

    def videos(self, config: Any, pixels: Tensor, placeholders: Sequence[int]) -> list[list[Tensor]]:
        if pixels.dim() != 5 or len(pixels) != len(placeholders):
            raise UserError(
                f"pixel_values must be [{len(placeholders)}, frames, 3, height, width], got {list(pixels.shape)}: make "
                "them with the model's own processor"
            )
        each = self.geometry(config).tokens_per_frame
        if any(count != each * pixels.shape[1] for count in placeholders):
            raise UserError(
                f"the prompt has {', '.join(map(str, placeholders))} placeholders, but {pixels.shape[1]} frame(s) take "
                f"{each} each: make it with the model's own processor, each prompt of one video and no pictures"
            )
        return [[frames] for frames in pixels]

    def special_tokens(self, config: Any) -> dict[str, int]:
        names = (END, START, STOP, _GLOBAL, _FAKE, _VISUAL, _DONE)
        return {name: config.image_token_id + at for at, name in enumerate(names, -names.index(_VISUAL))}

    @property
    def published(self) -> Mapping[str, Callable[[], Any]]:
        small = {"image_size": 512, "patch_size": 16, "hidden_size": 768, "num_attention_heads": 12}
        large = {"image_size": 384, "patch_size": 14, "hidden_size": 1152, "num_attention_heads": 16}
        return {
            "smolvlm2-500m": lambda: _published(
                small | {"intermediate_size": 3072, "num_hidden_layers": 12},
                4,
                hidden_size=960,
                intermediate_size=2560,
                num_hidden_layers=32,
                num_attention_heads=15,
                num_key_value_heads=5,
                max_position_embeddings=8192,
                rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            ),
            "smolvlm2-2.2b": lambda: _published(
                large | {"intermediate_size": 4304, "num_hidden_layers": 27},
                3,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=24,
                num_attention_heads=32,
                num_key_value_heads=32,
                max_position_embeddings=16384,
                rope_parameters={"rope_type": "default", "rope_theta": 273768.0},
            ),
        }


SMOLVLM = SmolVlm()


def _usual_side(grid: int) -> int:
    """`scale_factor` of the published models whose frames are `grid` x `grid` patches."""
    return 3 if grid % 4 else 4


def _published(vision: dict[str, Any], side: int, **text: Any) -> Any:
    """A published configuration: SigLIP base at 512 or so400m at 384 pixels, and SmolLM2 with the settings `text`.

    Ids of special tokens are free ones of the bundled tokenizer, which replaces its own.
    """
    return SMOLVLM.config(
        {
            "vision_config": vision,
            "text_config": {
                "model_type": "llama",
                "rms_norm_eps": 1e-5,
                "vocab_size": 49280,
                "bos_token_id": _IMAGE_ID - 5,
                "eos_token_id": _IMAGE_ID + 1,
                "pad_token_id": _IMAGE_ID - 5,
                "tie_word_embeddings": False,
                **text,
            },
            "image_token_id": _IMAGE_ID,
            "scale_factor": side,
            "tie_word_embeddings": False,
        }
    )
